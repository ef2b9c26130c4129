"""hbll: deep networks trained without end-to-end backpropagation, in O(log N) sequential steps."""

from hbll.locality import Audit, audit
from hbll.network import TreeNetwork
from hbll.objective import NodeReport, Objective, Step
from hbll.tree import Tree

__all__ = ["Audit", "NodeReport", "Objective", "Step", "Tree", "TreeNetwork", "audit"]
