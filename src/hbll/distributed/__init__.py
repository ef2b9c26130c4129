"""Stages in processes, and on machines, of their own."""

from hbll.distributed.worker import Worker

__all__ = ["Worker"]
