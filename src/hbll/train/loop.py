"""The training loop: steps, epochs, checkpoints, and how a run ends before its time."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hbll.data import Samples, Splits
from hbll.files import write_atomically
from hbll.modes import evaluating
from hbll.recipes import Measure, Recipe
from hbll.rule import Rule, Step
from hbll.rules.composed import Composed
from hbll.train import checkpoint, metrics
from hbll.train.descent import Descent
from hbll.train.device import device
from hbll.train.divergence import LOOK_EVERY, DivergedError, all_finite, place_in_step, place_in_weights
from hbll.train.evaluate import OnBatch, measured
from hbll.train.feed import Feed
from hbll.train.hold import held
from hbll.train.interrupt import deferred_interrupt
from hbll.train.metrics import Metrics
from hbll.train.optimizers import make_optimizers
from hbll.train.run import Run, check_folder, check_vocabulary
from hbll.train.schedule import scheduler
from hbll.train.start import first_network, start_weights

DIAGNOSED_SAMPLES = 256
"""Training samples, the first ones, on which stages are diagnosed at the end of an epoch; no more than a batch has."""


SAVE_EVERY = 600.0
"""Seconds after which a run is saved in the middle of an epoch, too: no more is lost to what comes without warning."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after which the run has been saved where it stood and can be resumed."""


def train(
    run: Run,
    *,
    resume: bool = False,
    on_step: Callable[[int, int], None] = lambda done, steps: None,
    on_batch: OnBatch = lambda done, batches: None,
    on_epoch: Callable[[Metrics], None] = lambda metrics: None,
) -> None:
    """Trains until the recipe's last epoch, saving after each, and in long ones every ten minutes; a resumed run ends as if
    it had never stopped.

    Args:
        run: what to train, and the folder to keep it in.
        resume: go on with the run that lies in that folder.
        on_step: called before each step with the number of steps done and that of all steps of the run.
        on_batch: as of `measured`, of the test samples and of the validation samples at the end of each epoch.
        on_epoch: called after each epoch.

    Raises:
        ValueError: the folder holds a run and `resume` is off, or holds none or another one and it is on; another process
            trains in it; the data set is missing, or it or the folder damaged; the loss or a weight became NaN or infinite
            (`DivergedError`: the last good checkpoint is kept).
        Interrupted: Ctrl-C was pressed, or SIGTERM sent; the run was saved after the step under way, or before an epoch's
            measures were taken.
    """

    check_folder(run, resume)
    splits = run.recipe.splits(run.data_dir).to(device())
    vocabulary = run.recipe.vocabulary(run.data_dir)
    training = Training(run, splits.train, None if resume else start_weights(run))
    with held(run.folder), deferred_interrupt() as interrupted:
        check_folder(run, resume)  # again: another process may have come first
        if resume:
            check_vocabulary(run, vocabulary)
            metrics.cut(run.metrics_file, *training.restore())
        else:
            if vocabulary is not None:
                write_atomically(run.vocabulary_file, vocabulary.json())
            training.save()
        run.write_configuration(device(), training.engine)

        def heed() -> None:
            if interrupted():
                training.save()
                raise Interrupted

        def before_step(done: int) -> None:
            on_step(done, run.recipe.epochs * training.steps_per_epoch)
            heed()
            if time.monotonic() - training.saved_at > SAVE_EVERY:
                training.save()

        def after_batch(done: int, batches: int) -> None:
            on_batch(done, batches)
            heed()

        while training.epoch < run.recipe.epochs:
            training.go_on(before_step)
            line = training.end_epoch(splits, after_batch)
            if is_best(line, metrics.read(run.metrics_file), run.recipe.measures[0]):
                training.save_best()
            metrics.append(run.metrics_file, line)
            training.save()
            on_epoch(line)
        if run.model_folder.exists():  # of a run that several processes began
            training.rule.network.save(run.model_folder)
        if interrupted():  # in the last evaluation: of a comparison the next run is not to begin
            raise Interrupted


