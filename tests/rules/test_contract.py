"""What every rule keeps, whatever it does. Oracles: autograd, the same rule that nothing happened to, one weight as two.

A rule of the table inherits ``Contract``; what it computes is held to an oracle of its own here or in its own file. Peak
memory is in test_memory.py.
"""

import copy
import pickle

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from tests.networks import (
    CLASSES,
    INPUTS,
    KINDS,
    WIDTH,
    Layer,
    Residual,
    assert_equal_gradients,
    batches,
    gradients,
    residual,
)
from tests.oracles.tree_step import reference_loss
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from hbll import Chain, Step, audit, make_rule
from hbll.losses import cross_entropy, squared_error
from hbll.rules import RULES, options_of

FILL = 6
"""Steps after which whatever a rule keeps in flight, of three stages, is there."""


def step_gradients(rule, x, y, way="forward", seed=0):
    """A step, and the gradient that it leaves in every parameter by name, zero where there is none."""
    torch.manual_seed(seed)
    rule.zero_grad()
    if way == "backward":
        step = rule.backward(x, y)
    else:
        step = rule(x, y)
        step.loss.backward()
    return step, {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in rule.named_parameters()
    }


def all_gradients(rule, seen, way="forward"):
    """Those of many steps, without learning."""
    return [step_gradients(rule, x, y, way, seed)[1] for seed, (x, y) in enumerate(seen)]


