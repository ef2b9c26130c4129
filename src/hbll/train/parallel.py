"""A run on several processes: a stage each, replicas of stages, or replicas of the whole network.

The processes go through an epoch without waiting for each other; at its end all stages have learned from its last batch,
which is where their checkpoints are cut. The first process has the metrics, and in the end the model.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import clip_grad_norm_

from hbll.carry import own_copy, tensor_bytes
from hbll.data import Samples, Splits
from hbll.distributed import Replica, TreeWorker, Worker
from hbll.distributed.launch import all_say, first_says, wait_for_all
from hbll.distributed.link import lost
from hbll.distributed.tree import check_tree
from hbll.files import write_atomically
from hbll.modes import evaluating
from hbll.recipes import Recipe, flag
from hbll.recipes.base import ChainRecipe
from hbll.rule import Report, Rule, Step
from hbll.rules.tree import Tree
from hbll.train import checkpoint, metrics
from hbll.train.descent import lowered
from hbll.train.device import device
from hbll.train.divergence import LOOK_EVERY, DivergedError, all_finite
from hbll.train.evaluate import OnBatch, PathResult, means, summed, units_of
from hbll.train.feed import Feed
from hbll.train.hold import held
from hbll.train.interrupt import deferred_interrupt
from hbll.train.loop import Sums, is_best, optimizers_of
from hbll.train.metrics import Metrics
from hbll.train.planning import balanced_stages, check_balanced
from hbll.train.run import Parallel, Run, check_folder, check_vocabulary
from hbll.train.schedule import scheduler
from hbll.train.start import first_network, start_weights
from hbll.train.waiting import LostError


def train_parallel(
    run: Run,
    *,
    resume: bool = False,
    on_step: Callable[[int, int], None] = lambda done, steps: None,
    on_batch: OnBatch = lambda done, batches: None,
    on_epoch: Callable[[Metrics], None] = lambda metrics: None,
) -> None:
    """Trains this process's part of a run, of which all processes have been told alike, until the recipe's last epoch.

    Args:
        run: what to train, and the folder where this process keeps its part: one for all, or one for each machine.
        resume: go on with the run that lies in that folder.
        on_step, on_batch, on_epoch: as of `hbll.train.loop.train`; `on_epoch` in the first process alone.

    Raises:
        ValueError: as of `train`; or the rule is not for processes, or for other ones.
        LostError: another process is lost; the sentence names the checkpoint to go on from.
        KeyboardInterrupt: Ctrl-C or SIGTERM, likewise.
    """
    leads = dist.get_rank() == 0
    check_folder(run, resume)
    with deferred_interrupt() as interrupted:
        title, last, began = "", None, 0
        try:
            splits = run.recipe.splits(run.data_dir).to(device()) if leads else None
            task = first_says(splits and Task.of(run, splits, resume))
            part = Part(run, task, splits, interrupted)
            title = f"{part.title}: "
            with held(run.folder) if leads else nullcontext():
                if resume:
                    part.restore()
                else:
                    part.begin()
                last, began = part, part.epoch

                def before_step(done: int) -> None:
                    part.heed()
                    on_step(done, run.recipe.epochs * task.steps)

                while part.epoch < run.recipe.epochs:
                    line = part.go_through_epoch(before_step, on_batch)
                    if line is not None:
                        on_epoch(line)
                part.end()
        except (ConnectionError, KeyboardInterrupt) as error:
            kept = last.kept if last else f"nothing in {run.folder} has changed"
            advice = f": start all processes again with --run-dir {run.folder} --resume" if last or resume else ""
            if isinstance(error, KeyboardInterrupt) or interrupted():
                raise KeyboardInterrupt(f"{title}stopped; {kept}{advice}") from error
            advanced = last is not None and last.epoch > began
            raise LostError(f"{title}{error}; {kept}", advice, run.folder, advanced) from error


def apart(recipe: Recipe, method: str, parallel: Parallel) -> Recipe:
    """The recipe with what a rule needs for stages in processes of their own: of stream, copies."""
    if parallel == "stages" and method == "stream" and isinstance(recipe, ChainRecipe) and recipe.readout != "solo":
        return replace(recipe, copies=True)
    return recipe


def stages_by_time(run: Run) -> tuple[int, ...]:
    """The sizes of stages for a new run, one for every process, as the first one cuts the network by measured time.

    Raises:
        ValueError: the folder holds a run, there are more processes than blocks, or the data set is missing.
        ConnectionError: another process is lost.
    """
    check_folder(run, resume=False)  # before all that is measured
    recipe, stages = check_balanced(run.recipe, run.method), dist.get_world_size()
    if stages > recipe.block_count:
        raise ValueError(
            f"{recipe.block_count} blocks cannot be cut into {stages} stages: start {recipe.block_count} processes at most"
        )
    leads = dist.get_rank() == 0
    return first_says(balanced_stages(recipe, run.method, run.data_dir, stages) if leads else None)


@dataclass(frozen=True)
class Extent:
    """Of samples that only the first stage has."""

    samples: int
    units: Mapping[str, int]

    @classmethod
    def of(cls, samples: Samples) -> "Extent":
        return cls(len(samples), units_of(samples))


@dataclass(frozen=True)
class Task:
    """What all processes know of the run and its data."""

    identity: dict[str, Any]
    """The run's, by the first process."""

    steps: int
    """Of an epoch."""

    example: Any
    """A batch of inputs, on the CPU."""

    test: Extent
    valid: Extent | None

    weights: Mapping[str, Tensor] | None
    """What the network begins with, if they are not drawn."""

    @classmethod
    def of(cls, run: Run, splits: Splits, resume: bool) -> "Task":
        example = splits.train[: run.recipe.batch_size].inputs.cpu()
        valid = Extent.of(splits.valid) if splits.valid else None
        steps = Feed(run, splits.train).steps_per_epoch
        if resume:
            check_vocabulary(run, run.recipe.vocabulary(run.data_dir))
        weights = None if resume else start_weights(run)
        return cls(run.identity, steps, example, Extent.of(splits.test), valid, weights)


