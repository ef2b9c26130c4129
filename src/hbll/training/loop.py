"""The training loop: steps, epochs, checkpoints, and how a run ends before its time."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from hbll.data import Samples
from hbll.objective import NodeReport
from hbll.protocols import TrainingStep
from hbll.training import checkpoint, metrics
from hbll.training.device import device
from hbll.training.divergence import DivergedError, all_finite, place_in_chain, place_in_loss, place_in_weights
from hbll.training.evaluate import measured
from hbll.training.interrupt import deferred_interrupt
from hbll.training.metrics import Metrics
from hbll.training.run import Run, check_same, open_run
from hbll.training.schedule import scheduler

CHECK_EVERY = 100
"""Steps between two looks at whether the loss is still finite. On a GPU each look waits for the device."""

DIAGNOSED_SAMPLES = 256
"""Training samples, the first ones, on which nodes are diagnosed at the end of an epoch."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after which the run has been saved where it stood and can be resumed."""


def train(
    run: Run,
    *,
    resume: bool = False,
    on_step: Callable[[int, int], None] = lambda done, steps: None,
    on_epoch: Callable[[Metrics], None] = lambda metrics: None,
) -> None:
    """Trains until the recipe's last epoch, saving after each; a resumed run ends as if it had never stopped.

    Args:
        run: what to train, and the folder to keep it in.
        resume: go on with the run that lies in that folder.
        on_step: called before each step with the number of steps done and that of all steps of the run.
        on_epoch: called after each epoch.

    Raises:
        ValueError: the folder holds a run and `resume` is off, or holds none or another one and it is on; the data set
            is missing or damaged; the loss or a weight became NaN or infinite (`DivergedError`: the last good
            checkpoint is kept).
        Interrupted: Ctrl-C was pressed; the run was saved after the step under way.
    """
    if resume:
        check_same(open_run(run.folder), run)
    splits = run.recipe.splits(run.data_dir).to(device())
    training = Training(run, splits.train)
    if resume:
        training.restore()
        metrics.cut(run.metrics_file, training.epoch)
    else:
        run.claim()
        training.save()
    run.write_configuration(device(), training.objective.layout(training.network).engine)
    with deferred_interrupt() as interrupted:
        while training.epoch < run.recipe.epochs:
            for done in training.steps():
                on_step(done, run.recipe.epochs * training.steps_per_epoch)
                if interrupted():
                    training.save()
                    raise Interrupted
            line = training.end_epoch(splits.test)
            metrics.append(run.metrics_file, line)
            training.save()
            on_epoch(line)


@dataclass
class Sums:
    """Over the steps of an epoch so far; a step itself would hold on to its graph."""

    loss: Tensor
    defect: Tensor | None = None
    work: int = 0
    span: int = 0
    seconds: float = 0.0

    def add(self, step: TrainingStep) -> None:
        """Adds a step, but for its seconds."""
        self.loss += step.loss.detach()
        if step.defect is not None:
            self.defect = step.defect if self.defect is None else self.defect + step.defect
        self.work += step.work
        self.span += step.span