def assert_same(one, other):
    """Equal to the last bit, and not all of them zero."""
    assert any(g.any() for gradients in one for g in gradients.values())
    for first, second in zip(one, other, strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def assert_close(one, other):
    """Equal to float64 rounding."""
    for name, gradient in other.items():
        scale = max(g.abs().max().item() for g in other.values())
        torch.testing.assert_close(one[name], gradient, rtol=1e-9, atol=1e-12 * scale)


class Held:
    """Where an embed leaves what the blocks of the same network find, and copies of them."""

    def __deepcopy__(self, memo):
        return self


class Checkpointed(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, state):
        return checkpoint(self.block, state, use_reentrant=False)


class Contract:
    """The tests that every rule inherits.

    Attributes:
        name: of the rule.
        options: with which it is made.
        tokens: whether every token may have a label.
        shares: whether two stages may train one weight.
        in_flight: whether a step works on other batches than the one that comes in.
        chain_states: whether stages are evaluated on the chain's states of the batch that comes in.
        input_waits: whether the gradient of an input comes in a later step.
        labels_in_inputs: whether labels take the place of entries of the input.
        late_reach: of a late rule, which no audit can look at, what each loss moves.
    """

    name = ""
    options: dict = {"stage": (2, 1, 2)}  # noqa: RUF012
    tokens = True
    shares = True
    in_flight = False
    chain_states = True
    input_waits = False
    labels_in_inputs = False
    late_reach: dict = {}  # noqa: RUF012

    def make_rule(self, network, **options):
        torch.manual_seed(0)  # for modules of its own
        return make_rule(self.name, network, **(self.options | options))

    def oracle_gradients(self, network, x, y):
        """The gradients of the network's parameters by name; None where the rule's oracle is in its own file."""

    def in_a_loop(self):
        """The option for blocks one by one, where stacking them takes its time and tells nothing new."""
        return {"engine": "loop"} if "engine" in options_of(self.name) else {}

    def made(self, network=None, x=None, **options):
        """A rule for a network, by default of five blocks, its modules built."""
        rule = self.make_rule(network or residual(6)[0], **(self.in_a_loop() | options))
        torch.manual_seed(1)
        rule.build(torch.zeros(2, INPUTS, dtype=torch.float64) if x is None else x)
        return rule

    # What it computes

    def test_the_oracle(self):
        for make, _ in KINDS.values():
            network, x, y = make(6)
            expected = self.oracle_gradients(network, x, y)
            if expected is None:
                pytest.skip("in a file of its own")
            rule = self.make_rule(network)
            assert_equal_gradients(gradients(rule, rule(x, y).loss), expected)

    def test_what_computes_the_input_learns_as_if_it_were_in_the_embed(self):
        torch.manual_seed(3)
        encoder = nn.Linear(INPUTS, INPUTS, dtype=torch.float64)
        network = residual(6)[0]
        inside = self.made(Chain(nn.Sequential(encoder, network.embed), network.blocks, network.head))
        encoder, outside = copy.deepcopy(encoder), self.made(copy.deepcopy(network))
        ways = ("forward", "backward")
        if self.input_waits:
            (x, y) = batches(1)[0]
            for way in ways:
                with pytest.raises(
                    ValueError, match="those of a batch come in later steps: make what computes the input"
                ):
                    step_gradients(outside, encoder(x), y, way)
            assert all(p.grad is None for p in outside.parameters())
            assert not outside.in_flight
            return
        for seed, (x, y) in enumerate(batches(FILL)):
            expected = step_gradients(inside, x, y, seed=seed)[1]
            encoder.zero_grad()
            found = step_gradients(outside, encoder(x), y, ways[seed % 2], seed)[1]
            if not self.labels_in_inputs:  # which would be others
                assert_close(
                    {n: p.grad for n, p in encoder.named_parameters()},
                    {n: expected[f"network.embed.0.{n}"] for n, _ in encoder.named_parameters()},
                )
            assert encoder.weight.grad.any()
            assert any(g.any() for g in found.values())

    @pytest.mark.parametrize("kind", KINDS)
    def test_forward_equals_backward(self, kind):
        if kind == "transformer" and not self.tokens:
            pytest.skip("labels are of samples")
        options = {} if kind == "mlp" else self.short() | self.in_a_loop()
        one, other = (self.make_rule(KINDS[kind][0](6 if kind == "mlp" else 4)[0], **options) for _ in range(2))
        for seed, (x, y) in enumerate(batches(FILL, kind)):
            (step, found), (twin, expected) = (
                step_gradients(rule, x, y, way, seed) for rule, way in ((one, "forward"), (other, "backward"))
            )
            assert torch.equal(step.loss, twin.loss)
            assert (step.work, step.span, step.reports) == (twin.work, twin.span, twin.reports)
            assert_close(found, expected)
        assert any(g.any() for g in found.values())
        assert not twin.loss.requires_grad

    def test_gradients_are_scaled_and_add_up(self):
        rule, seen = self.made(), batches(FILL)
        all_gradients(rule, seen)
        plain, twin = copy.deepcopy(rule), copy.deepcopy(rule)
        (x, y) = batches(1, seed=5)[0]
        expected = step_gradients(plain, x, y)[1]
        torch.manual_seed(0)
        rule.zero_grad()
        (1024 * rule(x, y).loss).backward()
        assert_equal_gradients({n: p.grad / 1024 for n, p in rule.named_parameters() if p.grad is not None}, expected)
        for scale in (3.0, torch.tensor(5.0, dtype=torch.float64)):
            found_so = copy.deepcopy(twin)  # multiplied while gradients are found, and divided again
            torch.manual_seed(0)
            found_so.zero_grad()
            found_so(x, y, scale).loss.backward()
            assert_equal_gradients({n: p.grad for n, p in found_so.named_parameters() if p.grad is not None}, expected)
            fresh = copy.deepcopy(twin)
            torch.manual_seed(0)
            fresh.backward(x, y, scale=scale)
            kept = copy.deepcopy(twin)
            torch.manual_seed(0)
            fresh.load_carry(kept.carry())
            fresh.backward(x, y)  # on top of it
            found = {n: p.grad / (1 + float(scale)) for n, p in fresh.named_parameters() if p.grad is not None}
            assert_equal_gradients(found, expected)

    # What gradients reach

    def test_stages_own_every_parameter_once(self):
        rule = self.made()
        owned = [{p for module in rule.own(k) for p in module.parameters()} for k in range(1, len(rule.stages) + 1)]
        assert sum(map(len, owned)) == len(set().union(*owned))
        assert set().union(*owned) == set(rule.parameters())
        assert set(rule.network.embed.parameters()) <= owned[0]
        assert set(rule.network.head.parameters()) <= owned[-1]
        for k, stage in enumerate(rule.stages):
            assert set(stage.parameters()) <= owned[k]

    def test_every_parameter_gets_a_gradient(self):
        rule = self.made()
        for seed, (x, y) in enumerate(batches(FILL)):
            torch.manual_seed(seed)
            rule.backward(x, y)
        for name, parameter in rule.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.any() or not name.startswith("network"), name

    def test_a_loss_reaches_what_the_audit_says(self):
        rule = self.made()
        parts = {"embed": [rule.network.embed], "head": [rule.network.head]}
        parts |= {f"block {n}": [block] for n, block in enumerate(rule.network.blocks, 1)}
        parts |= {f"auxiliary {k}": rule.auxiliary(k) for k in range(1, len(rule.stages) + 1)}
        for seed, (x, y) in enumerate(batches(FILL)):
            torch.manual_seed(seed)
            rule.backward(x, y)
        rule.zero_grad()
        names = {p: name for name, modules in parts.items() for module in modules for p in module.parameters()}
        reached = {}
        (x, y) = batches(1, seed=5)[0]
        for loss in rule.losses(x, y, Step()):
            own = names if rule.late else names | dict.fromkeys(loss.leaves, "embed")
            before = {p: torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in own}
            loss.value.backward()
            found = {own[p] for p in own if p.grad is not None and not torch.equal(p.grad, before[p])}
            stages = loss.stage if isinstance(loss.stage, tuple) else (loss.stage,)
            assert len(stages) == 1
            reached.setdefault(stages[0], set()).update(found)
        if rule.late:
            assert reached == self.late_reach
            return
        # The embed is walked back by itself, once all that reaches it has gathered.
        assert reached.pop("embed", {"embed"}) == {"embed"}
        rows = {row.stage: row for row in audit(rule, x, y).rows if row.stage != "embed"}
        assert {stage: set(row.reaches) for stage, row in rows.items()} == reached

    @pytest.mark.parametrize("part", ["embed", "head", "blocks.1", "beside"])
    def test_frozen_parts_stay_and_change_nothing_else(self, part):
        rule, twin = self.made(), self.made()
        frozen = [module for k in range(1, 4) for module in twin.auxiliary(k)] if part == "beside" else []
        frozen = frozen if part == "beside" else [twin.network.get_submodule(part)]
        for module in frozen:
            module.requires_grad_(False)
        still = {p for module in frozen for p in module.parameters()}
        for seed, (x, y) in enumerate(batches(FILL)):
            expected = step_gradients(rule, x, y, "forward", seed)[1]
            found = step_gradients(twin, x, y, "backward", seed)[1]
        for name, parameter in twin.named_parameters():
            if parameter in still:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(found[name], expected[name])

    def test_unused_parameters_get_none(self):
        class Spare(Residual):
            def __init__(self):
                super().__init__()
                self.spare = nn.Linear(3, 3)

        torch.manual_seed(0)
        network = Chain(nn.Linear(INPUTS, WIDTH), [Spare() for _ in range(5)], nn.Linear(WIDTH, CLASSES)).double()
        rule = self.made(network)
        all_gradients(rule, batches(FILL))
        for block in network.blocks:
            assert block.spare.weight.grad is None or not block.spare.weight.grad.any()
            assert block.linear.weight.grad.any()

    def test_a_weight_in_two_places_gets_both_gradients(self):
        if not self.shares:
            pytest.skip("refused: tests/rules/test_local.py")
        torch.manual_seed(0)
        head = nn.Linear(WIDTH, CLASSES, bias=False)
        network = Chain(Embedding(head.weight), [Layer() for _ in range(5)], head).double()
        apart = copy.deepcopy(network)
        apart.embed.weight = nn.Parameter(head.weight.detach().clone())
        seen = [(torch.randn(4, CLASSES, dtype=torch.float64), torch.randint(CLASSES, (4,))) for _ in range(FILL)]
        rule, twin = (self.made(net, x=seen[0][0]) for net in (network, apart))
        for seed, (x, y) in enumerate(seen):
            found, expected = (step_gradients(each, x, y, seed=seed)[1] for each in (rule, twin))
        both = expected["network.embed.weight"] + expected.pop("network.head.weight")
        assert both.any()
        assert_equal_gradients(found, expected | {"network.embed.weight": both})

    # How it is evaluated

    @pytest.mark.parametrize("kind", ["mlp", "transformer"])
    def test_autocast(self, kind):
        if kind == "transformer" and not self.tokens:
            pytest.skip("labels are of samples")
        options = self.short() | ({} if kind == "mlp" else self.in_a_loop())
        exact, rule = (self.make_rule(KINDS[kind][0](4)[0].float(), **options) for _ in range(2))
        seen = [(x.float() if x.is_floating_point() else x, y) for x, y in batches(6, kind)]
        for seed, (x, y) in enumerate(seen):
            expected = step_gradients(exact, x, y, "forward", seed)[1]
            way = ("forward", "backward")[seed % 2]
            torch.manual_seed(seed)
            rule.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                step = rule.backward(x, y) if way == "backward" else rule(x, y)
            if way == "forward":
                step.loss.backward()
            assert step.loss.dtype == torch.float32
        found = {n: p.grad for n, p in rule.named_parameters() if p.grad is not None}
        assert all(g.isfinite().all() and g.dtype == torch.float32 for g in found.values())
        mine, theirs = (torch.cat([g[n].flatten() for n in found]) for g in (found, expected))
        assert torch.cosine_similarity(mine, theirs, dim=0) > 0.95

    def short(self):
        """The options for three blocks."""
        return {"stage": (2, 1)} if "stage" in self.options else {}

    def test_half_precision(self):
        rule = self.make_rule(residual(6)[0].to(torch.bfloat16), **self.in_a_loop())
        for seed, (x, y) in enumerate(batches(FILL)):
            step, found = step_gradients(rule, x.to(torch.bfloat16), y, "backward", seed)
        assert step.loss.isfinite()
        assert all(g.isfinite().all() and g.dtype == torch.bfloat16 for g in found.values())

    @pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at the states' own
    def test_compiled_stages(self):
        network = residual(4)[0]
        rule, twin = (self.make_rule(net, **self.short()) for net in (network, copy.deepcopy(network)))
        called = []

        def backend(graph, inputs):
            return lambda *args: called.append(1) or graph(*args)

        torch._dynamo.reset()  # of what other tests have compiled there is enough
        twin.compile(backend=backend)
        for seed, (x, y) in enumerate(batches(4)):
            expected = step_gradients(rule, x, y, seed=seed)[1]
            step, found = step_gradients(twin, x, y, seed=seed)
        assert step.engine == "loop"
        assert len(called) >= 2 * len(twin.stages)
        assert_equal_gradients(found, expected)
        called.clear()
        handle = twin.network.blocks[0].register_forward_hook(lambda *_: None)
        step_gradients(twin, x, y)  # by stages made anew
        assert called
        assert all(stage._compiled_call_impl is not None for stage in twin.stages)
        handle.remove()
        pickle.dumps(twin)  # without what compiles it

    def test_replaced_blocks_are_noticed(self):
        rule = self.make_rule(residual(6)[0])
        all_gradients(rule, batches(FILL))
        torch.manual_seed(3)
        rule.network.blocks[1] = Residual().double()
        twin = copy.deepcopy(rule)  # whatever was derived from the network is derived anew
        x, y = batches(1, seed=5)[0]
        (_, found), (_, expected) = step_gradients(rule, x, y), step_gradients(twin, x, y)
        assert_same([found], [expected])
        assert found["network.blocks.1.linear.weight"].any()
        assert rule.network.blocks[1] in rule.own(1)

    def test_a_context_reaches_blocks_and_head(self):
        # Those of the twin find it where its embed has left it; what is in flight is held to its oracle elsewhere.
        if self.in_flight:
            pytest.skip("tests/rules/test_scan.py, test_stream.py, test_pipeline.py, test_late.py")
        held = Held()
        network, left = contextual(lambda mask: {"mask": mask}), contextual(lambda mask: setattr(held, "mask", mask))
        left.blocks = nn.ModuleList(Finding(block, held) for block in left.blocks)
        left.head = Finding(left.head, held)
        rule, twin = self.make_rule(network), self.make_rule(left, **self.in_a_loop())
        for seed, (x, y) in enumerate(batches(3)):
            found, expected = (step_gradients(each, x, y, seed=seed)[1] for each in (rule, twin))
            assert_equal_gradients(found, {name.replace(".module", ""): g for name, g in expected.items()})

    def test_what_a_context_carries_back_reaches_the_embed_alone(self):
        # Of a mask that the embed computes by trained weights.
        network = contextual(lambda mask: {"mask": mask}, trained=True)
        apart = contextual(lambda mask: {"mask": mask.detach()}, trained=True)
        rule, twin = self.made(network), self.made(apart)
        for seed, (x, y) in enumerate(batches(FILL)):
            found, expected = (step_gradients(each, x, y, seed=seed)[1] for each in (rule, twin))
        assert all(g.isfinite().all() for g in found.values())
        for name, gradient in expected.items():
            if not name.startswith("network.embed"):
                torch.testing.assert_close(found[name], gradient)

    # What it keeps, and where

    @pytest.mark.parametrize("way", ["deepcopy", "pickle"])
    def test_copies_go_on_alike(self, way):
        rule = self.make_rule(residual(6)[0])
        all_gradients(rule, batches(FILL))
        twin = copy.deepcopy(rule) if way == "deepcopy" else pickle.loads(pickle.dumps(rule))
        assert not set(twin.parameters()) & set(rule.parameters())
        seen = batches(4, seed=5)
        assert_same(all_gradients(rule, seen), all_gradients(twin, seen))

    def test_a_rule_is_resumed_from_files(self, tmp_path):
        def trained(rule, optimizer, seen):
            found = []
            for seed, (x, y) in enumerate(seen):
                found.append(step_gradients(rule, x, y, "backward", seed)[1])
                optimizer.step()
            return found

        rule, seen = self.make_rule(residual(6)[0], **self.in_a_loop()), batches(2 * FILL)
        optimizer = torch.optim.SGD(rule.parameters(), lr=0.05, momentum=0.9)
        trained(rule, optimizer, seen[:FILL])
        weights, carry = rule.state_dict(), rule.carry()
        assert all(isinstance(value, torch.Tensor) for value in weights.values())
        safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
        torch.save({"optimizer": optimizer.state_dict(), "carry": carry}, tmp_path / "rest.pt")
        expected = trained(rule, optimizer, seen[FILL:])

        resumed = self.make_rule(residual(6, seed=4)[0], **self.in_a_loop())
        resumed.load_state_dict(safetensors.torch.load_file(tmp_path / "weights.safetensors"))
        optimizer = torch.optim.SGD(resumed.parameters(), lr=0.05, momentum=0.9)
        rest = torch.load(tmp_path / "rest.pt", weights_only=True)
        optimizer.load_state_dict(rest["optimizer"])
        resumed.load_carry(rest["carry"])
        assert_same(expected, trained(resumed, optimizer, seen[FILL:]))

    def test_without_gradients_there_is_the_loss(self):
        rule, twin = self.made(normed()), self.made(normed())
        seen, (x, y) = batches(FILL), batches(1, seed=5)[0]
        all_gradients(rule, seen), all_gradients(twin, seen)
        before = copy.deepcopy(rule.state_dict())
        torch.manual_seed(0)
        if rule.late:
            with torch.no_grad(), pytest.raises(ValueError, match="has no gradients of the batch at hand"):
                rule(x, y)
        else:
            with torch.no_grad():
                step = rule(x, y)
            assert not step.loss.requires_grad
            evaluated = copy.deepcopy(rule).eval()
            torch.manual_seed(0)
            torch.testing.assert_close(step.loss, evaluated(x, y).loss.detach(), rtol=1e-12, atol=0)
            self.check_label_loss(evaluated, step, x, y)
        assert rule.training
        assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())
        assert_same(all_gradients(rule, batches(4, seed=6)), all_gradients(twin, batches(4, seed=6)))

    def check_label_loss(self, rule, step, x, y):
        """The chain's own, in evaluation mode."""
        torch.testing.assert_close(step.label_loss, F.cross_entropy(rule.network(x), y).detach())

    @pytest.mark.parametrize("wrap", [nn.Identity, Checkpointed], ids=["plain", "checkpointed"])
    def test_running_statistics_are_those_of_one_evaluation_a_step(self, wrap):
        rim = {"rim": 1.0} if "rim" in options_of(self.name) else {}
        network = normed()
        network.embed = nn.Sequential(nn.BatchNorm1d(INPUTS).double(), network.embed)
        network.head = nn.Sequential(nn.BatchNorm1d(WIDTH).double(), network.head)
        if wrap is Checkpointed:
            network = Chain(network.embed, map(Checkpointed, network.blocks), network.head)
        same, seen = copy.deepcopy(network), batches(FILL)
        rule = self.made(network, **rim)
        for x, y in seen:
            rule(x, y)
            same(x)
        if wrap is Checkpointed:  # which pass a block once more to walk it back, and leave another trace
            return
        late = len(rule.stages) - 1 if self.in_flight else 0
        assert network.embed[0].num_batches_tracked == FILL
        for block in network.blocks:
            assert FILL - late <= block[1].num_batches_tracked <= FILL
        assert FILL - late <= network.head[0].num_batches_tracked <= FILL
        if self.chain_states:
            for ours, theirs in zip(network.buffers(), same.buffers(), strict=True):
                torch.testing.assert_close(ours, theirs)

    def test_in_evaluation_nothing_is_kept(self):
        rule, twin = self.made(normed()), self.made(normed())
        seen, (x, y) = batches(FILL), batches(1, seed=5)[0]
        all_gradients(rule, seen), all_gradients(twin, seen)
        rule.eval()
        if not rule.late:
            found, step = {}, rule(x, y)
            step.loss.backward()
            found = {name: p.grad for name, p in rule.network.named_parameters()}
            assert all(g is not None and g.isfinite().all() for g in found.values())
        rule.train()
        assert_same(all_gradients(rule, batches(4, seed=6)), all_gradients(twin, batches(4, seed=6)))

    def test_looking_leaves_everything_as_it_was(self):
        rule, twin = self.made(normed()), self.made(normed())
        rule.network.blocks[1].eval()
        twin.network.blocks[1].eval()
        seen, (x, y) = batches(FILL), batches(1, seed=5)[0]
        all_gradients(rule, seen), all_gradients(twin, seen)
        rule.zero_grad()
        before = copy.deepcopy(rule.state_dict())
        reports = rule.diagnose(x, y)
        assert list(reports) == ([] if rule.late else list(range(1, len(rule.stages) + 1)))
        assert all(-1 <= report.cosine <= 1 + 1e-12 for report in reports.values())
        if not rule.late:
            audit(rule, x, y)
        assert all(p.grad is None for p in rule.parameters())
        assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())
        assert [block.training for block in rule.network.blocks] == [True, False, True, True, True]
        assert_same(all_gradients(rule, batches(4, seed=6)), all_gradients(twin, batches(4, seed=6)))

    @pytest.mark.parametrize(("bad", "way"), [("input", "forward"), ("label", "backward")])
    def test_a_step_that_fails_leaves_everything_as_it_was(self, way, bad):
        rule, twin = self.made(), self.made()
        all_gradients(rule, batches(FILL)), all_gradients(twin, batches(FILL))
        before = copy.deepcopy(rule.state_dict())
        x, y = batches(1, seed=5)[0]
        if bad == "label":
            y[1] = CLASSES
            with pytest.raises(ValueError, match=rf"classes 0\.\.{CLASSES - 1}"):
                step_gradients(rule, x, y, way)
        else:
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                step_gradients(rule, x[:, 1:], y, way)
        assert all(torch.equal(value, before[name]) for name, value in rule.state_dict().items())
        assert_same(all_gradients(rule, batches(4, seed=6)), all_gradients(twin, batches(4, seed=6)))

    def test_where_no_label_counts_nothing_is_learned(self):
        rule = self.made()
        for seed, (x, y) in enumerate(batches(FILL)):
            step, found = step_gradients(rule, x, torch.full_like(y, -100), "backward", seed)
            assert step.loss == 0
            assert not any(g.any() for g in found.values())
            assert step.label_loss in (None, 0)

    def test_what_is_no_batch_is_refused(self):
        x, y = batches(1)[0]
        rule = self.made()
        for inputs, labels, sentence in (
            (x[:0], y[:0], "the batch is empty"),
            (x[0], y[0], "hand over batches"),
            (x[0], y[:1], "hand over batches"),
            (x, y.tolist(), "got a list"),
            (x, y.numpy(), "got a ndarray"),
            (x, None, "got a NoneType"),
        ):
            with pytest.raises(ValueError, match=sentence):
                rule(inputs, labels)

    def test_a_layer_that_is_changed_is_noticed(self):
        if self.options.get("copies"):
            pytest.skip(
                "copies of blocks are fitted to these parameter by parameter, as both were when the rule was made"
            )
        rule, twin = self.made(**self.stacked()), self.made(**self.stacked())
        all_gradients(rule, batches(FILL))
        rule.reset()
        for made in (rule, twin):  # which has not made a step yet
            torch.manual_seed(3)
            made.network.blocks[3].linear = nn.Linear(WIDTH, WIDTH).double()
            prune.l1_unstructured(made.network.blocks[2].linear, "weight", 0.5)
            made.network.blocks[0].linear.register_forward_hook(lambda module, args, output: output / 2)
        found, expected = all_gradients(rule, batches(2 * FILL)), all_gradients(twin, batches(2 * FILL))
        for one, other in zip(found, expected, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in other)
        for name in ("3.linear.weight", "2.linear.weight_orig", "0.linear.weight"):
            assert any(gradients[f"network.blocks.{name}"].any() for gradients in found)

    def test_compiled_as_a_whole_it_does_the_same(self):
        rule, twin = self.made(**self.in_a_loop()), self.made(**self.in_a_loop())
        compiled = torch.compile(rule, backend="eager")
        for seed, (x, y) in enumerate(batches(4)):
            torch.manual_seed(seed)
            compiled.zero_grad()
            compiled(x, y).loss.backward()
            found = {n: p.grad for n, p in rule.named_parameters() if p.grad is not None}
            expected = step_gradients(twin, x, y, seed=seed)[1]
            assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())

    def stacked(self):
        """The option for stages that are stacked where they are alike."""
        return {"engine": "batched", "stage": 1} if "engine" in options_of(self.name) else {}

    def test_a_loss_that_averages_over_the_batch_is_refused(self):
        rule = self.made(loss=F.cross_entropy)
        with pytest.raises(ValueError, match="one value per sample, not their mean"):
            all_gradients(rule, batches(FILL))

    def test_it_learns(self):
        rule, (x, y) = self.made(), batches(1)[0]
        optimizer = torch.optim.AdamW(rule.parameters(), lr=1e-2, weight_decay=0.1)
        start = copy.deepcopy(rule.state_dict())
        before = F.cross_entropy(rule.network(x), y)
        for seed in range(40):
            step_gradients(rule, x, y, "backward", seed)
            nn.utils.clip_grad_norm_(rule.parameters(), 1.0)
            optimizer.step()
        assert F.cross_entropy(rule.network(x), y) < 0.9 * before
        assert all(not torch.equal(p, start[name]) for name, p in rule.named_parameters())