@dataclass(frozen=True)
class Place:
    """Where a process stands among all of them; stages and replicas count from 1 and from 0."""

    stage: int
    """Of a tree over processes, the part."""
    stages: int
    replica: int
    replicas: int

    @classmethod
    def of(cls, run: Run, rule: Rule) -> "Place":
        """This process's; ValueError when the rule or the batches are not for so many processes."""
        rank, world = dist.get_rank(), dist.get_world_size()
        stages = 1
        if run.parallel == "stages" and isinstance(rule, Tree):
            check_tree(rule)
            stages = world
            if world > len(rule.stages):
                raise ValueError(
                    f"the tree is of {len(rule.stages)} stages: start as many processes at most, not {world}"
                )
        elif run.parallel == "stages":
            rule.check_apart()
            stages = len(rule.stages)
        if world % stages:
            raise ValueError(
                f"the network is cut into {stages} stages, and there are {world} processes: start {stages}, or a multiple, "
                "or begin a run with another --stage"
            )
        replicas = world // stages
        if run.recipe.batch_size % replicas:
            raise ValueError(
                f"--batch-size {run.recipe.batch_size} is of all replicas together, and {replicas} cannot share it evenly"
            )
        return cls(rank // replicas + 1, stages, rank % replicas, replicas)

    @property
    def leads(self) -> bool:
        """Whether it is the first process."""
        return self.stage == 1 and self.replica == 0


@dataclass(frozen=True)
class Said:
    """What a process tells the first one of an epoch."""

    stage: int
    loss: float
    work: int
    span: int
    defect: float | None
    """Sums over the epoch's steps, but for the span, which is the longest."""
    seconds: float
    test: Tensor
    valid: Tensor
    """Sums of the measures."""
    carry: Any
    """What a replica of the whole network keeps."""


def carry_of(run: Run, carries: Sequence[Any], replica: int, replicas: int) -> Any:
    """What a replica takes up of what those before have kept; ValueError when it cannot be shared out again."""
    if len(carries) == replicas:
        return carries[replica]
    if any(map(tensor_bytes, carries)):
        raise ValueError(
            f"{run.folder} is of {len(carries)} replicas, each of which keeps batches of its own from step to step: start "
            f"{len(carries)} processes, not {replicas}"
        )
    return carries[0]


def draw_anew(*place: int) -> None:
    """Begins the random numbers of a seed, an epoch, a stage and a replica."""
    torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))