def is_best(line: Metrics, before: Sequence[Metrics], measure: Measure) -> bool:
    """Whether the validation samples, if there are any, were measured better than after any epoch before."""
    if line.validation is None:
        return False
    value = line.validation[measure.name]
    earlier = [known.validation[measure.name] for known in before if known.validation]
    finite = [known for known in earlier if known is not None]
    return value is not None and value not in finite and measure.best([value, *finite]) == value


def optimizers_of(recipe: Recipe, rule: Rule, parameters: Iterable[nn.Parameter] | None = None) -> list[Optimizer]:
    """What moves the parameters of a rule, or those of a stage, as a recipe says."""
    return make_optimizers(
        rule,
        recipe.optimizer,
        recipe.learning_rate,
        recipe.weight_decay,
        error_feedback=recipe.error_feedback,
        parameters=parameters,
    )


@dataclass
class Sums:
    """Over the steps of an epoch so far."""

    loss: Tensor
    defect: Tensor | None = None
    work: int = 0
    span: int = 0
    seconds: float = 0.0
    learning_rate: float = 0.0
    """Of the last step."""

    def add(self, steps: Sequence[Step]) -> None:
        """Adds a training step on some batches, but for its seconds: their mean loss and defect, all their work and span."""
        for step in steps:
            self.loss += step.loss.detach() / len(steps)
            if step.defect is not None:
                defect = step.defect / len(steps)
                self.defect = defect if self.defect is None else self.defect + defect
            self.work += step.work
            self.span += step.span


