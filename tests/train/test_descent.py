"""The training loop. Oracle: the loop that one writes by hand."""

import copy
import subprocess
import sys

import pytest
import torch
from tests.networks import residual
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

import hbll
from hbll.train import Descent, Fit, fit, make_optimizers

CLASSES, INPUTS = 3, 5


def batches(count, size=4, dtype=torch.float64):
    draw = torch.Generator().manual_seed(count)
    return [
        (
            torch.randn(size, INPUTS, generator=draw, dtype=dtype),
            torch.randint(CLASSES, (size,), generator=draw),
        )
        for _ in range(count)
    ]


def rule_of(name, nodes=6, dtype=torch.float64, **options):
    torch.manual_seed(0)
    network, _, _ = residual(nodes)
    return hbll.make_rule(name, network.to(dtype), torch.zeros(1, INPUTS, dtype=dtype), **options)


def weights(rule):
    return {name: p.detach().clone() for name, p in rule.named_parameters()}


def gradients(rule):
    return {name: p.grad.clone() for name, p in rule.named_parameters() if p.grad is not None}


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name, value in left.items():
        if tolerance:
            torch.testing.assert_close(value, right[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")
        else:
            assert value.equal(right[name]), name


@pytest.mark.parametrize("name", ["paper", "scan", "stream", "bp", "dgl", "ff"])
def test_it_is_the_loop_that_one_writes_by_hand(name):
    ours, theirs = rule_of(name), rule_of(name)
    optimizers = [AdamW(rule.parameters(), lr=1e-2) for rule in (ours, theirs)]
    torch.manual_seed(1)
    found = fit(ours, batches(4), optimizers[0], epochs=2, drain=False)
    torch.manual_seed(1)
    losses = []
    for _ in range(2):
        for x, y in batches(4):
            optimizers[1].zero_grad()
            losses.append(theirs.backward(x, y).loss.item())
            optimizers[1].step()
    assert_same(weights(ours), weights(theirs))
    assert found.steps == 8
    assert found.losses == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4], rel=1e-6)  # kept in float32


def test_an_optimizer_made_before_modules_have_shapes_trains_them():
    network, _, _ = residual(4)
    rule = hbll.make_rule("dgl", network)
    optimizer = AdamW(rule.parameters(), lr=1e-2)
    seen = []
    fit(rule, batches(2), optimizer, on_step=lambda number, step: seen.append(weights(rule)))
    assert all(not seen[0][name].equal(seen[1][name]) for name in seen[0] if seen[0][name].numel())


class Watched(nn.Module):
    """Hands a state on and notes its type."""

    def __init__(self):
        super().__init__()
        self.types = []

    def forward(self, state):
        self.types.append(state.dtype)
        return state


@pytest.mark.parametrize("name", ["paper", "stream", "bp"])
def test_bfloat16_is_autocast(name):
    ours, theirs = (rule_of(name, dtype=torch.float32) for _ in range(2))
    for rule in (ours, theirs):
        rule.network.head = nn.Sequential(rule.network.head)
    data = batches(3, dtype=torch.float32)
    watched = Watched()
    ours.network.head.append(watched)
    fit(ours, data, AdamW(ours.parameters(), lr=1e-2), precision="bfloat16", drain=False)
    optimizer = AdamW(theirs.parameters(), lr=1e-2)
    for x, y in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            theirs.backward(x, y)
        optimizer.step()
    assert set(watched.types) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    assert_same(weights(ours), weights(theirs))