class Embedding(nn.Module):
    """Classes' scores to states by a weight (classes, width)."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x @ self.weight


class ContextEmbed(nn.Module):
    """An embed that hands a mask of each sample on, by a function of it that says how."""

    def __init__(self, hand_on, trained):
        super().__init__()
        self.linear, self.gate = nn.Linear(INPUTS, WIDTH), nn.Linear(INPUTS, WIDTH)
        self.gate.requires_grad_(trained)
        self.hand_on = hand_on

    def forward(self, x):
        context = self.hand_on(torch.sigmoid(self.gate(x)))
        return self.linear(x) if context is None else (self.linear(x), context)


class MaskedLayer(nn.Linear):
    def forward(self, state, mask):
        return state + mask * torch.tanh(super().forward(state))


class MaskedScores(nn.Linear):
    def forward(self, state, mask):
        return super().forward(state * mask)


class Finding(nn.Module):
    """A module that is given what an embed has left."""

    def __init__(self, module, held):
        super().__init__()
        self.module, self.held = module, [held]

    def forward(self, state):
        return self.module(state, mask=self.held[0].mask.detach())


def contextual(hand_on, trained=False):
    torch.manual_seed(0)
    blocks = [MaskedLayer(WIDTH, WIDTH) for _ in range(5)]
    return Chain(ContextEmbed(hand_on, trained), blocks, MaskedScores(WIDTH, CLASSES)).double()


def normed():
    """A network with running statistics."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(Residual(), nn.BatchNorm1d(WIDTH)) for _ in range(5)]
    return Chain(nn.Linear(INPUTS, WIDTH), blocks, nn.Linear(WIDTH, CLASSES)).double()


