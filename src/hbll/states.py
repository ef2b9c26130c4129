"""Estimates of the states: what each block of the network is evaluated on.

A states module is called with the trace and the credit module. It evaluates every block once, on the boundary of some
earlier node, and decides what boundary the next ones see.
"""

from torch import nn

from hbll.blocks import stack
from hbll.credit import Credit
from hbll.rule import Rule
from hbll.trace import Trace

__all__ = ["STATES", "ChainStates", "TreeStates"]


class TreeStates(nn.Module):
    """Level by level, every block on its left parent: log2 N sequential calls (arXiv 2606.21497, section 3).

    The boundary that children see is the *posterior* (the target, which contains the label: the paper) or the *prior*
    (what the block computed: what the deployed network will see).
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.posterior = rule.boundary == "posterior"
        self.carry_gradient = rule.scope == "tree"

    def forward(self, trace: Trace, credit: Credit) -> None:
        for level in trace.tree.levels:
            waves = trace.evaluate(level, [trace.tree.left(n) for n in level])
            if self.posterior:
                credit.correct(trace, level)
            for wave in waves:
                prior = wave.evaluation.outputs if self.carry_gradient else wave.evaluation.outputs.detach()
                if self.posterior:
                    target = stack([trace.target[n] for n in wave.nodes])
                    # The value of the target; if boundaries carry a gradient, that of the prior.
                    boundary = prior + (target - prior).detach() if self.carry_gradient else target
                    trace.set_boundary(wave, boundary, trace.depth("target", wave.nodes))
                else:
                    trace.set_boundary(wave, prior, wave.depth)


class ChainStates(nn.Module):
    """One block after the other, as deployed: exact, N - 1 sequential calls.

    With exact credit the states carry one graph from end to end, along any path; otherwise each block learns by itself.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, trace: Trace, credit: Credit) -> None:
        if self.rule.credit == "exact":
            trace.evaluate_path(trace.network.resolve(self.rule.path))
            return
        for n in trace.tree.chain:
            (wave,) = trace.evaluate([n], [n - 1])
            outputs = wave.evaluation.outputs
            trace.set_boundary(wave, outputs if self.rule.scope == "tree" else outputs.detach(), wave.depth)


STATES: dict[str, type[nn.Module]] = {"tree": TreeStates, "chain": ChainStates}
