"""Stages in processes, and on machines, of their own."""

from hbll.distributed.replica import Replica
from hbll.distributed.tree import TreeWorker
from hbll.distributed.worker import Worker

__all__ = ["Replica", "TreeWorker", "Worker"]