class Part:
    """A process's part of a run under way."""

    def __init__(self, run: Run, task: Task, splits: Splits | None, interrupted: Callable[[], bool]) -> None:
        recipe = run.recipe
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        self.run, self.task, self._interrupted = run, task, interrupted
        for option, value in run.identity.items():
            if value != task.identity[option]:
                raise ValueError(
                    f"{flag(option)} is {value} in this process and {task.identity[option]} in the first one: start all "
                    "alike"
                )
        network = first_network(run, task.weights).to(device())
        rule = recipe.rule(run.method, network, task.example.to(device())).to(device())
        self.chain = recipe.readouts(rule)[0]
        self.place = place = Place.of(run, rule)
        with lost("another process"):
            if run.parallel == "stages":
                names = ("stage", "data")
                mesh = init_device_mesh(device().type, (place.stages, place.replicas), mesh_dim_names=names)
                wire = torch.bfloat16 if run.wire == "bfloat16" else None
                self.worker: Worker | TreeWorker | Replica = (
                    TreeWorker(rule, mesh, wire=wire) if isinstance(rule, Tree) else Worker(rule, mesh, wire=wire)
                )
                self._siblings = mesh.get_group("data")
            else:
                self.worker = Replica(rule)
                self._siblings = None
        reads = place.stage == 1 or (
            isinstance(rule, Tree) and place.stage == place.stages
        )  # labels do not travel there
        if reads and splits is None:
            splits = recipe.splits(run.data_dir).to(device())
        self.splits = splits
        """What the process reads."""
        self.feed = Feed(run, splits.train) if splits else None
        self.optimizers = optimizers_of(recipe, rule, self.worker.parameters())
        steps = recipe.epochs * task.steps
        self.schedules = [scheduler(recipe.schedule, optimizer, steps) for optimizer in self.optimizers]
        self.epoch = 0
        self.file, self.file_before = run.stage_files(place.stage)

    @property
    def title(self) -> str:
        """What errors call the process."""
        replica = f"replica {self.place.replica + 1}"
        if isinstance(self.worker, Replica):
            return replica
        stage = self.worker.title(self.worker.place)
        return f"{stage}, {replica}" if self.place.replicas > 1 else stage

    @property
    def kept(self) -> str:
        """The checkpoint to go on from, for people."""
        return f"its checkpoint {self.file} has seen {self.epoch} epochs"

    def begin(self) -> None:
        """Makes the folder that of a run."""
        check_folder(self.run, resume=False)  # again: another process may have come first
        self.run.folder.mkdir(parents=True, exist_ok=True)
        if self.place.replica == 0:
            for file in (self.file, self.file_before):  # of a beginning that came to nothing
                file.unlink(missing_ok=True)
            self.save([self.worker.carry()])
        if self.place.leads and (vocabulary := self.run.recipe.vocabulary(self.run.data_dir)) is not None:
            write_atomically(self.run.vocabulary_file, vocabulary.json())
        self._write_configuration()

    def _write_configuration(self) -> None:
        """Says in every process's folder what is run: one after the other, as they may have one, and the first one last."""
        for rank in reversed(range(dist.get_world_size())):
            wait_for_all()
            if rank == dist.get_rank():
                self.run.write_configuration(device(), "loop")

    def go_through_epoch(self, before_step: Callable[[int], None], on_batch: OnBatch) -> Metrics | None:
        """Learns, measures and saves; the line of the epoch in the first process.

        Args:
            before_step: called before each step with the number of steps done since the run began.
            on_batch: called after each batch that this process has predicted, as by `measured`.
        """
        self._keep_best()  # for which all wait
        began = time.perf_counter()
        sums = self._learn(before_step)
        seconds = time.perf_counter() - began
        self.worker.drain()
        if not self.place.leads:
            self.epoch += 1
            if self.place.replica == 0:
                self.save([self.worker.carry()])
        splits = self.splits
        test = self._measured(splits.test if splits else None, self.task.test, on_batch)
        valid = torch.zeros(0)
        if self.task.valid:
            valid = self._measured(splits.valid if splits else None, self.task.valid, on_batch)
        carry = self.worker.carry() if isinstance(self.worker, Replica) else None
        defect = None if sums.defect is None else sums.defect.item()
        said: list[Said] = all_say(
            Said(self.place.stage, sums.loss.item(), sums.work, sums.span, defect, seconds, test, valid, carry)
        )
        if not self.place.leads:
            return None
        self.epoch += 1
        line = self._line(said)
        metrics.append(self.run.metrics_file, line)
        # After the line, which all that have seen the epoch are to have.
        self.save([one.carry for one in said] if isinstance(self.worker, Replica) else [self.worker.carry()])
        return line

    def end(self) -> None:
        """Ends the links, and puts the stages together in the first process, which writes them into its folder."""
        self._keep_best()
        self.worker.close()
        self._gather(self.run.checkpoint_file, self.epoch)
        if self.place.leads:
            self.worker.rule.network.save(self.run.model_folder)
        best, epoch = self.run.best_stage_file(self.place.stage), 0
        if self.task.valid and first_says(best.exists()):
            if self.place.replica == 0:
                stored = self.run.load_checkpoint(file=best)
                self.worker.module.load_state_dict(stored["module"])
                epoch = stored["epoch"]
            self._gather(self.run.best_file, epoch)
        wait_for_all()  # until all is written: who has ended cannot wait for the first process

    def _gather(self, file: Path, epoch: int) -> None:
        """Writes the weights of all stages, as they were after an epoch, into a file of the first process."""
        self.worker.gather()
        wait_for_all()
        if self.place.leads:
            checkpoint.save(file, {"run": self.run.mark, "rule": self.worker.rule.state_dict(), "epoch": epoch})

    def heed(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C or SIGTERM has come."""
        if self._interrupted():
            raise KeyboardInterrupt

    def _keep_best(self) -> None:
        """Keeps the stage as it is if it was never better by the validation samples."""
        lines = metrics.read(self.run.metrics_file) if self.place.leads else []
        best = first_says(bool(lines) and is_best(lines[-1], lines[:-1], self.run.recipe.measures[0]))
        if best and self.place.replica == 0:
            state = {"run": self.run.mark, "module": self.worker.module.state_dict(), "epoch": self.epoch}
            checkpoint.save(self.run.best_stage_file(self.place.stage), state)

    def save(self, carries: Sequence[Any]) -> None:
        """Keeps the stage as it is now, and as it was an epoch before.

        Args:
            carries: what its replicas keep from step to step; one of it where it is the same for all.
        """
        if self.file.exists():
            self.file.replace(self.file_before)
        state = {
            "run": self.run.mark,
            "stage": self.place.stage,
            "stages": self.place.stages,
            "epoch": self.epoch,
            "metrics": metrics.digest(self.run.metrics_file) if self.place.leads else None,
            "module": self.worker.module.state_dict(),
            "carries": carries,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self.schedules],
        }
        checkpoint.save(self.file, state)

    def restore(self) -> None:
        """Goes back to the newest epoch that all stages have seen; ValueError when there is none, or not for this run."""
        place = self.place
        found = self.run.stage_checkpoints(place.stage, place.stages) if place.replica == 0 else {}
        known = [
            set(epochs) for epochs in all_say(list(found) if self.place.replica == 0 else None) if epochs is not None
        ]
        if not (common := set.intersection(*known)):
            raise ValueError(f"{self.run.folder}: the stages' checkpoints have no epoch in common: begin a new run")
        self.epoch = max(common)
        if self.place.replica == 0:
            file, state = found[self.epoch]
            file.replace(self.file)  # of one that is ahead of others nothing stays
        else:
            state = None
        if self.place.replicas > 1:
            said = [state]
            with lost("a replica of this stage"):
                dist.broadcast_object_list(said, (self.place.stage - 1) * self.place.replicas, group=self._siblings)
            state = said[0]
        with checkpoint.understood(self.file):
            state = own_copy(state)  # tensors in a file's memory lie unaligned, on which kernels round otherwise
            self.worker.module.load_state_dict(state["module"])
            self.worker.load_carry(carry_of(self.run, state["carries"], place.replica, place.replicas))
            for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(stored)
            for schedule, stored in zip(self.schedules, state["schedules"], strict=True):
                schedule.load_state_dict(stored)
        if self.place.leads:
            metrics.cut(self.run.metrics_file, self.epoch, state["metrics"])
            if self.epoch < self.run.recipe.epochs:  # what was gathered before falls behind what the stages have
                for file in (self.run.checkpoint_file, self.run.best_file):
                    file.unlink(missing_ok=True)
        self._write_configuration()  # which may have been of fewer epochs

    def _learn(self, before_step: Callable[[int], None]) -> Sums:
        """Takes the steps of an epoch."""
        # What is drawn is a function of seed, epoch and place, so that it need not be saved.
        draw_anew(self.run.seed, self.epoch, self.place.stage, self.place.replica)
        sums = Sums(torch.zeros((), dtype=torch.float64, device=device()))
        order = self.feed.order(self.epoch) if self.feed else None
        for position in range(self.task.steps):
            before_step(self.epoch * self.task.steps + position)
            self.learning_rate = self.optimizers[0].param_groups[0]["lr"]
            sums.add(self._step(order, position))
            if (position + 1) % LOOK_EVERY == 0 or position + 1 == self.task.steps:
                self._check(sums)
        return sums

    def _step(self, order: Tensor | None, position: int) -> list[Step]:
        """A training step on this replica's share of its batches."""
        recipe = self.run.recipe
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with lowered(recipe.precision, device()):
            steps = [
                self.worker.backward(x, y, 1 / recipe.accumulate, average=number == recipe.accumulate)
                for number, (x, y) in enumerate(self._shares(order, position), 1)
            ]
        if recipe.gradient_clip is not None:
            for parameters in self._clipped():
                clip_grad_norm_(parameters, recipe.gradient_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        for schedule in self.schedules:
            schedule.step()
        return steps

    def _shares(self, order: Tensor | None, position: int) -> list[tuple[Any, Any]]:
        """Of the batches of a step; to later stages they come by links."""
        if self.feed is None or order is None:
            return [(None, None)] * self.run.recipe.accumulate
        size = self.run.recipe.batch_size // self.place.replicas
        mine = slice(self.place.replica * size, (self.place.replica + 1) * size)
        return [(x[mine], y[mine]) for x, y in self.feed.batches(order, self.epoch, position)]

    def _clipped(self) -> list[list[nn.Parameter]]:
        """Parameters whose gradients are cut down together: of the network, and beside it."""
        network = set(self.worker.rule.network.parameters())
        mine = list(self.worker.parameters())
        return [[p for p in mine if p in network], [p for p in mine if p not in network]]

    def _check(self, sums: Sums) -> None:
        """DivergedError unless every loss of the epoch and every weight is finite."""
        if sums.loss.isfinite() and all_finite(self.worker.parameters()):
            return
        step = (self.epoch + 1) * self.task.steps
        raise DivergedError(
            f"{self.title}: the loss or a weight became NaN or infinite in epoch {self.epoch + 1}; the checkpoint "
            f"{self.file} has seen {self.epoch} epochs: try a lower --learning-rate",
            step,
        )

    def _measured(self, samples: Samples | None, extent: Extent, on_batch: OnBatch) -> Tensor:
        """The sums of the measures over this replica's share of some samples, at the last stage; 0 at others."""
        with evaluating(self.worker.rule):
            return summed(self._predictions(samples, extent, on_batch), self.run.recipe.measures).cpu()

    def _predictions(
        self, samples: Samples | None, extent: Extent, on_batch: OnBatch
    ) -> Iterator[tuple[Tensor, Tensor]]:
        # No larger than what was learned from, by which links were sized; halved where states had half the precision.
        size = self.run.recipe.batch_size // self.place.replicas
        if self.run.recipe.precision != "float32":
            size = max(1, size // 2)
        starts = range(self.place.replica * size, extent.samples, self.place.replicas * size)
        for done, start in enumerate(starts, 1):
            self.heed()
            part = samples[start : start + size] if samples else None
            found = self.worker.predict(part and part.inputs, part and part.labels)
            on_batch(done, len(starts))
            if found is not None:
                yield found

    def _line(self, said: Sequence[Said]) -> Metrics:
        """What the epoch came to by what the processes say."""
        steps, replicas, measures = self.task.steps, self.place.replicas, self.run.recipe.measures
        losses: dict[int, float] = {}
        for one in said:
            losses[one.stage] = losses.get(one.stage, 0.0) + one.loss / steps / replicas
        defects = [one.defect for one in said if one.defect is not None]

        def result(extent: Extent, sums: Sequence[Tensor]) -> PathResult:
            found = means(torch.stack(list(sums)).sum(0), measures, extent.units)
            return {"path": self.chain.name, "blocks": self.chain.blocks, **found}

        last = [one for one in said if one.stage == self.place.stages]
        by_stage = isinstance(self.worker, Worker)
        return Metrics(
            epoch=self.epoch,
            loss=sum(losses.values()),
            learning_rate=self.learning_rate,
            paths=[result(self.task.test, [one.test for one in last])],
            validation=result(self.task.valid, [one.valid for one in last]) if self.task.valid else None,
            seconds=max(one.seconds for one in said),
            work=sum(one.work for one in said) / steps / replicas,
            span=max(one.span for one in said) / steps,
            defect=sum(defects) / steps / replicas if defects else None,
            nodes={str(n): asdict(Report(error=loss)) for n, loss in losses.items()} if by_stage else {},
        )