@pytest.mark.parametrize("name", ["paper", "bp"])
def test_float16_scales_gradients_and_takes_the_scale_out_before_they_are_clipped(name):
    ours, theirs = (rule_of(name, dtype=torch.float32) for _ in range(2))
    data = batches(4, dtype=torch.float32)
    fit(ours, data, AdamW(ours.parameters(), lr=1e-2), precision="float16", clip=0.1)
    optimizer, scaler = AdamW(theirs.parameters(), lr=1e-2), torch.amp.GradScaler("cpu")
    for x, y in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            theirs.backward(x, y, scale=scaler.scale(torch.ones(())))
        scaler.unscale_(optimizer)
        clip_grad_norm_(theirs.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    assert_same(weights(ours), weights(theirs))


def test_in_float16_a_loss_takes_the_scale_by_which_small_gradients_do_not_vanish():
    torch.manual_seed(0)
    network = hbll.Chain(nn.Linear(8, 16), [nn.Linear(16, 16) for _ in range(2)], nn.Linear(16, 10))
    x, y = torch.randn(64, 8), torch.randint(10, (64,))
    small = 1e-5  # as many tokens and words make gradients
    rule = hbll.make_rule("bp", network, loss=lambda z, y: small * nn.functional.cross_entropy(z, y, reduction="none"))

    def error(**options):
        """Of the first weights' gradient, as a share of it."""
        rule.zero_grad()
        with torch.autocast("cpu", torch.float16):
            step = rule(x, y, **options)
        step.loss.backward()
        return ((network.embed.weight.grad - exact).norm() / exact.norm()).item()

    rule(x, y).loss.backward()
    exact = network.embed.weight.grad.clone()
    with pytest.warns(UserWarning, match=r"small gradients vanish .*: call rule\(x, y, scale=scaler.get_scale\(\)\)"):
        assert error() > 0.1
    assert error(scale=65536.0) < 0.01


def test_a_step_whose_scaled_gradients_overflow_is_left_out_for_all_optimizers():
    rule = rule_of("bp", dtype=torch.float32)
    ((x, y),) = batches(1, dtype=torch.float32)
    optimizers = [
        AdamW(rule.network.blocks.parameters(), lr=1e-2),
        AdamW([*rule.network.embed.parameters(), *rule.network.head.parameters()], lr=1e-2),
    ]
    schedule = StepLR(optimizers[0], 1, 0.5)
    descent = Descent(rule, optimizers, precision="float16", clip=1.0, schedule=schedule)
    before, scale = weights(rule), descent.scaler.get_scale()
    too_large = rule.network.embed.weight.register_hook(lambda gradient: gradient * float("inf"))
    descent.step((x / 100, y))
    finite = {name: bool(g.isfinite().all()) for name, g in gradients(rule).items()}
    assert [name for name in finite if not finite[name]] == ["network.embed.weight"]
    assert_same(weights(rule), before)
    assert schedule.get_last_lr() == [1e-2]
    assert descent.scaler.get_scale() == scale / 2
    too_large.remove()
    descent.step((x / 100, y))
    after = weights(rule)
    assert all(value.isfinite().all() and not value.equal(before[name]) for name, value in after.items())
    assert schedule.get_last_lr() == [5e-3]


def test_while_a_pipeline_fills_in_float16_stages_without_gradients_wait():
    rule = rule_of("pipeline", nodes=4, dtype=torch.float32)
    optimizers = per_stage(rule)
    schedules = [StepLR(optimizer, 1, 0.5) for optimizer in optimizers]
    before = weights(rule)
    fit(rule, batches(9, dtype=torch.float32), optimizers, precision="float16", schedule=schedules)
    after = weights(rule)
    assert all(value.isfinite().all() and not value.equal(before[name]) for name, value in after.items())


@pytest.mark.parametrize("name", ["bp", "paper"])
def test_accumulated_gradients_are_those_of_the_large_batch(name):
    ours, theirs = rule_of(name), rule_of(name)
    small = batches(5)
    seen = []
    found = fit(
        ours,
        small,
        SGD(ours.parameters(), lr=0.1),
        accumulate=2,
        on_step=lambda number, step: seen.append((number, gradients(ours))),
    )
    large = [tuple(map(torch.cat, zip(*group, strict=True))) for group in (small[:2], small[2:4], small[4:])]
    expected = []
    fit(theirs, large, SGD(theirs.parameters(), lr=0.1), on_step=lambda n, s: expected.append((n, gradients(theirs))))
    assert found.steps == 3
    for (number, mine), (other, their) in zip(seen, expected, strict=True):
        assert number == other
        assert_same(mine, their, rtol=1e-10, atol=1e-13)


def test_to_a_pipeline_every_batch_of_an_accumulation_is_a_step():
    ours, theirs = rule_of("stream"), rule_of("stream")
    data = batches(6)
    fit(ours, data, SGD(ours.parameters(), lr=0.1), accumulate=3, drain=False)
    optimizer = SGD(theirs.parameters(), lr=0.1)
    for group in (data[:3], data[3:]):
        optimizer.zero_grad()
        for x, y in group:
            theirs.backward(x, y, scale=1 / 3)
        optimizer.step()
    assert_same(weights(ours), weights(theirs))
    assert ours.in_flight


def per_stage(rule, kind=AdamW, rates=None):
    count = len(rule.stages)
    return [
        kind([p for module in rule.own(k + 1) for p in module.parameters()], lr=rates[k] if rates else 1e-2)
        for k in range(count)
    ]


@pytest.mark.parametrize("name", ["stream", "paper", "dgl"])
def test_an_optimizer_for_every_stage_is_one_for_all(name):
    ours, theirs = rule_of(name, stage=2), rule_of(name, stage=2)
    fit(ours, batches(4), per_stage(ours), epochs=2)
    fit(theirs, batches(4), AdamW(theirs.parameters(), lr=1e-2), epochs=2)
    assert_same(weights(ours), weights(theirs))


def test_every_stage_may_have_a_rate_and_a_limit_of_its_own():
    rule = rule_of("dgl", stage=2)  # of five blocks: three stages
    rates, limits = [0.1, 0.2, 0.0], [1e-3, None, 2e-3]
    before = weights(rule)
    optimizers = per_stage(rule, SGD, rates)
    fit(rule, batches(1), optimizers, clip=limits)
    free = rule_of("dgl", stage=2)
    fit(free, batches(1), per_stage(free, SGD, rates))
    found, wanted, after = gradients(rule), gradients(free), weights(rule)
    owner = {p: k for k in (1, 2, 3) for module in rule.own(k) for p in module.parameters()}
    names = {k: [n for n, p in rule.named_parameters() if owner[p] == k] for k in (1, 2, 3)}
    for k, rate, limit in zip((1, 2, 3), rates, limits, strict=True):
        norm = torch.stack([wanted[n].norm() for n in names[k]]).norm()
        share = 1.0 if limit is None else limit / norm
        assert limit is None or limit < norm
        for n in names[k]:
            torch.testing.assert_close(found[n], share * wanted[n], rtol=1e-3, atol=0)  # torch adds 1e-6 to the norm
            torch.testing.assert_close(after[n], before[n] - rate * found[n])


def test_one_limit_is_that_of_the_network_and_that_of_what_the_rule_has_beside():
    rule, free = rule_of("predsim"), rule_of("predsim")
    fit(rule, batches(1), SGD(rule.parameters(), lr=0.1), clip=1e-3)
    fit(free, batches(1), SGD(free.parameters(), lr=0.1))
    for beside in (False, True):
        ours, theirs = (
            torch.cat([g.flatten() for n, g in gradients(r).items() if n.startswith("network.") != beside])
            for r in (rule, free)
        )
        assert theirs.norm() > 1e-3
        torch.testing.assert_close(ours, 1e-3 / theirs.norm() * theirs, rtol=1e-2, atol=0)


def test_schedules_go_on_after_every_training_step():
    rule = rule_of("bp")
    network = rule.network
    optimizers = [
        SGD(network.blocks.parameters(), lr=1.0),
        SGD([*network.embed.parameters(), *network.head.parameters()], lr=2.0),
    ]
    schedules = [LambdaLR(optimizers[0], lambda step: 0.1 / (1 + step)), LambdaLR(optimizers[1], lambda step: 0.01)]
    rates = []
    fit(
        rule,
        batches(4),
        optimizers,
        accumulate=2,
        epochs=2,
        schedule=schedules,
        on_step=lambda number, step: rates.append([o.param_groups[0]["lr"] for o in optimizers]),
    )
    assert rates == [[pytest.approx(0.1 / (1 + step)), pytest.approx(0.02)] for step in (1, 2, 3, 4)]


def test_batches_may_come_from_a_loader():
    data = batches(5)
    ours, theirs = rule_of("paper"), rule_of("paper")
    whole = TensorDataset(*map(torch.cat, zip(*data, strict=True)))
    fit(ours, DataLoader(whole, batch_size=4), AdamW(ours.parameters(), lr=1e-2), epochs=2)
    fit(theirs, data, AdamW(theirs.parameters(), lr=1e-2), epochs=2)
    assert_same(weights(ours), weights(theirs))


class Taken(nn.Module):
    """An embed that finds its input in a nest."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x["of"][0])


@pytest.mark.parametrize("name", ["paper", "stream", "bp"])
def test_a_batch_may_be_a_nest(name):
    ours, theirs = rule_of(name), rule_of(name, loss=lambda prediction, y: hbll_loss(prediction, y["label"]))
    theirs.network.embed = Taken(theirs.network.embed)
    data = batches(3)
    nested = [[{"of": [x], "beside": None}, {"label": y}] for x, y in data]
    fit(ours, data, SGD(ours.parameters(), lr=0.1), device="cpu")
    fit(theirs, iter(nested), SGD(theirs.parameters(), lr=0.1))
    assert_same(weights(ours.network.blocks), weights(theirs.network.blocks))


def hbll_loss(prediction, y):
    return nn.functional.cross_entropy(prediction, y, reduction="none")


@pytest.mark.parametrize("name", ["greedy", "pipeline"])
def test_what_is_in_flight_at_the_end_passes_through(name):
    # With weights that stand still, the gradients of all steps add up to those of every batch in order.
    rule = rule_of(name)
    other = rule_of("greedy", states="chain") if name == "greedy" else rule_of("bp")
    other.load_state_dict(rule.state_dict(), strict=False)
    sums, expected = {}, {}

    def added(rule, sums):
        def on_step(number, step):
            for key, g in gradients(rule).items():
                sums[key] = sums[key] + g if key in sums else g

        return on_step

    data = batches(7)
    found = fit(rule, data, SGD(rule.parameters(), lr=0.0), on_step=added(rule, sums))
    fit(other, data, SGD(other.parameters(), lr=0.0), on_step=added(other, expected))
    assert not rule.in_flight
    # Five stages: a batch needs four more steps to reach the last one, and as many for its gradient to come back.
    assert found.steps == 7 + (4 if name == "greedy" else 9)
    assert_same(sums, expected, rtol=1e-9, atol=1e-12)


def test_what_is_in_flight_may_stay_there():
    rule = rule_of("stream")
    assert fit(rule, batches(7), SGD(rule.parameters(), lr=0.1), drain=False).steps == 7
    assert rule.in_flight


class Wrapper(nn.Module):
    """What stands between a loop and a rule, as DistributedDataParallel does."""

    def __init__(self, rule):
        super().__init__()
        self.module = rule
        self.calls = 0

    def forward(self, x, y):
        self.calls += 1
        return self.module(x, y)


@pytest.mark.parametrize("name", ["paper", "stream"])
def test_a_wrapper_is_called_and_its_loss_walked_back(name):
    ours, theirs = rule_of(name), rule_of(name)
    wrapper = Wrapper(ours)
    found = fit(wrapper, batches(6), AdamW(wrapper.parameters(), lr=1e-2), accumulate=2, clip=0.5)
    expected = fit(theirs, batches(6), AdamW(theirs.parameters(), lr=1e-2), accumulate=2, clip=0.5)
    assert found.steps == expected.steps
    assert wrapper.calls == 6 + found.steps - 3
    assert found.losses == pytest.approx(expected.losses)
    assert not ours.in_flight
    assert_same(weights(ours), weights(theirs), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_descent_goes_on_from_its_state(precision):
    def made():
        rule = rule_of("tree", dtype=torch.float32)
        optimizers = make_optimizers(rule, "muon", 1e-2, 0.1)
        schedules = [StepLR(optimizer, 2, 0.5) for optimizer in optimizers]
        return Descent(rule, optimizers, precision=precision, clip=1.0, schedule=schedules)

    data = batches(6, dtype=torch.float32)
    whole, first, second = made(), made(), made()
    for batch in data:
        whole.step(batch)
    for batch in data[:3]:
        first.step(batch)
    second.rule.load_state_dict(first.rule.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for batch in data[3:]:
        second.step(batch)
    assert_same(weights(second.rule), weights(whole.rule))
    assert [s.get_last_lr() for s in second.schedules] == [s.get_last_lr() for s in whole.schedules]
    with pytest.raises(ValueError, match="the state is of 2 optimizers, and there are 1"):
        Descent(whole.rule, AdamW(whole.rule.parameters())).load_state_dict(first.state_dict())


def test_frozen_parameters_need_no_optimizer():
    rule = rule_of("paper")
    rule.network.embed.requires_grad_(False)
    before = weights(rule)
    fit(rule, batches(2), SGD([p for p in rule.parameters() if p.requires_grad], lr=0.1))
    moved = {name for name, value in weights(rule).items() if not value.equal(before[name])}
    assert moved == {name for name in before if not name.startswith("network.embed")}


def test_modes_stay_as_they_are():
    rule = rule_of("bp")
    rule.network.blocks[1].eval()
    fit(rule, batches(1), SGD(rule.parameters(), lr=0.1))
    assert not rule.network.blocks[1].training
    assert rule.training


def test_steps_are_counted_and_the_last_batch_is_told():
    rule, seen = rule_of("bp"), []
    found = fit(
        rule,
        batches(3),
        SGD(rule.parameters(), lr=0.0),
        epochs=2,
        on_step=lambda number, step: seen.append((number, step.loss.item(), step.work)),
    )
    assert [number for number, _, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert all(work == 3 * 5 for _, _, work in seen)  # backpropagation through five blocks
    losses = [hbll_loss(rule.network(x), y).mean().item() for x, y in batches(3)]
    assert [loss for _, loss, _ in seen] == pytest.approx(2 * losses)
    assert found == Fit(6, (pytest.approx(sum(losses) / 3), pytest.approx(sum(losses) / 3)))


def half(rule):
    return AdamW(list(rule.parameters())[:4])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"accumulate": 0}, "accumulate must be at least 1; got 0"),
        ({"epochs": 0}, "epochs must be at least 1; got 0"),
        ({"precision": "half"}, "precision is one of float32, bfloat16, float16; got 'half'"),
        ({"clip": 0.0}, "clip must be positive; got 0.0"),
        ({"clip": [1.0, -1.0]}, "clip must be positive; got -1.0"),
        ({"clip": [1.0, None]}, "clip is one number, or one for every optimizer: 1, not 2"),
        ({"batches": []}, "there is no batch to train on"),
        ({"batches": [torch.zeros(4, 5)]}, r"batches are pairs \(x, y\).*; got a Tensor"),
        ({"batches": [(torch.zeros(4, 5),)]}, r"batches are pairs \(x, y\).*; got a tuple"),
        ({"batches": iter(batches(2)), "epochs": 2}, "can be gone through once, not 2 times"),
        ({"rule": residual(4)[0]}, r"what is trained is a rule, hbll.make_rule\(name, network\).*; got a Chain"),
        ({"optimizer": AdamW([nn.Parameter(torch.zeros(1))])}, "the optimizer holds no parameter of the rule"),
        ({"optimizer": half}, "no optimizer holds network.blocks.1.linear.weight: give it to one, or freeze it"),
        ({"optimizer": []}, "no optimizer holds network.embed.weight"),
        ({"optimizer": "adamw"}, "a torch Optimizer, or several; got a str"),
        ({"schedule": "cosine"}, "a torch LRScheduler, or several; got a str"),
    ],
)
def test_what_cannot_be_is_one_sentence(change, sentence):
    rule = rule_of("paper")
    optimizer = change.pop("optimizer", lambda rule: AdamW(rule.parameters()))
    given = {"rule": rule, "batches": batches(2), "optimizer": optimizer(rule) if callable(optimizer) else optimizer}
    before = weights(rule)
    with pytest.raises(ValueError, match=sentence):
        fit(**given | change)
    assert_same(weights(rule), before)


def test_an_optimizer_among_several_that_holds_nothing_is_named():
    rule = rule_of("paper")
    with pytest.raises(ValueError, match="optimizer 2 of 2 holds no parameter of the rule"):
        fit(rule, batches(1), [AdamW(rule.parameters()), AdamW([nn.Parameter(torch.zeros(1))])])


def test_a_parameter_that_two_optimizers_hold_is_named():
    rule = rule_of("paper")
    with pytest.raises(ValueError, match=r"2 optimizers hold network\.head\.weight"):
        fit(rule, batches(1), [AdamW(rule.parameters()), AdamW([rule.network.head.weight])])


def test_training_needs_nothing_of_the_command_line():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['tyro', 'rich', 'matplotlib', 'sklearn']));"
        "import torch, hbll, hbll.train, hbll.train.loop, hbll.train.compare, hbll.recipes;"
        "from torch import nn;"
        "net = hbll.Chain(nn.Linear(2, 2), [nn.Linear(2, 2)], nn.Linear(2, 2)); rule = hbll.make_rule('paper', net);"
        "hbll.train.fit(rule, [(torch.ones(1, 2), torch.zeros(1, dtype=int))], torch.optim.SGD(rule.parameters()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
