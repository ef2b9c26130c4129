"""The paper's tables made again: every run that a table needs, and its figures beside the paper's."""

from hbll.reproduce.reproduction import Reproduction, Results, reproduce
from hbll.reproduce.tables import TABLES, Table

__all__ = ["TABLES", "Reproduction", "Results", "Table", "reproduce"]