class ByTree(Contract):
    boundary, scope = "", ""
    chain_states = False

    def oracle_gradients(self, network, x, y):
        a, b, c, d, e = network.blocks
        merged = Chain(network.embed, [nn.Sequential(a, b), c, nn.Sequential(d, e)], network.head)
        features = {2: -1, 4: -3}.get(x.ndim if x.is_floating_point() else 2)
        loss, _ = reference_loss(merged, x, y, self.boundary, self.scope, features=features)
        return gradients(network, loss)

    def check_label_loss(self, rule, step, x, y):
        """That of the deepest node which looks at the label."""
        assert step.label_loss.item() == pytest.approx(step.reports[3].error)


class TestPaper(ByTree):
    name, boundary, scope = "paper", "posterior", "block"


class TestTree(ByTree):
    name, boundary, scope = "tree", "prior", "triplet"


class TestScan(Contract):
    name = "scan"
    options = {"stage": (2, 1, 2), "sweeps": 1, "credit_sweeps": 0}  # noqa: RUF012  (so that batches wait)
    chain_states = False
    in_flight = input_waits = True


class TestScanFromATree(Contract):
    name = "scan"
    options = {"stage": (2, 1, 2), "guess": "tree"}  # noqa: RUF012


class TestStream(Contract):
    name = "stream"
    chain_states = False
    in_flight = True


