"""Engines. Oracle: calling the blocks one by one, with autograd."""

import itertools
import random
import secrets
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hbll.engine
from hbll import Chain, make_rule
from hbll.engine import LoopEngine, make_engine

WIDTH, BATCH, CLASSES = 4, 3, 3
BLOCKS = 7


class Dense(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, state):
        return torch.tanh(self.linear(state))


class StraightThrough(Dense):
    """Binary units with the gradient of their inputs."""

    def forward(self, state):
        hidden = self.linear(state)
        return hidden + (torch.sign(hidden) - hidden).detach()


class WithoutGradient(Dense):
    """A norm that the gradient does not see."""

    def forward(self, state):
        hidden = self.linear(state)
        with torch.no_grad():
            scale = hidden.norm(dim=-1, keepdim=True)
        return hidden / scale


class Sign(torch.autograd.Function):
    """The sign, with a backward of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.sign(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() < 1)


class OwnBackward(Dense):
    def forward(self, state):
        return Sign.apply(self.linear(state))


class InPlace(Dense):
    def forward(self, state):
        return F.relu(self.linear(state).mul_(2.0).add_(state), inplace=True)


class Tied(nn.Module):
    """Encoder and decoder with one matrix."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.down.weight = self.up.weight

    def forward(self, state):
        return self.down(torch.tanh(self.up(state)))


class Captured(Dense):
    """Uses a module of somebody else's beside its own."""

    common = nn.Linear(WIDTH, WIDTH).double()

    def __init__(self):
        super().__init__()
        self.others = (Captured.common,)

    def forward(self, state):
        return super().forward(state) + self.others[0](state)


class Constants(Dense):
    def __init__(self, taps):
        super().__init__()
        self.taps = taps

    def forward(self, state):
        return super().forward(state) * float(self.taps[0].sum())


class Branch(Dense):
    """Decides by values, which no batched call can."""

    def forward(self, state):
        return super().forward(state) if state.sum() > 0 else -super().forward(state)


def network(make, blocks=BLOCKS, seed=0):
    torch.manual_seed(seed)
    made = [make() for _ in range(blocks)]
    net = Chain(nn.Linear(WIDTH, WIDTH), made, nn.Linear(WIDTH, CLASSES)).double()
    return net, torch.randn(BATCH, WIDTH, dtype=torch.float64), torch.arange(BATCH) % CLASSES


def engine_of(net):
    """The batched engine by which a rule evaluates the stages of a network."""
    return make_rule("tree", net, engine="batched").evaluated.engine


def stepped(rule, x, y):
    """A step, and the gradients that it leaves."""
    rule.zero_grad()
    step = rule(x, y)
    step.loss.backward()
    return step, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in rule.named_parameters()}


def assert_engines_agree(net, x, y, **options):
    loop, expected = stepped(make_rule("paper", net, engine="loop", **options), x, y)
    batched, actual = stepped(make_rule("paper", net, engine="batched", **options), x, y)
    assert (loop.engine, batched.engine) == ("loop", "batched")
    torch.testing.assert_close(batched.loss, loop.loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-12)
    assert max(g.abs().max() for g in expected.values()) > 0


@pytest.mark.parametrize("make", [StraightThrough, WithoutGradient, OwnBackward, InPlace, Tied, Captured])
def test_blocks_of_unusual_gradients(make):
    assert_engines_agree(*network(make))


def test_captured_modules_are_trained_by_both_engines():
    net, x, y = network(Captured)
    found = []
    for engine in ("loop", "batched"):
        Captured.common.zero_grad()
        make_rule("paper", net, engine=engine).backward(x, y)
        found.append(Captured.common.weight.grad.clone())
    torch.testing.assert_close(*found)
    assert found[0].abs().max() > 0


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("training", [True, False])
def test_torchs_own_transformer_layer(training):
    def make():
        return nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True)

    net, *_ = network(make, 3)
    x = torch.randn(BATCH, 5, WIDTH, dtype=torch.float64)
    assert_engines_agree(net.train(training), x, torch.randint(CLASSES, (BATCH, 5)))


