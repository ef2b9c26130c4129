"""Ways to train one GPT in several processes, each checked against plain backpropagation.

An arm is made in every process; its ``run`` takes so many training steps. ``ARMS`` has them by name: another one is a
function of a configuration that returns an ``Arm``, or one sentence that says why it cannot be.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import processes
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleZBVZeroBubble
from torch.nn.parallel import DistributedDataParallel

import hbll
from hbll.data.text import CHARACTERS
from hbll.distributed import Worker, schedules
from hbll.distributed.cost import SCHEMES, balanced, equal
from hbll.distributed.diloco import DiLoCo
from hbll.distributed.simulate import Op
from hbll.models.gpt import GPTBlock, GPTEmbed, GPTHead


@dataclass(frozen=True)
class Config:
    """What is trained, and by which of how many processes."""

    width: int
    batch: int
    """Samples of a step, of all processes together."""
    blocks: int = 7
    context: int = 128
    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    dtype: torch.dtype = torch.float32
    plain: bool = False
    """Whether weights move by plain gradient descent, as they do where arms are checked, or by AdamW."""

    def network(self) -> hbll.Chain:
        """The same in every process."""
        torch.manual_seed(0)
        blocks = [GPTBlock(self.width, max(2, self.width // 64), depth=self.blocks) for _ in range(self.blocks)]
        embed, head = GPTEmbed(CHARACTERS, self.context, self.width), GPTHead(CHARACTERS, self.width)
        return hbll.Chain(embed, blocks, head).to(self.device, self.dtype)

    def data(self) -> tuple[Tensor, Tensor]:
        """A batch of sequences, and their next characters; the same in every process."""
        torch.manual_seed(1)
        tokens = torch.randint(CHARACTERS, (self.batch, self.context + 1))
        return tokens[:, :-1].contiguous().to(self.device), tokens[:, 1:].contiguous().to(self.device)

    def share(self) -> tuple[Tensor, Tensor]:
        """This process's part of the batch."""
        part = self.batch // self.world
        x, y = self.data()
        return x[self.rank * part : (self.rank + 1) * part], y[self.rank * part : (self.rank + 1) * part]

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        if self.plain:
            return torch.optim.SGD(parameters, lr=0.1)
        return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


@dataclass(frozen=True)
class Arm:
    """A way to train, in one process of them all."""

    run: Callable[[int], None]
    """Takes so many training steps."""
    check: Callable[[], float]
    """The largest difference from plain backpropagation in what this process trains, as a share of the largest value."""
    rare: Callable[[], None] | None = None
    """What is done beside that every ``every`` steps."""
    every: int = 1
    sizes: tuple[int, ...] = ()
    """Blocks of the stages that learn by themselves."""


Build = Callable[[Config], Arm | str]


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def difference(found: Mapping[str, Tensor], exact: Mapping[str, Tensor], config: Config) -> float:
    """The largest of all tensors by name, as a share of the largest value; all processes together must have every name."""
    names: list[Any] = [list(found)]
    if config.world > 1:
        names = [None] * config.world
        dist.all_gather_object(names, list(found))
    if missing := set(exact) - {name for held in names for name in held}:
        raise SystemExit(f"nobody trains {', '.join(sorted(missing))}")
    scale = max(tensor.abs().max().item() for tensor in exact.values())
    return max((tensor - exact[name]).abs().max().item() for name, tensor in found.items()) / scale


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach() for name, p in network.named_parameters() if p.grad is not None}


def exact_gradients(config: Config) -> dict[str, Tensor]:
    """By plain backpropagation, of the whole batch."""
    network = config.network()
    x, y = config.data()
    loss_of(network(x), y).backward()
    return gradients(network)


def repeated(step: Callable[[], None]) -> Callable[[int], None]:
    def run(steps: int) -> None:
        for _ in range(steps):
            step()

    return run