class Training:
    """A run under way: all that changes from step to step, and how it does."""

    def __init__(self, run: Run, samples: Samples) -> None:
        recipe = run.recipe
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        self.run = run
        self.samples = samples
        self.network = recipe.initial_network(run.seed).to(device())
        first = samples[: recipe.batch_size].inputs
        self.objective = recipe.objective(run.method).prepare(self.network, first).to(device())
        weights = [*self.network.parameters(), *self.objective.parameters()]
        self.optimizer = torch.optim.AdamW(
            weights, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        self.steps_per_epoch = len(samples) // recipe.batch_size
        self.scheduler = scheduler(recipe.schedule, self.optimizer, recipe.epochs * self.steps_per_epoch)
        self.epoch = 0
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.position = 0
        self.sums = Sums(torch.zeros((), dtype=torch.float64, device=device()))

    def steps(self) -> Iterator[int]:
        """Takes what is left of the epoch's steps; before each, yields the number of steps done since the run began.

        Raises:
            DivergedError: the loss or a weight is no longer finite.
        """
        order = self._order()
        while self.position < self.steps_per_epoch:
            yield self.epoch * self.steps_per_epoch + self.position
            began = time.perf_counter()
            step = self._loss(order)
            self._descend(step.loss)
            self.sums.add(step)
            self.position += 1
            if self.position % CHECK_EVERY == 0 or self.position == self.steps_per_epoch:
                self._check()
            self.sums.seconds += time.perf_counter() - began

    def end_epoch(self, test: Samples) -> Metrics:
        """Measures and diagnoses the network, and makes ready for the next epoch."""
        reports = self._diagnose()
        readouts = self.objective.readouts(self.network)
        paths = measured(self.network, test, readouts, self.run.recipe.measures)
        self.epoch += 1
        sums, steps = self.sums, self.steps_per_epoch
        result = Metrics(
            epoch=self.epoch,
            loss=sums.loss.item() / steps,
            learning_rate=self.learning_rate,
            paths=paths,
            seconds=sums.seconds,
            work=sums.work / steps,
            span=sums.span / steps,
            defect=None if sums.defect is None else sums.defect.item() / steps,
            nodes={str(node): asdict(report) for node, report in reports.items()},
        )
        self._start_epoch()
        return result

    def _diagnose(self) -> dict[int, NodeReport]:
        samples = self.samples[:DIAGNOSED_SAMPLES]
        return self.objective.diagnose(self.network, samples.inputs, samples.labels)

    def save(self) -> None:
        """Replaces the checkpoint by the present state; DivergedError, leaving the old one, when that is no good."""
        self._check()
        state = {
            "network": self.network.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "epoch": self.epoch,
            "position": self.position,
            "sums": vars(self.sums),
        }
        checkpoint.save(self.run.checkpoint_file, state)

    def restore(self) -> None:
        """Goes back to the checkpoint; ValueError when it is missing, damaged or of another version."""
        state = checkpoint.load(self.run.checkpoint_file, device())
        try:
            self._take_up(state)
        except (KeyError, RuntimeError, TypeError) as error:  # a part that is lacking, or of another form
            raise ValueError(
                f"{self.run.checkpoint_file} was made by another version, and this one cannot go on with it: begin a new run"
            ) from error

    def _take_up(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"].cpu())
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all([random.cpu() for random in state["random_cuda"]])
        self.epoch = state["epoch"]
        self.position = state["position"]
        self.sums = Sums(**state["sums"])

    def _order(self) -> Tensor:
        """The order of the epoch's samples: a function of seed and epoch, so that it need not be saved."""
        order = np.random.default_rng([self.run.seed, self.epoch]).permutation(len(self.samples))
        return torch.from_numpy(order).to(device())

    def _loss(self, order: Tensor) -> TrainingStep:
        batch = self._batch(order)
        return self.objective(self.network, batch.inputs, batch.labels)

    def _batch(self, order: Tensor) -> Samples:
        recipe, size = self.run.recipe, self.run.recipe.batch_size
        batch = self.samples[order[self.position * size : (self.position + 1) * size]]
        return Samples(recipe.augment(batch.inputs, self._draw()), batch.labels)

    def _draw(self) -> np.random.Generator:
        """The step's own random numbers for augmentation: the same whatever the method draws, and after resuming."""
        # Counted from 1, because a seed padded with zeros is the same seed: step 0 would draw what its order was drawn by.
        return np.random.default_rng([self.run.seed, self.epoch, 1 + self.position])

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        if (limit := self.run.recipe.gradient_clip) is not None:
            for module in (self.network, self.objective):
                clip_grad_norm_(list(module.parameters()), limit)  # a rule may have none
        self.optimizer.step()
        self.learning_rate = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()

    def _check(self) -> None:
        """DivergedError unless every loss of the epoch and every weight is finite."""
        if self.sums.loss.isfinite() and all_finite(self.network.parameters()):
            return
        raise DivergedError(
            f"the loss or a weight became NaN or infinite {self._divergence()}; the last good checkpoint is "
            f"kept in {self.run.folder}: try a lower --learning-rate"
        )

    def _divergence(self) -> str:
        """When and where: the steps since the checkpoint are taken once more and looked at one by one.

        By the time it is noticed, what began in one node has spread to all.
        """
        again = Training(self.run, self.samples)
        again.restore()
        order = again._order()
        parts = again.objective.layout(again.network).parts
        while again.position < self.position:
            when = f"in step {again.position + 1} of epoch {again.epoch + 1}"
            step = again._loss(order)
            if not step.loss.isfinite():
                return f"{when}, first at {again._place(order, step)}"
            again._descend(step.loss)
            again.position += 1
            if place := place_in_weights(parts):
                return f"{when}, first in the weights of {place}"
        return f"by step {self.position} of epoch {self.epoch + 1}"

    def _place(self, order: Tensor, step: TrainingStep) -> str:
        """Where the loss of the step at hand stopped being finite."""
        layout = self.objective.layout(self.network)
        if layout.walk is None:
            return place_in_chain(layout.parts, self._batch(order).inputs)
        return place_in_loss(layout.walk, step.nodes)