class TestStreamInOrder(Contract):
    name = "stream"
    options = {"stage": (2, 1, 2), "states": "chain"}  # noqa: RUF012


class TestGreedy(Contract):
    name = "greedy"
    options = {"stage": (2, 1, 2), "states": "chain"}  # noqa: RUF012


class TestStreamOfCopies(Contract):
    name = "stream"
    options = {"stage": (2, 1, 2), "copies": True, "refresh": 2}  # noqa: RUF012
    chain_states = False
    in_flight = True


class TestSolo(Contract):
    name = "solo"
    options = {"stage": (2, 1, 2), "states": "chain"}  # noqa: RUF012


class TestPipeline(Contract):
    name = "pipeline"
    chain_states = False
    in_flight = input_waits = True
    # A stage learns by itself, and the head by the label.
    late_reach = {  # noqa: RUF012
        "embed": {"embed"},
        1: {"block 1", "block 2"},
        2: {"block 3"},
        3: {"block 4", "block 5", "head"},
    }

    def test_what_a_context_carries_back_reaches_the_embed_alone(self):
        network = contextual(lambda mask: {"mask": mask}, trained=True)
        with pytest.raises(ValueError, match="an asynchronous pipeline gives no credit: let embed return it detached"):
            self.made(network)(*batches(1)[0])