def by_gradients(walk: Callable[[], None], optimizer: torch.optim.Optimizer, network: nn.Module, config: Config) -> Arm:
    """An arm that walks a batch back into the network's gradients, by which it is checked, and steps."""

    def step() -> None:
        walk()
        optimizer.step()

    def check() -> float:
        walk()
        return difference(gradients(network), exact_gradients(config), config)

    return Arm(repeated(step), check)


def backpropagation(config: Config, threads: int = 1) -> Arm:
    """One process, the first."""
    network = config.network()
    x, y = config.data()
    optimizer = config.optimizer(network.parameters())

    def walk() -> None:
        optimizer.zero_grad()
        loss_of(network(x), y).backward()

    def run(steps: int) -> None:
        if config.rank == 0:
            torch.set_num_threads(threads)
            for _ in range(steps):
                walk()
                optimizer.step()
            torch.set_num_threads(1)

    return replace(by_gradients(walk, optimizer, network, config), run=run)


def data_parallel(config: Config) -> Arm | str:
    """DistributedDataParallel."""
    if config.batch % config.world:
        return f"a batch of {config.batch} cannot be split over {config.world} processes"
    network = config.network()
    x, y = config.share()
    wrapped = DistributedDataParallel(network, gradient_as_bucket_view=True)
    optimizer = config.optimizer(network.parameters())

    def walk() -> None:
        optimizer.zero_grad()
        loss_of(wrapped(x), y).backward()

    return by_gradients(walk, optimizer, network, config)


class Piece(nn.Module):
    """Consecutive parts of a network, as a pipeline's stage."""

    def __init__(self, network: hbll.Chain, sizes: list[int], stage: int) -> None:
        super().__init__()
        borders = [0, *accumulate(sizes)]
        first, end = list(pairwise(borders))[stage]
        embed = [network.embed] if stage == 0 else []
        head = [network.head] if stage == len(sizes) - 1 else []
        self.parts = nn.ModuleList([*embed, *network.blocks[first:end], *head])

    def forward(self, state: Tensor) -> Tensor:
        for part in self.parts:
            state = part(state)
        return state


