"""What runs on several processes may be told beside their stages. Oracle: stages in one process, by hand."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from torch.optim import AdamW

from hbll.data.vocabulary import Characters
from hbll.distributed.cost import equal
from hbll.recipes import RECIPES
from hbll.rule import Message
from hbll.train import checkpoint, planning
from hbll.train.feed import Feed
from hbll.train.run import Run, open_run
from hbll.train.start import start_weights

DIGITS = ["train", "digits", "--blocks", 5, "--width", 16, "--train-samples", 300, "--epochs", 2]
GREEDY = [*DIGITS, "--rule", "greedy", "--stage", 2, 3, "--parallel", "stages"]


@pytest.fixture
def hbll(alone, monkeypatch, tmp_path):
    """The same in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return alone


def by_hand(run, wire, model=None):
    """The rule after stages that learn one after the other from every batch, states rounded in between; the network drawn,
    or as it is in a folder."""
    recipe, samples = run.recipe, run.recipe.splits(None).train
    network = recipe.initial_network(run.seed)
    if model:
        network.load(model)
    rule = recipe.rule(run.method, network, samples[:4].inputs)
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


@pytest.mark.parametrize(
    ("method", "options", "blocks", "sizes"),
    [  # of two stages of a and b blocks: 3 a and, as the input of the second is not walked back to, 3 b - 1
        ("greedy", {}, 8, (4, 4)),  # 12 and 11
        ("dgl", {}, 8, (4, 4)),
        ("stream", {}, 8, (3, 5)),  # 9, and a copy of the last block: 12; 14
        ("stream", {}, 7, (3, 4)),
        ("solo", {}, 7, (2, 5)),  # 6, and two blocks: 12; 14; of three it would be 15
        ("stream", {"readout": "solo"}, 7, (2, 5)),
        ("solo", {"readout": "head"}, 8, (4, 4)),
    ],
)
def test_stages_are_cut_by_time_with_what_they_read_by(monkeypatch, method, options, blocks, sizes):
    monkeypatch.setattr(planning, "recipe_costs", lambda recipe, data_dir: equal(blocks))
    recipe = RECIPES["digits"](blocks=blocks, **options)
    assert planning.balanced_stages(recipe, method, None, 2) == sizes


def test_the_cut_by_time_is_the_run_s_from_then_on(launcher, tmp_path):
    folder = tmp_path / "run"
    options = [*DIGITS, "--rule", "greedy", "--parallel", "stages", "--balance", "time", "--run-dir", folder]
    first, second = launcher.run(2, *options, "--epochs", 1)
    assert (first.code, second.code) == (0, 0), (first, second)
    assert second.err == ""
    said = re.search(r"stages by measured time: --stage (\d) (\d)\n", first.err)
    sizes = tuple(map(int, said.groups()))
    assert sum(sizes) == 5
    assert open_run(folder).recipe.stage == sizes
    first, second = launcher.run(2, *options, "--resume")
    assert (first.code, second.code) == (0, 0), (first, second)
    assert "measured" not in first.err
    run = open_run(folder)
    assert run.recipe.stage == sizes
    assert same(weights(run), by_hand(run, torch.float32))


KNOWN = "--balance time knows what stages take by stream, greedy, solo, dgl, predsim, and not by {}: give --stage"
BALANCED = [*DIGITS, "--parallel", "stages", "--balance", "time", "--rule"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([*BALANCED, "stream", "--stage", 2, 3], "give --stage or --balance, not both"),
        ([*BALANCED, "dgl", "--cuts", 2], "give --cuts or --balance, not both"),
        ([*BALANCED, "paper"], KNOWN.format("paper")),
        ([*BALANCED, "cff"], KNOWN.format("cff")),
        (
            ["train", "char-rnn", "--parallel", "stages", "--balance", "time", "--rule", "hbll"],
            KNOWN.format("hbll"),
        ),
        (
            [*BALANCED, "solo", "--readout-depth", 3],
            "--balance time counts readouts of the usual depth: leave out --readout-depth, or give --stage",
        ),
        (
            [*DIGITS, "--rule", "stream", "--balance", "time"],
            "--balance is of stages in processes: leave it out, or give --parallel stages too",
        ),
    ],
)
def test_what_cannot_be_balanced_is_told(hbll, arguments, sentence):
    assert hbll(*arguments) == (2, f"hbll: {sentence}\n")