class Training:
    """A run under way: all that changes from step to step, and how it does.

    Args:
        run: what is trained.
        samples: to learn from.
        weights: that the network begins with, if they are not drawn.
    """

    def __init__(self, run: Run, samples: Samples, weights: Mapping[str, Tensor] | None = None) -> None:
        recipe = run.recipe
        if recipe.threads is not None:
            torch.set_num_threads(recipe.threads)
        self.run = run
        self.samples = samples
        network = first_network(run, weights).to(device())
        self.rule = recipe.rule(run.method, network, samples[: recipe.batch_size].inputs).to(device())
        optimizers = optimizers_of(recipe, self.rule)
        self.feed = Feed(run, samples)
        self.steps_per_epoch = self.feed.steps_per_epoch
        steps = recipe.epochs * self.steps_per_epoch
        schedules = [scheduler(recipe.schedule, optimizer, steps) for optimizer in optimizers]
        self.descent = Descent(
            self.rule, optimizers, precision=recipe.precision, clip=recipe.gradient_clip, schedule=schedules
        )
        self.epoch = 0
        self.saved_at = time.monotonic()
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.position = 0
        self.sums = Sums(torch.zeros((), dtype=torch.float64, device=device()))

    @property
    def engine(self) -> str:
        """How stages are evaluated: `loop` or `batched`."""
        if not isinstance(self.rule, Composed):
            return "loop"
        with evaluating(self.rule.network), torch.no_grad():
            state, _ = self.rule.network.embedded(self.samples[: self.run.recipe.batch_size].inputs)
        return self.rule.evaluated.engine.name(state)

    def go_on(self, before_step: Callable[[int], None] = lambda done: None) -> None:
        """Takes what is left of the epoch's steps.

        Args:
            before_step: called before each with the number of steps done since the run began.

        Raises:
            DivergedError: the loss or a weight is no longer finite.
        """
        # Batches stay in flight at the end: a run that is taken up for more epochs goes on as if it had never stopped.
        order = self.feed.order(self.epoch)
        while self.position < self.steps_per_epoch:
            before_step(self.epoch * self.steps_per_epoch + self.position)
            began = time.perf_counter()
            self.sums.learning_rate = self.descent.optimizers[0].param_groups[0]["lr"]
            self.sums.add(self.descent.step(*self.feed.batches(order, self.epoch, self.position)))
            self.position += 1
            if self.position % LOOK_EVERY == 0 or self.position == self.steps_per_epoch:
                self._check()
            self.sums.seconds += time.perf_counter() - began

    def end_epoch(self, splits: Splits, on_batch: OnBatch) -> Metrics:
        """Measures and diagnoses the network, and makes ready for the next epoch.

        Args:
            splits: to measure on.
            on_batch: as of `measured`; nothing has changed by then, so that it may save and end the run.
        """
        recipe = self.run.recipe
        readouts = recipe.readouts(self.rule)
        paths = measured(self.rule, splits.test, readouts, recipe.measures, on_batch)
        validation = None
        if splits.valid:
            (validation,) = measured(self.rule, splits.valid, readouts[:1], recipe.measures, on_batch)
        samples = self.samples[: min(DIAGNOSED_SAMPLES, recipe.batch_size)]
        reports = self.rule.diagnose(samples.inputs, samples.labels)
        self.epoch += 1
        sums, steps = self.sums, self.steps_per_epoch
        result = Metrics(
            epoch=self.epoch,
            loss=sums.loss.item() / steps,
            learning_rate=sums.learning_rate,
            paths=paths,
            validation=validation,
            seconds=sums.seconds,
            work=sums.work / steps,
            span=sums.span / steps,
            defect=None if sums.defect is None else sums.defect.item() / steps,
            nodes={str(stage): asdict(report) for stage, report in reports.items()},
        )
        self._start_epoch()
        return result

    def save(self) -> None:
        """Replaces the checkpoint by the present state; DivergedError, leaving the old one, when that is no good."""
        self._check()
        state = {
            "run": self.run.mark,
            "metrics": metrics.digest(self.run.metrics_file),
            "rule": self.rule.state_dict(),
            "carry": self.rule.carry(),
            "descent": self.descent.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "epoch": self.epoch,
            "position": self.position,
            "sums": vars(self.sums),
        }
        checkpoint.save(self.run.checkpoint_file, state)
        self.saved_at = time.monotonic()

    def save_best(self) -> None:
        """Keeps the present weights as the best by the validation samples."""
        state = {"run": self.run.mark, "rule": self.rule.state_dict(), "epoch": self.epoch}
        checkpoint.save(self.run.best_file, state)

    def restore(self) -> tuple[int, str]:
        """Goes back to the checkpoint; ValueError when it is missing, damaged, or of another version or run.

        Returns:
            The epochs done, and the digest of their metrics.
        """
        state = self.run.load_checkpoint(device())
        with checkpoint.understood(self.run.checkpoint_file):
            self.rule.load_state_dict(state["rule"])
            self.rule.load_carry(state["carry"])
            self.descent.load_state_dict(state["descent"])
            torch.set_rng_state(state["random"].cpu())
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all([random.cpu() for random in state["random_cuda"]])
            self.epoch = state["epoch"]
            self.position = state["position"]
            self.sums = Sums(**state["sums"])
            return self.epoch, state["metrics"]

    def _check(self) -> None:
        """DivergedError unless every loss of the epoch and every weight is finite."""
        if self.sums.loss.isfinite() and all_finite(self.rule.network.parameters()):
            return
        step, where = self._divergence()
        raise DivergedError(
            f"the loss or a weight became NaN or infinite {where}; the last good checkpoint is "
            f"kept in {self.run.folder}: try a lower --learning-rate",
            step,
        )

    def _divergence(self) -> tuple[int, str]:
        """In which step of the run, and where: the steps since the checkpoint are taken once more and looked at one by one.

        By the time it is noticed, what began in one stage has spread to all.
        """
        again = Training(self.run, self.samples)
        again.restore()
        order = self.feed.order(again.epoch)
        while again.position < self.position:
            step = again.epoch * self.steps_per_epoch + again.position + 1
            when = f"in step {again.position + 1} of epoch {again.epoch + 1}"
            batches = self.feed.batches(order, again.epoch, again.position)
            for batch in batches:
                if place := place_in_step(again.rule, *batch):
                    return step, f"{when}, first at {place}"
            again.descent.step(*batches)
            again.position += 1
            if place := place_in_weights(again.rule):
                return step, f"{when}, first in the weights of {place}"
        done = self.epoch * self.steps_per_epoch + self.position
        return done, f"by step {self.position} of epoch {self.epoch + 1}"