def sizes_of(blocks: int, stages: int) -> list[int]:
    """As even as can be, the first ones having more: the last has the head."""
    return [blocks // stages + (stage < blocks % stages) for stage in range(stages)]


def torch_pipeline(config: Config, micros: int, zero_bubble: bool = False) -> Arm | str:
    """1F1B, or ZBV, by torch.distributed.pipelining."""
    if config.world < 2:
        return "a pipeline needs two processes"
    if config.batch % micros:
        return f"a batch of {config.batch} cannot be split into {micros}"
    count = config.world * (2 if zero_bubble else 1)
    if micros < config.world:
        return f"torch's refuses fewer micro-batches than processes, {config.world}"
    network = config.network()
    x, y = config.data()
    places = [config.rank, count - 1 - config.rank] if zero_bubble else [config.rank]
    pieces = [Piece(network, sizes_of(config.blocks, count), place) for place in places]
    stages = [PipelineStage(p, place, count, config.device) for p, place in zip(pieces, places, strict=True)]
    if zero_bubble:
        # Not with defer_pp_recv=True, which receives in another order than is sent: messages are taken for one another.
        schedule: Any = ScheduleZBVZeroBubble(list(stages), micros, loss_fn=loss_of)
    else:
        schedule = Schedule1F1B(stages[0], micros, loss_fn=loss_of)
    given = [x] if 0 in places else []
    taught = {"target": y, "losses": []} if count - 1 in places else {}
    optimizer = config.optimizer([p for piece in pieces for p in piece.parameters()])

    def walk() -> None:
        optimizer.zero_grad()
        schedule.step(*given, **taught, return_outputs=False)

    return by_gradients(walk, optimizer, network, config)


def unfit(batch: int, micros: int, world: int) -> str | None:
    """Why a batch cannot pass so many processes in so many micro-batches without a flush; None if it can."""
    if not micros or batch % micros:
        return f"a batch of {batch} cannot be split into {micros}"
    if micros < world:
        return f"it needs as many micro-batches as processes, {world}"
    return None


class TwoVersions:
    """A stage of 2BW: batch t is answered by the weights as they were before the update of batch t - 1.

    theta_{t+1} = theta_t - u(grad L(theta_{t-1}, batch t)) (Narayanan et al., arXiv 2006.09503).
    """

    def __init__(self, piece: Piece, rank: int, world: int, micros: int) -> None:
        self.piece, self.rank, self.world, self.micros = piece, rank, world, micros
        self.versions = {0: self._version()}
        self.held: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.begun = 0
        """Steps taken in earlier runs."""

    def _version(self) -> dict[str, Tensor]:
        return {name: p.detach().clone().requires_grad_() for name, p in self.piece.named_parameters()}

    def _used(self, step: int) -> dict[str, Tensor]:
        return self.versions[max(0, self.begun + step - 1)]

    def run(self, batches: Sequence[tuple[Tensor, Tensor]], update: Callable[[], None], state: Tensor) -> None:
        """Steps on batches, the last of which is ended.

        Args:
            update: moves the piece's parameters by their gradients.
            state: like what crosses between stages for a micro-batch.
        """
        parts = [(x.chunk(self.micros), y.chunk(self.micros)) for x, y in batches]

        def perform(op: Op, received: Mapping[Op, Tensor]) -> Tensor | None:
            first, last = op.stage == 0, op.stage == self.world - 1
            match op.kind:
                case "F":
                    given = parts[op.step][0][op.micro] if first else next(iter(received.values())).requires_grad_()
                    output = torch.func.functional_call(self.piece, self._used(op.step), (given,))
                    if last:
                        output = loss_of(output, parts[op.step][1][op.micro]) / self.micros
                    self.held[op.step, op.micro] = given, output
                    return output.detach()
                case "B":
                    given, output = self.held.pop((op.step, op.micro))
                    output.backward(None if last else next(iter(received.values())))
                    return given.grad
            self._update(op.step, update)
            return None

        schedule = schedules.one_f_one_b(self.world, self.micros, len(batches), flush=False)
        processes.execute(schedule, self.rank, perform, lambda op: torch.empty_like(state))
        self.begun += len(batches)

    def _update(self, step: int, update: Callable[[], None]) -> None:
        used, now = self._used(step), self.begun + step
        for name, parameter in self.piece.named_parameters():
            parameter.grad, used[name].grad = used[name].grad, None
        update()
        self.versions[now + 1] = self._version()
        self.versions = {number: version for number, version in self.versions.items() if number >= now}


def two_versions(config: Config, micros: int) -> Arm | str:
    """2BW in real processes."""
    if config.world < 2:
        return "a pipeline needs two processes"
    if config.device.type == "cuda":
        return "its messages have tags, which NCCL has not"
    if reason := unfit(config.batch, micros, config.world):
        return reason
    network = config.network()
    piece = Piece(network, sizes_of(config.blocks, config.world), config.rank)
    stage = TwoVersions(piece, config.rank, config.world, micros)
    batch, optimizer = config.data(), config.optimizer(piece.parameters())
    state = torch.empty(config.batch // micros, config.context, config.width, dtype=config.dtype)

    def run(steps: int) -> None:
        stage.run([batch] * steps, optimizer.step, state)

    def check() -> float:
        """Against one process that has the same weights and is late by the same step."""
        run(2)
        run(3)
        alone = config.network()
        x, y = batch
        parameters = list(alone.parameters())
        versions = [[p.detach().clone() for p in parameters]]
        for step in range(5):
            now = [p.detach().clone() for p in parameters]
            for parameter, old in zip(parameters, versions[max(0, step - 1)], strict=True):
                parameter.data.copy_(old)
            found = torch.autograd.grad(loss_of(alone(x), y), parameters)
            for parameter, new, gradient in zip(parameters, now, found, strict=True):
                parameter.data.copy_(new - 0.1 * gradient)
            versions.append([p.detach().clone() for p in parameters])
        own = {id(p) for p in piece.parameters()}
        held = {name: p.detach() for name, p in network.named_parameters() if id(p) in own}
        return difference(held, {name: p.detach() for name, p in alone.named_parameters()}, config)

    return Arm(run, check)


def diloco(config: Config, every: int) -> Arm | str:
    """DiLoCo, whose replicas meet every so many steps."""
    if config.world < 2:
        return "replicas need two processes"
    if config.batch % config.world:
        return f"a batch of {config.batch} cannot be split over {config.world} processes"
    network = config.network()
    x, y = config.share()
    inner = config.optimizer(network.parameters())
    outer = DiLoCo(network.parameters(), every=every)

    def local() -> None:
        inner.zero_grad()
        loss_of(network(x), y).backward()
        inner.step()

    def check() -> float:
        """Replicas that meet after every step, without momentum, take that of plain gradient descent."""
        before = [p.detach().clone() for p in network.parameters()]
        plain = DiLoCo(network.parameters(), every=1, learning_rate=1.0, momentum=0.0)
        local()
        plain.step()
        moved = {
            name: (old - new.detach()) / 0.1
            for old, (name, new) in zip(before, network.named_parameters(), strict=True)
        }
        return difference(moved, exact_gradients(config), config)

    return Arm(repeated(local), check, outer.meet, every)


def local_sizes(blocks: int, stages: int, name: str) -> tuple[int, ...]:
    """Blocks of the stages of a rule, whose readouts are counted in; all blocks count as alike."""
    kinds = {scheme: kind for kind, scheme in SCHEMES.items()}
    return balanced(equal(blocks), stages, 1, kinds[name])


def local_stages(config: Config, name: str, wire: torch.dtype | None = None, **options: Any) -> Arm | str:
    """A stage in every process, which learns by itself."""
    if config.world < 2:
        return "stages need two processes"
    sizes = local_sizes(config.blocks, config.world, name)

    def rule(states: str) -> hbll.Rule:
        return hbll.make_rule(name, config.network(), stage=sizes, states=states, engine="loop", **options)

    worker = Worker(rule("stream"), wire=None if config.plain else wire)  # which rounds, and is checked without
    x, y = config.data()
    optimizer = config.optimizer(worker.parameters())

    def walk() -> None:
        optimizer.zero_grad()
        worker.backward(x, y)

    def step() -> None:
        walk()
        optimizer.step()

    def run(steps: int) -> None:
        for _ in range(steps):
            step()
        worker.drain()  # so that no stage waits to meet one that has ended its steps

    def check() -> float:
        """Against the same stages in one process, one after the other."""
        walk()
        alone = rule("chain").eval()  # which nothing is to average over processes
        alone(x, y).loss.backward()
        own = nn.ModuleList(alone.own(worker.stage))
        exact, found = gradients(own), gradients(worker.module)
        scale = max(gradient.abs().max().item() for gradient in exact.values())
        return max((found[name] - gradient).abs().max().item() for name, gradient in exact.items()) / scale

    return Arm(run, check, sizes=sizes)


ARMS: dict[str, Build] = {
    "bp": backpropagation,
    "bp, two threads": partial(backpropagation, threads=2),
    "DDP": data_parallel,
    **{f"1F1B, m = {m}": partial(torch_pipeline, micros=m) for m in (2, 4, 8)},
    **{f"ZBV, m = {m}": partial(torch_pipeline, micros=m, zero_bubble=True) for m in (2, 4, 8)},
    **{f"2BW, m = {m}": partial(two_versions, micros=m) for m in (2, 4, 8)},
    **{f"DiLoCo, H = {h}": partial(diloco, every=h) for h in (50, 500)},
    "stream": partial(local_stages, name="stream", copies=True),
    "stream, bf16 on the link": partial(local_stages, name="stream", copies=True, wire=torch.bfloat16),
    "solo, R = 16": partial(local_stages, name="solo", refresh=16),
    "greedy": partial(local_stages, name="greedy"),
}
