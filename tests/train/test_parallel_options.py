"""What runs on several processes may be told beside their stages. Oracle: stages in one process, by hand."""

import pytest
import torch
from tests.training import Launcher
from torch.optim import AdamW

from hbll import cli
from hbll.rule import Message
from hbll.train import checkpoint, metrics
from hbll.train.feed import Feed
from hbll.train.run import open_run

DIGITS = ["train", "digits", "--blocks", 5, "--width", 16, "--train-samples", 300, "--epochs", 2]
GREEDY = [*DIGITS, "--rule", "greedy", "--stage", 2, 3, "--parallel", "stages"]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    found = Launcher(tmp_path_factory.mktemp("processes"))
    yield found
    found.end()


@pytest.fixture
def hbll(capsys, monkeypatch, tmp_path):
    """Runs a command in this process, where no launcher says anything: its exit code, and what it wrote on stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments):
        code = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return run


def by_hand(run, wire):
    """The rule after stages that learn one after the other from every batch, states rounded in between."""
    recipe, samples = run.recipe, run.recipe.splits(None).train
    rule = recipe.rule(run.method, recipe.initial_network(run.seed), samples[:4].inputs)
    feed = Feed(run, samples)
    optimizers = [
        AdamW(
            [p for module in rule.own(n) for p in module.parameters()],
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        for n in range(1, len(rule.stages) + 1)
    ]
    for epoch in range(recipe.epochs):
        order = feed.order(epoch)
        for position in range(feed.steps_per_epoch):
            ((x, y),) = feed.batches(order, epoch, position)
            given = [Message(x, y, {})]
            for n, optimizer in enumerate(optimizers, 1):
                optimizer.zero_grad()
                rule.stage_backward(n, given.pop(), given.append)
                if given:
                    given = [Message(given[0].state.to(wire).float(), given[0].labels, given[0].context)]
                optimizer.step()
    return rule.state_dict()


def weights(run):
    return checkpoint.load(run.checkpoint_file)["rule"]


def same(found, expected):
    return found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)


def test_states_are_rounded_on_the_wire_and_a_resumed_run_keeps_it(launcher, tmp_path):
    folder = tmp_path / "run"
    for ending in ([*GREEDY, "--epochs", 1, "--wire", "bfloat16"], ["train", "digits", "--epochs", 2, "--resume"]):
        ended = launcher.run(2, *ending, "--run-dir", folder)
        assert [one.code for one in ended] == [0, 0], ended
    run = open_run(folder)
    assert run.wire == "bfloat16"
    assert same(weights(run), by_hand(run, torch.bfloat16))
    assert not same(weights(run), by_hand(run, torch.float32))  # else rounding could not be told
    ended = launcher.run(2, "train", "digits", "--epochs", 3, "--wire", "float32", "--resume", "--run-dir", folder)
    said = "was trained with --wire bfloat16, not float32: a run is resumed as it was begun"
    assert [(one.code, said in one.err) for one in ended] == [(2, True)] * 2


def test_a_wire_is_of_stages(hbll, launcher):
    sentence = "hbll: --wire is of the links between stages: leave it out, or give --parallel stages too\n"
    assert hbll(*DIGITS, "--wire", "bfloat16") == (2, sentence)
    ended = launcher.run(2, *DIGITS, "--parallel", "data", "--wire", "bfloat16")
    assert [(one.code, one.err) for one in ended] == [(2, sentence)] * 2