class TestTwoBufferedWeights(Contract):
    name = "2bw"
    options = {}  # noqa: RUF012
    in_flight = input_waits = True
    late_reach = {1: {"embed", *(f"block {n}" for n in range(1, 6)), "head"}}  # noqa: RUF012


class TestBackpropagation(Contract):
    name = "bp"
    options = {}  # noqa: RUF012

    def oracle_gradients(self, network, x, y):
        return gradients(network, F.cross_entropy(network(x).flatten(0, -2), y.flatten()))

    def test_any_loss(self):
        network, x, y = residual(4)
        weights = torch.tensor([0.0, 1.0, 2.0, 1.0], dtype=torch.float64)
        values = F.cross_entropy(network(x), y, reduction="none")
        tokens, words, labels = KINDS["transformer"][0](4)
        labels = torch.where(torch.rand(labels.shape) < 0.4, -100, labels)
        goal = torch.randn(4, CLASSES, dtype=torch.float64)
        for net, loss, batch, expected in (
            (network, lambda z, y: (F.cross_entropy(z, y, reduction="none"), weights), (x, y), values @ weights / 4),
            (network, squared_error, (x, goal), (network(x) - goal).square().sum(-1).mean() / 2),
            (tokens, cross_entropy, (words, labels), F.cross_entropy(tokens(words).flatten(0, 1), labels.flatten())),
        ):
            rule = make_rule("bp", net, loss=loss)
            step = rule(*batch)
            torch.testing.assert_close(step.loss, expected)
            assert_equal_gradients(gradients(rule, step.loss), gradients(net, expected))

    def test_an_input_that_occurs_twice_gets_both_gradients(self):
        class Both(nn.Module):
            def forward(self, pair):
                return 2 * pair[0] + pair[1]

        network, x, y = residual(4)
        network = Chain(nn.Sequential(Both(), network.embed), network.blocks, network.head)
        x.requires_grad_()
        (expected,) = torch.autograd.grad(F.cross_entropy(network((x, x)), y), x)
        rule = make_rule("bp", network)
        for way in ("forward", "backward"):
            x.grad = None
            step_gradients(rule, (x, x), y, way)
            torch.testing.assert_close(x.grad, expected)


class TestDecoupledGreedy(Contract):
    name = "dgl"


class TestPredSim(Contract):
    name = "predsim"


class TestForwardForward(Contract):
    name = "ff"
    tokens = shares = False
    labels_in_inputs = True


class TestContrastiveForwardForward(Contract):
    name = "cff"
    shares = False


class TestFeedbackAlignment(Contract):
    name = "dfa"
    shares = False


class TestBLL(Contract):
    name = "bll"


def test_every_rule_of_the_table_has_a_contract():
    assert {kind.name for kind in Contract.__subclasses__() + ByTree.__subclasses__()} - {""} == set(RULES)
