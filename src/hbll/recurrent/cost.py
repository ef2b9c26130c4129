"""What a training step costs: the counted work and span of every rule, and the time that they predict for a machine.

Work and span are counted in evaluations of a cell: a forward evaluation on one batch, a vector-Jacobian product for its
state and one for its weights are a unit each, a level of a scan over shared matrices is a unit of span. Heads and input
maps cost nothing; products for weights hang off the chain of dependent evaluations, for nothing waits for them.
"""

from dataclasses import dataclass

from hbll.prefix import levels, widths

__all__ = ["Cost", "Machine", "backpropagation_cost", "newton_cost", "paper_cost", "scan_cost"]


@dataclass(frozen=True)
class Cost:
    """Of one training step on sequences of N chunks."""

    work: int
    """All evaluations, those of the backward pass counted in."""
    span: int
    """The longest chain of evaluations in which each needs the one before."""
    carried: int = 0
    """States that scans multiply by a matrix which all samples share."""
    products: int = 0
    """Products of two such matrices."""

    def flops(self, batch: int, width: int, gates: int) -> int:
        """Floating-point operations of all products with the recurrent weights and with shared matrices.

        Args:
            batch: B, samples of a step.
            width: H, units of the hidden state, taken to be all of the state.
            gates: Γ of the cell.
        """
        return 2 * width**2 * (batch * (gates * self.work + self.carried) + width * self.products)


@dataclass(frozen=True)
class Machine:
    """A parallel machine in two constants."""

    latency: float
    """Seconds that every evaluation of the span takes, however small it is."""
    throughput: float
    """Floating-point operations a second."""

    def seconds(self, cost: Cost, batch: int, width: int, gates: int) -> float:
        """A prediction of a step's time: the latencies of its span, and all of its operations at full throughput.

        This flatters rules that walk step by step, for one step of one batch seldom fills a machine.
        """
        return self.latency * cost.span + cost.flops(batch, width, gates) / self.throughput


def backpropagation_cost(length: int) -> Cost:
    """Of ``Backpropagation``, fused or not, on N chunks."""
    return Cost(3 * length, 2 * length)


def newton_cost(length: int, iterations: int) -> Cost:
    """Of ``Newton``, but for its products of every sample's own matrices.

    Each iteration evaluates all steps and solves in 2 log2 N levels; then one solve for the credit.
    """
    solve = 2 * levels(length)
    return Cost(length * (iterations + 2), iterations * (1 + solve) + solve + 1)


def paper_cost(length: int, sweeps: int) -> Cost:
    """Of ``PaperRule``: at a node the prior, the right arc, its two products and the prior's one; 3 of span a level."""
    arcs = length - 1
    return Cost(5 * arcs + (sweeps + 1) * arcs * (sweeps > 0), 3 * levels(length) + 1 + sweeps)


def scan_cost(
    length: int,
    chunk: int,
    sweeps: int,
    credit_sweeps: int,
    radix: int = 2,
    tree: bool = False,
    shared: bool = False,
    every_step: bool = False,
) -> Cost:
    """Of ``ScanRule``, with the options by its names; ``tree`` is that guess.

    Coarse steps are made beside the first sweep; only the predictor and the defect wait for the last correction.
    """
    chunks = -(-length // chunk)
    steps = sweeps + credit_sweeps + 1
    awaited = sweeps - 1 + credit_sweeps + (not every_step)  # scans; that of the defect comes on top
    carries = [width for row in widths(chunks, radix) for width in row]
    power = chunk.bit_length() + chunk.bit_count() - 2  # products, by repeated squaring
    joined = [chunks - width + 1 for width in carries[1:]]
    products = power + len(joined) if shared else power * chunks + sum(joined)
    return Cost(
        work=length * (steps + 1) + 2 * (chunks - 1) * tree,
        span=chunk * steps + levels(chunks, radix) * awaited + levels(chunks) * tree,
        carried=sum(chunks - width for width in carries) * (awaited + 1) + (chunks > 1 and not every_step),
        products=products,
    )