def test_architectures_are_grouped():
    def kinds():
        yield from (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))
        yield from (Dense() for _ in range(4))
        yield from (nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(4))
        yield nn.Identity()
        yield nn.LayerNorm(WIDTH, eps=1e-3)
        yield nn.LayerNorm(WIDTH, eps=1e-5)

    made = kinds()
    net, x, y = network(lambda: next(made), 15)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0)).tolist()
    net.blocks = nn.ModuleList(net.blocks[i] for i in order)
    assert_engines_agree(net, x, y)
    engine = engine_of(net)
    positions = {old: new + 1 for new, old in enumerate(order)}
    expected = [
        {positions[i] for i in group} for group in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12], [13], [14])
    ]
    groups = [set(group) for group in engine.groups(range(1, 16), [x] * 15)]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, expected))


def hooked():
    block = Dense()
    block.linear.register_forward_hook(lambda module, args, output: output * 2)
    return block


UNSTACKABLE = {
    "buffers": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)),
    "hooks": hooked,
    "tensor attributes": lambda: Constants(torch.ones(2)),
    "lists of tensors": lambda: Constants([torch.ones(3), torch.zeros(2)]),
    "arrays": lambda: Constants(np.ones((2, 2))),
}


@pytest.mark.parametrize("why", UNSTACKABLE)
def test_blocks_that_cannot_be_stacked(why):
    net, x, y = network(UNSTACKABLE[why])
    with pytest.raises(ValueError, match=r"no two blocks can be stacked.*engine='loop'"):
        make_rule("paper", net, engine="batched")(x, y)
    step = make_rule("paper", net, engine="auto")(x, y)
    assert step.engine == "loop"
    step.loss.backward()
    assert net.blocks[0].training


def test_different_plain_attributes_are_different_architectures():
    rates = iter(range(BLOCKS))
    net, x, y = network(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(next(rates) / 10)))
    with pytest.raises(ValueError, match="no two blocks can be stacked"):
        make_rule("paper", net, engine="batched")(x, y)