def test_more_processes_than_blocks_are_told(launcher):
    ended = launcher.run(3, *BALANCED, "greedy", "--blocks", 2)
    sentence = "hbll: 2 blocks cannot be cut into 3 stages: start 2 processes at most\n"
    assert [(one.code, one.err) for one in ended] == [(2, sentence)] * 3


@pytest.fixture(scope="module")
def begun(launcher, tmp_path_factory):
    """A run of two stages that is over."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    ended = launcher.run(2, *GREEDY, "--run-dir", folder)
    assert [one.code for one in ended] == [0, 0], ended
    return folder


def test_another_cut_begins_with_a_saved_network(launcher, begun, tmp_path):
    for number, start in enumerate((begun, begun / "model")):
        folder = tmp_path / str(number)
        first = [*GREEDY, "--stage", 1, 4, "--epochs", 1, "--start-from", start]
        for arguments in (first, ["train", "digits", "--epochs", 2, "--resume"]):
            ended = launcher.run(2, *arguments, "--run-dir", folder)
            assert [one.code for one in ended] == [0, 0], ended
        run = open_run(folder)
        assert run.start_from == start
        assert run.recipe.stage == (1, 4)
        assert same(weights(run), by_hand(run, torch.float32, begun / "model"))


def test_one_process_begins_with_any_saved_network_and_does_not_need_it_again(hbll, begun, tmp_path):
    first, second = shutil.copytree(begun, tmp_path / "first"), tmp_path / "second"
    options = [*DIGITS, "--rule", "bp", "--epochs", 1]
    assert hbll(*options, "--run-dir", second, "--start-from", first)[0] == 0
    shutil.rmtree(first)
    assert hbll("train", "digits", "--epochs", 2, "--resume", "--run-dir", second)[0] == 0
    run = open_run(second)
    recipe, samples = run.recipe, run.recipe.splits(None).train
    network = recipe.initial_network(0)
    network.load(begun / "model")
    optimizer = AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    feed = Feed(run, samples)
    for epoch in range(2):
        for position in range(feed.steps_per_epoch):
            ((x, y),) = feed.batches(feed.order(epoch), epoch, position)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(weights(run)[f"network.{name}"], tensor, rtol=0, atol=1e-5)
    third = tmp_path / "third"  # from a run of one process, which has no model folder
    assert hbll(*options, "--width", 8, "--run-dir", third, "--start-from", second) == (
        2,
        f"hbll: {second} holds another network than this one: embed.weight has shape (16, 64) there and (8, 64) here\n",
    )
    assert hbll(*options, "--run-dir", third, "--start-from", second, "--rule", "paper")[0] == 0
    code, said = hbll("train", "digits", "--resume", "--run-dir", third, "--start-from", begun)
    assert (code, f"was trained with --start-from {second}, not {begun}" in said) == (2, True)


def test_a_network_that_cannot_be_begun_with_is_told_by_all(launcher, begun, tmp_path):
    ended = launcher.run(
        2, *GREEDY, "--blocks", 6, "--stage", 3, 3, "--start-from", begun, "--run-dir", tmp_path / "run"
    )
    said = f"{begun} holds another network than this one: blocks.5."
    assert [(one.code, said in one.err, one.err.count("\n")) for one in ended] == [(2, True, 1)] * 2, ended
    ended = launcher.run(2, *GREEDY, "--start-from", tmp_path / "none", "--run-dir", tmp_path / "run")
    assert [(one.code, one.err.count("\n")) for one in ended] == [(2, 1)] * 2, ended
    assert ended[0].err.startswith(f"hbll: {tmp_path}/none holds neither a run nor a saved network")
    assert not (tmp_path / "run" / "configuration.json").exists()


def test_a_network_of_other_tokens_is_told(tmp_path, monkeypatch):
    recipe = RECIPES["shakespeare-gpt"](blocks=1, width=16)
    other = Run(recipe=recipe, method="bp", seed=0, folder=tmp_path)
    other.write_configuration(torch.device("cpu"), "loop")
    other.vocabulary_file.write_text(Characters("ab").json())
    monkeypatch.setattr(type(recipe), "vocabulary", lambda self, data_dir: Characters("xy"))
    with pytest.raises(ValueError, match="holds a network of other tokens than those of shakespeare-gpt here"):
        start_weights(replace(other, folder=tmp_path / "new", start_from=tmp_path))
    digits = Run(recipe=RECIPES["digits"](), method="bp", seed=0, folder=tmp_path / "new", start_from=tmp_path)
    with pytest.raises(ValueError, match="a network of shakespeare-gpt, not of digits: shakespeare-gpt is of texts"):
        start_weights(digits)
