"""Estimates of the states: what each block of the network is evaluated on.

A states module is called with the trace and the credit module. It evaluates every block once, on the boundary of some
earlier node, and decides what boundary the next ones see.
"""

import torch
from torch import Tensor, nn

from hbll.blocks import stack
from hbll.credit import Credit
from hbll.guess import GUESSES
from hbll.kept import Kept, concatenate, map_tensors, own_copy
from hbll.network import TreeNetwork
from hbll.rule import Rule
from hbll.scan import Coarse, correct, defect
from hbll.stages import Stages
from hbll.trace import Trace, assemble, check_batch

__all__ = ["STATES", "ChainStates", "ScanStates", "States", "StreamStates", "TreeStates"]


class States(nn.Module):
    """What every states module offers."""

    def prepare(self, network: TreeNetwork, stages: Stages) -> None:
        """Makes the parameters that the states need for a network."""

    def forward(self, trace: Trace, credit: Credit) -> None:
        """Evaluates every stage once and adds the waves to the trace."""
        raise NotImplementedError


class TreeStates(States):
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


class ChainStates(States):
    """One block after the other, as deployed: exact, N - 1 sequential calls.

    With exact credit the states carry one graph from end to end, along any path; otherwise each block learns by itself.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, trace: Trace, credit: Credit) -> None:
        if self.rule.credit == "exact":
            trace.evaluate_path(trace.network.resolve(self.rule.path))
        else:
            trace.evaluate_in_order(carry_gradient=self.rule.scope == "tree")


class ScanStates(States):
    """All stages at once, on guesses of their inputs that parallel sweeps correct.

    A sweep evaluates every stage on the guessed output of the one before and carries the disagreement on to all later
    stages, along their skip connections, by a prefix sum. After as many sweeps as there are stages the states are the
    chain's own; a few suffice where blocks are near the identity. The last sweep keeps its graph.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.coarse: Coarse = "identity" if rule.coarse == "skip" else None
        self.guess = GUESSES[rule.guess](rule)

    def prepare(self, network: TreeNetwork, stages: Stages) -> None:
        self.guess.prepare(network, stages)

    def forward(self, trace: Trace, credit: Credit) -> None:
        states = self.sweep(trace, self.guess(trace), self.rule.sweeps - 1, self.rule.tolerance)
        nodes = trace.stages.nodes
        inputs = self._inputs(trace, states)
        parts = []
        for positions in trace.engine.partition(nodes):
            group = tuple(nodes[p] for p in positions)
            wave = trace.add_wave(group, tuple(n - 1 for n in group), inputs[positions], trace.clock)
            parts.append((positions, wave.evaluation.outputs.detach()))
        corrected = correct(inputs, assemble(parts), self.coarse)
        trace.defect = defect(corrected[: len(states)], states)
        trace.head_state = corrected[-1]
        self.guess.learn(trace, corrected)

    def sweep(self, trace: Trace, states: Tensor, sweeps: int, tolerance: float | None) -> Tensor:
        """The outputs h_1 .. h_S of all stages, (S, B, ...), after that many sweeps without graph from guessed ones."""
        for _ in range(sweeps):
            inputs = self._inputs(trace, states)
            last, states = states, correct(inputs, trace.sweep(inputs), self.coarse)
            if tolerance is not None and defect(states[: len(last)], last) <= tolerance:
                break
        return states

    @staticmethod
    def _inputs(trace: Trace, states: Tensor) -> Tensor:
        return torch.cat([trace.boundary[0].detach().unsqueeze(0), states[: len(trace.stages.nodes) - 1]])


class StreamStates(States):
    """The chain's own states, pipelined over steps: each stage works on what the one before it left in the last step.

    Every step feeds one new mini-batch and evaluates every stage once, all at once; stage n sees a batch n - 1 steps after
    it came in. While the pipeline fills, stages without input skip the step. In evaluation mode the given batch passes
    through all stages, one after the other, and the pipeline stays as it is.
    """

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.name = "pipeline" if rule.credit == "late" else "stream"
        self.flight = Kept()
        """What stage n - 1 left for stage n = 2, 3, ..: ``inputs``, states (n - 1, B, ...), and their ``labels``."""

    def forward(self, trace: Trace, credit: Credit) -> None:
        if not self.training:
            trace.evaluate_in_order(carry_gradient=False)
            return
        waiting = 0
        labels = map_tensors(lambda label: label.unsqueeze(0), own_copy(trace.y))
        if flight := self.flight.of(trace):
            waiting = len(flight["inputs"])
            check_batch(self.name, trace.boundary[0], flight["inputs"][0])
            for n, state in enumerate(flight["inputs"].unbind(0), 1):
                trace.place(n, state)
            labels = concatenate([labels, flight["labels"]])
        active = trace.stages.nodes[: waiting + 1]
        trace.evaluate(active, [n - 1 for n in active])
        trace.labels = labels
        kept = active[: len(trace.stages.nodes) - 1]  # the last stage's output has reached the head
        if kept:
            inputs, labels = map_tensors(lambda rows: rows[: len(kept)], (trace.outputs(active), labels))
            self.flight.leave(trace, {"inputs": inputs, "labels": labels})


STATES: dict[str, type[States]] = {
    "tree": TreeStates,
    "chain": ChainStates,
    "scan": ScanStates,
    "stream": StreamStates,
}