def test_a_branch_on_values_is_refused_or_falls_back():
    net, x, y = network(Branch)
    with pytest.raises(ValueError, match=r"block \d cannot be stacked with its like"):
        make_rule("paper", net, engine="batched")(x, y)
    rule = make_rule("paper", net, engine="auto")
    with pytest.warns(UserWarning, match=r"block \d cannot be stacked with its like.*; they are evaluated one by one"):
        first, found = stepped(rule, x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        step, again = stepped(rule, x, y)
    expected = stepped(make_rule("paper", net, engine="loop"), x, y)[1]
    assert first.engine == step.engine == "loop"
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
        torch.testing.assert_close(again[name], expected[name])


@pytest.mark.filterwarnings("ignore:block . cannot be stacked with its like")
def test_blocks_that_share_weights_fall_back():
    net, x, y = network(Branch)
    net.blocks[3] = net.blocks[1]
    options = {"guess": "mean", "sweeps": 1}  # which calls all blocks at once, with graph, before anything else
    expected = stepped(make_rule("scan", net, engine="loop", **options), x, y)[1]
    step, found = stepped(make_rule("scan", net, engine="auto", **options), x, y)
    assert step.engine == "loop"
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


class Own(Dense):
    """Scales by a number that something beside torch's generator gives."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, state):
        return state + self.draw() * super().forward(state)


def coin():
    return secrets.randbelow(2)


def own_generator(generator=np.random.default_rng(0)):  # noqa: B008
    return generator.random()


def torchs_own_generator(generator=torch.Generator().manual_seed(0)):  # noqa: B008
    return torch.rand((), generator=generator, dtype=torch.float64)


def counted(counter=itertools.count()):  # noqa: B008
    return next(counter)


def outer(tensor=torch.rand(WIDTH, dtype=torch.float64)):  # noqa: B008
    return tensor


FROZEN = {
    "Python's": (random.random, "they draw from Python's random"),
    "NumPy's": (np.random.rand, "they draw from NumPy's random"),
    "a generator of its own": (own_generator, "they compute something else at every call"),
    # Of torch 2.11 vmap does not take a generator.
    "torch's by itself": (torchs_own_generator, "(they compute something else at every call|argument of type)"),
    "a coin": (coin, "they compute something else at every call"),
    "a counter": (counted, "they compute something else at every call"),
    "a tensor of others": (
        outer,
        r"they compute with a tensor \(4,\) that is neither their parameter nor handed to them",
    ),
}


@pytest.mark.parametrize("what", FROZEN)
def test_what_a_recording_would_freeze_is_refused_or_falls_back(what):
    draw, sentence = FROZEN[what]
    net, x, y = network(lambda: Own(draw))
    with pytest.raises(ValueError, match=rf"block \d cannot be stacked with its like in one call \({sentence}"):
        make_rule("paper", net, engine="batched")(x, y)
    before = random.getstate(), str(np.random.get_state(legacy=False))
    rule = make_rule("paper", net)
    with pytest.warns(UserWarning, match=sentence):
        assert rule(x, y).engine == "loop"
    if draw not in (random.random, np.random.rand):
        assert before == (random.getstate(), str(np.random.get_state(legacy=False)))


def test_numbers_that_a_block_makes_itself_are_recorded():
    class Made(Dense):
        def forward(self, state):
            return super().forward(state) * state.new_tensor([1.0, 2.0, 3.0, 4.0]) + torch.arange(WIDTH)

    assert_engines_agree(*network(Made))


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_hooks_within_a_block_are_kept(drop):
    class Hooked(Dense):
        def forward(self, state):
            hidden = F.dropout(self.linear(state), drop)
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: gradient * 0)
            return state + hidden

    net, x, y = network(Hooked)
    with pytest.warns(UserWarning, match="they hook gradients"):
        step, found = stepped(make_rule("tree", net), x, y)
    assert step.engine == "loop"
    assert not any(gradient.any() for name, gradient in found.items() if "blocks" in name)
    with pytest.raises(ValueError, match="they hook gradients"):
        make_rule("tree", net, engine="batched")(x, y)


class Numbered(Dense):
    """A block with its number, as those of transformers have it for a cache."""

    def __init__(self, number, reads):
        super().__init__()
        self.layer_idx, self.reads = number, reads

    def forward(self, state):
        return super().forward(state) * (self.layer_idx + 1 if self.reads else 1)


def test_an_attribute_that_a_forward_does_not_read_does_not_count():
    numbers = iter(range(BLOCKS))
    net, x, y = network(lambda: Numbered(next(numbers), False))
    assert make_rule("paper", net)(x, y).engine == "batched"
    assert_engines_agree(net, x, y)
    assert all(type(block) is Numbered for block in net.blocks)


def test_an_attribute_in_which_blocks_differ_is_named():
    numbers = iter(range(BLOCKS))
    net, x, y = network(lambda: nn.Sequential(Numbered(next(numbers), True)))
    sentence = r"no two blocks can be stacked: block \d and its like differ in blocks\.0\.0\.layer_idx \(\d, \d"
    with pytest.raises(ValueError, match=sentence):
        make_rule("paper", net, engine="batched")(x, y)
    rule = make_rule("paper", net)
    with pytest.warns(UserWarning, match=sentence):
        step, found = stepped(rule, x, y)
    assert step.engine == "loop"
    for name, gradient in stepped(make_rule("paper", net, engine="loop"), x, y)[1].items():
        torch.testing.assert_close(found[name], gradient)


class Scaled(Dense):
    """A block with numbers that its user changes as the training goes on, one that nobody reads, and one that it counts."""

    factor = 1.0

    def __init__(self):
        super().__init__()
        self.scale, self.note, self.calls = 1.0, 0, 0
        self.config, self.listed = SimpleNamespace(scale=1.0), [1.0]

    def forward(self, state):
        self.calls += 1
        return self.scale * self.factor * self.config.scale * self.listed[0] * super().forward(state)


def change_in_place(block):
    block.listed[0] = 0.5


CHANGES = {
    "scale": lambda block: setattr(block, "scale", 0.5),
    "factor": lambda block: setattr(block, "factor", 0.5),  # of the class until then
    "config": lambda block: setattr(block.config, "scale", 0.5),
    "listed": change_in_place,
}


@pytest.mark.parametrize("attribute", CHANGES)
@pytest.mark.parametrize("changed", ["one", "all"])
def test_an_attribute_that_changes_after_it_was_recorded_is_noticed(changed, attribute):
    net, x, y = network(Scaled)
    rule, strict = make_rule("paper", net), make_rule("paper", net, engine="batched")
    for each in (rule, strict):
        stepped(each, x, y)
    for block in net.blocks:
        block.note = 1
    assert rule(x, y).engine == "batched"
    for block in net.blocks if changed == "all" else net.blocks[2:3]:
        CHANGES[attribute](block)
    sentence = rf"block \d: blocks\.0\.{attribute} was .*1\.0.* and is .*0\.5"
    with pytest.warns(UserWarning, match=sentence):
        step, found = stepped(rule, x, y)
    with pytest.raises(ValueError, match=sentence):
        strict(x, y)
    assert rule(x, y).engine == "loop"
    expected, gradients = stepped(make_rule("paper", net, engine="loop"), x, y)
    torch.testing.assert_close(step.loss, expected.loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_recorded_where_there_are_no_numbers(value):
    net, x, y = network(Dense)
    x[1, 2] = value
    rule = make_rule("paper", net)
    assert rule(x, y).engine == "batched"
    x[1, 2] = 0.5
    torch.testing.assert_close(rule(x, y).loss, make_rule("paper", net, engine="loop")(x, y).loss)


def test_recordings_are_bounded(monkeypatch):
    monkeypatch.setattr(hbll.engine, "RECORDINGS", 3)
    net, *_ = network(Dense, 2)
    engine = engine_of(net)
    for length in (2, 3, 4, 5, 2, 3):
        inputs = torch.randn(2, length, WIDTH, dtype=torch.float64)
        expected = torch.stack([block(state) for block, state in zip(net.blocks, inputs, strict=True)])
        torch.testing.assert_close(engine((1, 2), inputs, [{}, {}]).outputs, expected)
        assert len(engine._recorded) <= 3
    used = list(engine._recorded.values())
    engine((1, 2), torch.randn(2, 5, WIDTH, dtype=torch.float64), [{}, {}])
    assert list(engine._recorded.values()) == [*used[1:], used[0]]  # nothing was recorded again


@pytest.mark.parametrize("which", ["down", "down and out"])
def test_parameters_tied_in_other_places_are_another_architecture(which):
    class TiedAnyhow(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

        def forward(self, state):
            return self.out(torch.tanh(self.down(torch.tanh(self.up(state)))))

    net, x, y = network(TiedAnyhow)
    for block in net.blocks[::2]:
        block.down.weight = block.up.weight
    if which == "down and out":
        for block in net.blocks[1::2]:
            block.down.weight = block.out.weight
    assert_engines_agree(net, x, y)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_block_in_all_places(stage):
    net, x, y = network(Dense)
    net.blocks = nn.ModuleList([net.blocks[0]] * 7)
    exact = stepped(make_rule("bp", net), x, y)[1]
    options = {"sweeps": 7, "credit_sweeps": 7, "guess": "mean", "stage": stage}
    for engine in ("loop", "auto"):
        found = stepped(make_rule("scan", net, engine=engine, **options), x, y)[1]
        for name in exact:
            torch.testing.assert_close(found[name], exact[name])


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)

    def forward(self, state):
        return state + self.drop(torch.tanh(self.linear(state)))


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("stage", [1, 2])
def test_every_part_is_in_the_mode_that_it_is_put_in(stage, engine):
    # Six blocks, so that all stages are alike.
    net, x, y = network(Dropped, 6)
    rule = make_rule("scan", net, stage=stage, sweeps=6, guess="mean", engine=engine)

    def losses():
        return {rule(x, y).loss.item() for _ in range(4)}

    for _ in range(2):
        rule.train()
        assert len(losses()) == 4
        rule.eval()
        (still,) = losses()
        assert still == pytest.approx(F.cross_entropy(net(x), y).item())
        rule.train()
        for block in net.blocks:
            block.drop.eval()
        assert losses() == {still}


class TestChoice:
    """Which engine auto takes."""

    @pytest.mark.parametrize(
        ("make", "blocks", "chosen"),
        [
            (Dense, 7, "batched"),
            (Dense, 1, "loop"),
            (lambda: nn.BatchNorm1d(WIDTH), 7, "loop"),
        ],
    )
    def test_by_what_can_be_stacked(self, make, blocks, chosen):
        net, x, y = network(make, blocks)
        assert make_rule("paper", net)(x, y).engine == chosen

    def test_large_blocks_on_a_cpu_and_depthwise_convolutions_are_looped(self):
        torch.manual_seed(0)
        large = Chain(nn.Linear(2, 400), [nn.Linear(400, 400) for _ in range(3)], nn.Linear(400, CLASSES))
        assert make_rule("paper", large)(torch.randn(BATCH, 2), torch.arange(BATCH)).engine == "loop"
        blocks = [nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(3)]
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
        depthwise = Chain(nn.Conv2d(1, 4, 1), blocks, head)
        x = torch.randn(BATCH, 1, 5, 5)
        assert make_rule("paper", depthwise)(x, torch.arange(BATCH)).engine == "loop"

    @pytest.mark.parametrize("rule", ["paper", "scan", "stream"])
    def test_large_states_on_a_cpu_are_looped(self, rule):
        torch.manual_seed(0)
        net = Chain(nn.Linear(2, 8), [Dense(8) for _ in range(3)], nn.Linear(8, CLASSES))
        rules = {engine: make_rule(rule, net, stage=1, engine=engine) for engine in ("auto", "batched", "loop")}
        for samples, chosen in ((2**11, "batched"), (2**11 + 1, "loop")):
            x, y = torch.randn(samples, 2), torch.arange(samples) % CLASSES
            work = {engine: [one(x, y) for _ in range(4)][-1] for engine, one in rules.items()}
            assert work["auto"].engine == chosen
            assert work["batched"].engine == "batched"
            assert work["auto"].work == work[chosen].work
            torch.testing.assert_close(work["auto"].loss, work["loop"].loss)

    def test_the_users_choice_is_kept(self):
        net, x, y = network(Dense)
        for engine in ("loop", "batched"):
            assert make_rule("paper", net, engine=engine)(x, y).engine == engine


class TestRandomness:
    """Dropout under the batched engine."""

    @staticmethod
    def dropping(blocks=4):
        return network(lambda: nn.Dropout(0.5), blocks)

    def test_every_node_draws_a_mask_of_its_own(self):
        net, *_ = self.dropping(3)
        ones = torch.ones(2, 200, WIDTH, dtype=torch.float64)
        engine = engine_of(net)
        torch.manual_seed(0)
        first, second = engine((1, 3), ones, [{}, {}]).outputs
        assert set(torch.cat([first, second]).unique().tolist()) == {0.0, 2.0}
        # Independent masks agree in half of the places.
        assert (first == second).double().mean().item() == pytest.approx(0.5, abs=0.07)
        for mask in (first, second):
            assert (mask == 0).double().mean().item() == pytest.approx(0.5, abs=0.07)
        again, _ = engine((1, 3), ones, [{}, {}]).outputs
        assert (again == first).double().mean().item() == pytest.approx(0.5, abs=0.07)

    @pytest.mark.parametrize("preset", ["paper", "tree"])
    def test_masks_follow_the_seed_and_the_mode(self, preset):
        net, x, y = network(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)))
        rule = make_rule(preset, net, engine="batched")

        def loss(seed):
            torch.manual_seed(seed)
            return rule(x, y).loss.item()

        loss(0)  # recorded
        assert loss(1) == loss(1)
        assert loss(1) != loss(2)
        net.eval()
        assert loss(1) == loss(2)
        torch.testing.assert_close(loss(1), make_rule(preset, net, engine="loop")(x, y).loss.item())
        net.train()
        assert loss(1) != loss(2)

    def test_the_first_step_draws_what_any_step_draws(self):
        # Recording must not move the random state: a resumed run records anew.
        net, x, y = network(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)))
        rule = make_rule("paper", net, engine="batched")
        torch.manual_seed(3)
        first = rule(x, y).loss.item()
        torch.manual_seed(3)
        assert rule(x, y).loss.item() == first


class Gated(Dense):
    """A block that a context gates; what it returns beside the state is left out."""

    def forward(self, state, gate, tables, factor=1.0):
        return super().forward(state) * gate * tables["one"][0] * factor, gate


class TestContext:
    """What blocks take beside the state, of batches of their own or of one."""

    @staticmethod
    def context(seed, factor=0.7):
        torch.manual_seed(seed)
        gate = torch.randn(BATCH, 1, dtype=torch.float64)
        return {"gate": gate, "tables": {"one": [torch.rand(WIDTH, dtype=torch.float64)]}, "factor": factor}

    @pytest.mark.parametrize("own", [True, False])
    def test_each_row_is_evaluated_with_its_own(self, own):
        net, *_ = network(Gated, 4)
        contexts = [self.context(seed if own else 0) for seed in range(3)]
        contexts = contexts if own else [contexts[0]] * 3
        inputs = torch.randn(3, BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
        engine = engine_of(net)
        for _ in range(2):  # recorded, then replayed
            evaluation = engine((1, 2, 4), inputs, contexts)
            rows = [
                net.blocks[n - 1](state, **context)[0]
                for n, state, context in zip((1, 2, 4), inputs, contexts, strict=True)
            ]
            torch.testing.assert_close(evaluation.outputs, torch.stack(rows))
            found = torch.autograd.grad(evaluation.outputs.square().sum(), [inputs, net.blocks[1].linear.weight])
            expected = torch.autograd.grad(torch.stack(rows).square().sum(), [inputs, net.blocks[1].linear.weight])
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)
            contexts = [{**context, "gate": -context["gate"]} for context in contexts]

    def test_a_constant_is_recorded_by_its_value(self):
        net, *_ = network(Gated, 2)
        inputs, engine = torch.randn(2, BATCH, WIDTH, dtype=torch.float64), engine_of(net)
        first, other = (engine((1, 2), inputs, [self.context(0, factor)] * 2).outputs for factor in (1.0, 3.0))
        torch.testing.assert_close(other, 3 * first)

    def test_constants_that_differ_are_refused(self):
        net, *_ = network(Gated, 2)
        contexts = [self.context(0, factor) for factor in (1.0, 3.0)]
        engine = make_engine(net.blocks, ["block 1", "block 2"], "batched")
        with pytest.raises(ValueError, match="batches in flight must agree in what of their context is no tensor"):
            engine((1, 2), torch.randn(2, BATCH, WIDTH, dtype=torch.float64), contexts)

    def test_blocks_take_what_they_name(self):
        net, *_ = network(Dense, 2)
        inputs = torch.randn(2, BATCH, WIDTH, dtype=torch.float64)
        outputs = engine_of(net)((1, 2), inputs, [{"gate": torch.zeros(1)}] * 2).outputs
        torch.testing.assert_close(outputs, torch.stack([net.blocks[0](inputs[0]), net.blocks[1](inputs[1])]))


class TestGroups:
    """What one call evaluates together."""

    states = (torch.zeros(BATCH, WIDTH),) * 4

    def test_states_of_unlike_shape_are_apart(self):
        net, *_ = network(Dense, 4)
        engine = engine_of(net)
        states = [torch.zeros(size, WIDTH) for size in (2, 3, 2, 3)]
        assert engine.partition([1, 2, 3, 4], states) == [[0, 2], [1, 3]]
        assert engine.partition([4, 4, 1], states[:1] * 3) == [[0, 1, 2]]
        assert LoopEngine(net.blocks, []).partition([1, 2, 3], states[:3]) == [[0], [1], [2]]

    @pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at the states' own
    def test_compiled_blocks_are_called_as_they_are(self):
        net, x, y = network(Dense, 4)
        expected = stepped(make_rule("tree", net, engine="loop"), x, y)[1]
        called = []

        def backend(graph, inputs):
            return lambda *args: called.append(1) or graph(*args)

        for block in net.blocks[:2]:
            block.compile(backend=backend)
        rule = make_rule("tree", net, engine="batched")
        assert rule.evaluated.engine.groups([1, 2, 3, 4], self.states) == [(1,), (2,), (3, 4)]
        for name, gradient in stepped(rule, x, y)[1].items():
            torch.testing.assert_close(gradient, expected[name])
        assert called

    def test_stages_may_be_compiled_when_the_engine_is_there(self):
        rule = make_rule("tree", network(Dense, 4)[0], engine="batched")
        assert rule.evaluated.engine.groups([1, 2, 3, 4], self.states) == [(1, 2, 3, 4)]
        for stage in rule.stages[:2]:
            stage.compile(backend="eager")
        assert rule.evaluated.engine.groups([1, 2, 3, 4], self.states) == [(1,), (2,), (3, 4)]

    def test_modes_are_those_of_the_day(self):
        net, *_ = network(Dropped, 4)
        engine = engine_of(net)
        assert engine.groups([1, 2, 3, 4], self.states) == [(1, 2, 3, 4)]
        net.blocks[2].drop.eval()
        assert engine.groups([1, 2, 3, 4], self.states) == [(1, 2, 4), (3,)]

    def test_frozen_blocks_are_stacked_with_others(self):
        net, x, y = network(Dense, 3)
        net.blocks[0].requires_grad_(False)
        assert engine_of(net).groups([1, 2, 3], self.states[:3]) == [(1, 2, 3)]
        assert_engines_agree(net, x, y)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_precision_changes_between_steps(engine):
    net, x, y = network(Dense)
    rule = make_rule("paper", net, engine=engine)
    exact = rule(x, y).loss.item()
    rule.float()
    assert rule(x.float(), y).loss.item() == pytest.approx(exact, rel=1e-5)
    rule.double()
    assert rule(x, y).loss.item() == pytest.approx(exact, rel=1e-5)


def test_the_names_of_engines():
    net, *_ = network(Dense)
    with pytest.raises(ValueError, match="unknown engine 'gpu': choose auto, loop or batched"):
        make_engine(net.blocks, [], "gpu")


def test_the_shape_is_checked_block_by_block():
    net, x, y = network(Dense)
    net.blocks[5] = nn.Linear(WIDTH, WIDTH + 2).double()
    for engine in ("loop", "batched"):
        with pytest.raises(ValueError, match=r"block 6 changes the state's shape from \(3, 4\) to \(3, 6\)"):
            make_rule("paper", net, engine=engine)(x, y)
