"""Paper and tree. Oracles: the transcription of the pseudo-code in tests/oracles/tree_step.py, autograd, closed forms."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.networks import (
    BATCH,
    CLASSES,
    INPUTS,
    KINDS,
    WIDTH,
    assert_equal_gradients,
    gradients,
    mlp,
    transformer,
)
from tests.oracles.tree_step import reference_loss
from torch import nn

from hbll import Chain, Step, make_rule
from hbll.losses import squared_error
from hbll.rules.composed import Batch

COMBINATIONS = [(boundary, scope) for boundary in ("posterior", "prior") for scope in ("block", "triplet", "tree")]
every_engine = pytest.mark.parametrize("engine", ["loop", "batched"])
every_combination = pytest.mark.parametrize(("boundary", "scope"), COMBINATIONS)
PRESETS = {"paper": ("posterior", "block"), "tree": ("prior", "triplet")}
every_preset = pytest.mark.parametrize("name", PRESETS)


def targets_of(rule, x, y):
    """Where one step moves every node's state, by node."""
    step, targets, cut = Step(), {}, rule.evaluated
    batch = Batch.of(rule.network, x, y, step)
    for _ in rule.credit.losses(rule.states.fronts(cut, batch, targets, step), cut, targets, step):
        pass
    return {n: target.value for n, target in targets.items()}


def priors(network, x, boundaries):
    """What every node computes from its left parent's boundary; by default the priors themselves."""
    found = {0: network.embed(x)}
    for level in network.tree.levels:
        for n in level:
            left = network.tree.left(n)
            found[n] = network.blocks[n - 1](boundaries[left] if left and boundaries else found[left])
    return found


class TestPseudoCode:
    """Both engines carry out section 3, to float64 rounding."""

    @every_engine
    @pytest.mark.parametrize(
        ("kind", "boundary", "scope"),
        [
            *(("mlp", *combination) for combination in COMBINATIONS),
            *((kind, *combination) for kind in ("convolutional", "transformer") for combination in COMBINATIONS[2:4]),
        ],
    )
    def test_every_block_boundary_and_scope(self, kind, boundary, scope, engine):
        make, features = KINDS[kind]
        net, x, y = make(6)
        expected, targets = reference_loss(net, x, y, boundary, scope, features=features)
        rule = make_rule("paper", net, boundary=boundary, scope=scope, engine=engine)
        step = rule(x, y)
        assert step.engine == engine
        torch.testing.assert_close(step.loss.detach(), expected.detach())
        assert_equal_gradients(gradients(rule, step.loss), gradients(net, expected))
        for n, target in targets_of(rule, x, y).items():
            torch.testing.assert_close(target, targets[n])

    @settings(max_examples=50)
    @given(
        nodes=st.integers(2, 17),
        combination=st.sampled_from(COMBINATIONS),
        engine=st.sampled_from(["loop", "auto"]),
        variance=st.floats(0.1, 20),
        label_variance=st.floats(0.1, 20),
        step=st.floats(0.01, 1.5),
        seed=st.integers(0, 1000),
    )
    def test_any_depth_and_options(self, nodes, combination, engine, variance, label_variance, step, seed):
        net, x, y = mlp(nodes, seed=seed)
        options = {"variance": variance, "label_variance": label_variance, "step": step}
        expected, _ = reference_loss(net, x, y, *combination, **options)
        boundary, scope = combination
        rule = make_rule("paper", net, boundary=boundary, scope=scope, engine=engine, **options)
        actual = rule(x, y)
        torch.testing.assert_close(actual.loss.detach(), expected.detach())
        assert_equal_gradients(gradients(rule, actual.loss), gradients(net, expected))

    @every_engine
    @pytest.mark.parametrize(("kind", "nodes"), [("convolutional", 3), ("transformer", 7)])
    def test_tokens_with_variances_and_step(self, kind, nodes, engine):
        make, features = KINDS[kind]
        net, x, y = make(nodes, seed=1)
        options = {"variance": 3.0, "label_variance": 0.4, "step": 0.3}
        expected, _ = reference_loss(net, x, y, features=features, **options)
        rule = make_rule("paper", net, engine=engine, **options)
        step = rule(x, y)
        torch.testing.assert_close(step.loss.detach(), expected.detach())
        assert_equal_gradients(gradients(rule, step.loss), gradients(net, expected))

    @every_engine
    @every_preset
    def test_presets_are_the_combinations_of_the_specification(self, name, engine):
        net, x, y = mlp()
        expected, _ = reference_loss(net, x, y, *PRESETS[name])
        rule = make_rule(name, net, engine=engine)
        assert_equal_gradients(gradients(rule, rule(x, y).loss), gradients(net, expected))

    @pytest.mark.parametrize("engine", ["loop", "auto"])
    @every_preset
    @pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 3, 2)])
    def test_stages_are_nodes(self, sizes, name, engine):
        net, x, y = mlp(7)
        blocks = iter(net.blocks)
        merged = Chain(net.embed, [nn.Sequential(*(next(blocks) for _ in range(size))) for size in sizes], net.head)
        expected, _ = reference_loss(merged, x, y, *PRESETS[name])
        found = make_rule(name, net, stage=sizes, engine=engine)(x, y).loss
        for one, other in zip(
            torch.autograd.grad(found, list(net.parameters())),
            torch.autograd.grad(expected, list(net.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(one, other)

    @every_engine
    def test_features_named_by_the_user(self, engine):
        # (B, F, T) states with features along dimension 1 equal (B, T, F) states after a transposition.
        class Transposed(nn.Module):
            def __init__(self, module, before=True, after=True):
                super().__init__()
                self.module, self.before, self.after = module, before, after

            def forward(self, state):
                state = self.module(state.mT if self.before else state)
                return state.mT if self.after else state

        net, x, y = transformer(4)
        turned = Chain(
            Transposed(net.embed, before=False),
            [Transposed(block) for block in net.blocks],
            Transposed(net.head, after=False),
            feature_dim=1,
        )
        expected, _ = reference_loss(net, x, y)
        rule = make_rule("paper", turned, engine=engine)
        actual = {name.replace("module.", ""): g for name, g in gradients(rule, rule(x, y).loss).items()}
        assert_equal_gradients(actual, gradients(net, expected))

    def test_scope_tree_is_autograd_through_the_tree(self):
        net, x, y = mlp(8)
        rule = make_rule("paper", net, boundary="prior", scope="tree")
        targets, states, loss = targets_of(rule, x, y), priors(net, x, {}), 0.0
        for n in net.tree.chain:
            j = net.tree.right(n)
            if j == 8:
                loss = loss + F.cross_entropy(net.head(states[n]), y)
            else:
                loss = loss + (net.blocks[j - 1](states[n]) - targets[j]).square().sum(-1).mean() / 2
        assert_equal_gradients(gradients(rule, rule(x, y).loss), gradients(net, loss))

    @every_engine
    def test_a_block_used_twice(self, engine):
        net, x, y = mlp(4)
        first, second, _ = net.blocks
        shared = Chain(net.embed, [first, second, first], net.head)
        expected, _ = reference_loss(shared, x, y)
        rule = make_rule("paper", shared, engine=engine)
        assert_equal_gradients(gradients(rule, rule(x, y).loss), gradients(shared, expected))

    @every_engine
    def test_samples_do_not_see_each_other(self, engine):
        net, x, y = mlp(6)
        for name in PRESETS:
            rule = make_rule(name, net, engine=engine)
            each = [gradients(rule, rule(x[b : b + 1], y[b : b + 1]).loss) for b in range(BATCH)]
            strided = x.T.contiguous().T
            assert not strided.is_contiguous()
            whole = gradients(rule, rule(strided, torch.stack([y, y], 1)[:, 0]).loss)
            assert_equal_gradients(whole, {n: sum(g[n] for g in each) / BATCH for n in whole})


class TestTwoNodes:
    """At N = 2 the gradients are multiples of backpropagation's (specification, section 3)."""

    @staticmethod
    def backpropagation(net, x, y):
        return gradients(net, F.cross_entropy(net(x), y))

    @pytest.mark.parametrize(("step", "variance"), [(0.05, 4.0), (0.5, 1.0), (1.0, 0.3)])
    @every_combination
    def test_gaussian(self, boundary, scope, variance, step):
        net, x, y = mlp(2)
        exact = self.backpropagation(net, x, y)
        rule = make_rule("paper", net, boundary=boundary, scope=scope, step=step, variance=variance)
        below = step if scope == "block" else 1.0
        expected = {n: g if n.startswith("head") else below * g for n, g in exact.items()}
        assert_equal_gradients(gradients(rule, rule(x, y).loss), expected)

    @pytest.mark.parametrize("kind", ["convolutional", "transformer"])
    def test_gaussian_with_tokens(self, kind):
        net, x, y = KINDS[kind][0](2)
        exact = gradients(net, F.cross_entropy(net(x).flatten(0, -2), y.flatten()))
        expected = {n: g if n.startswith("head") else 0.5 * g for n, g in exact.items()}
        rule = make_rule("paper", net)
        assert_equal_gradients(gradients(rule, rule(x, y).loss), expected)

    def test_label_variance_divides_everything(self):
        net, x, y = mlp(2)
        exact = self.backpropagation(net, x, y)
        rule = make_rule("paper", net, label_variance=4.0)
        step = rule(x, y)
        assert step.label_loss.item() == pytest.approx(F.cross_entropy(net(x), y).item())
        expected = {n: g / 4 if n.startswith("head") else g / 8 for n, g in exact.items()}
        assert_equal_gradients(gradients(rule, step.loss), expected)

    @staticmethod
    def of_family(family):
        last = {"bernoulli": nn.Sigmoid(), "categorical": nn.Softmax(-1)}[family]
        return mlp(2, block=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), last))

    @pytest.mark.parametrize("scope", ["triplet", "tree"])
    @pytest.mark.parametrize("family", ["bernoulli", "categorical"])
    def test_other_families_in_wider_scopes(self, family, scope):
        net, x, y = self.of_family(family)
        rule = make_rule("paper", net, family=family, scope=scope)
        assert_equal_gradients(gradients(rule, rule(x, y).loss), self.backpropagation(net, x, y))

    @pytest.mark.parametrize("family", ["bernoulli", "categorical"])
    def test_other_families_to_first_order(self, family):
        net, x, y = self.of_family(family)
        exact = self.backpropagation(net, x, y)

        def error(step):
            """Relative distance of gradient / step from backpropagation's, below the head."""
            rule = make_rule("paper", net, family=family, step=step)
            found = gradients(rule, rule(x, y).loss)
            for name, gradient in exact.items():
                if name.startswith("head"):
                    torch.testing.assert_close(found[name], gradient)
            below = [name for name in exact if not name.startswith("head")]
            distance = sum((found[n] / step - exact[n]).square().sum() for n in below).sqrt()
            return (distance / sum(exact[n].square().sum() for n in below).sqrt()).item()

        errors = [error(step) for step in (1e-1, 1e-2, 1e-3)]
        assert errors[-1] < 1e-3
        # First order: the error shrinks in proportion to the step.
        for larger, smaller in pairwise(errors):
            assert 7 < larger / smaller < 13

    @every_combination
    def test_inversion_none_sends_nothing_below_the_head_in_block_scope(self, boundary, scope):
        net, x, y = mlp(2)
        exact = self.backpropagation(net, x, y)
        rule = make_rule("paper", net, inversion="none", boundary=boundary, scope=scope)
        actual = gradients(rule, rule(x, y).loss)
        for name, gradient in exact.items():
            if name.startswith("head") or scope != "block":
                torch.testing.assert_close(actual[name], gradient)
            else:
                assert (actual[name] == 0).all()


class TestLosses:
    """The label's loss is the user's."""

    @every_engine
    @every_preset
    def test_regression(self, name, engine):
        net, x, _ = mlp(8)
        y = torch.randn(BATCH, CLASSES, dtype=torch.float64)
        rule = make_rule(name, net, loss=squared_error, engine=engine)
        step = rule(x, y)
        boundaries = targets_of(rule, x, y) if name == "paper" else {}
        states = priors(net, x, boundaries)
        for n in (4, 6, 7):
            own = (net.head(states[n]) - y).square().sum(-1).mean() / 2
            assert step.reports[n].error == pytest.approx(own.item())
        assert step.label_loss.item() == pytest.approx(own.item())  # the deepest one's

    @every_preset
    def test_ignored_labels_have_no_say(self, name):
        # At N = 2 the multiples of backpropagation's gradient hold for the mean over the counted labels.
        net, x, y = transformer(2)
        y = torch.where(torch.rand(y.shape) < 0.4, -100, y)
        exact = F.cross_entropy(net(x).flatten(0, 1), y.flatten())
        rule = make_rule(name, net)
        step = rule(x, y)
        assert step.reports[1].error == pytest.approx(exact.item())
        actual, exact = gradients(rule, step.loss), gradients(net, exact)
        if name == "tree":
            assert_equal_gradients(actual, exact)
            return
        for name in ("head.weight", "head.bias"):
            torch.testing.assert_close(actual[name], exact[name])
        # The target of a token is moved by its own cross-entropy, whatever number of labels is counted.
        state = net.blocks[0](net.embed(x)).detach().requires_grad_()
        total = F.cross_entropy(net.head(state).flatten(0, 1), y.flatten(), reduction="sum")
        (own,) = torch.autograd.grad(total, state)
        torch.testing.assert_close(targets_of(rule, x, y)[1], state.detach() - 0.5 * own)

    @every_preset
    def test_a_plain_callable_with_one_value_per_sample(self, name):
        def smooth(prediction, y):
            return F.cross_entropy(prediction, y, reduction="none", label_smoothing=0.1)

        net, x, y = mlp(2)
        exact = gradients(net, F.cross_entropy(net(x), y, label_smoothing=0.1))
        rule = make_rule(name, net, loss=smooth)
        scale = 0.5 if name == "paper" else 1.0
        expected = {n: g if n.startswith("head") else scale * g for n, g in exact.items()}
        assert_equal_gradients(gradients(rule, rule(x, y).loss), expected)

    @every_preset
    def test_values_and_weights(self, name):
        # Weighted samples: the mean is over the weights.
        weights = torch.tensor([0.0, 1.0, 2.0, 1.0], dtype=torch.float64)

        def weighted(prediction, y):
            return F.cross_entropy(prediction, y, reduction="none"), weights

        net, x, y = mlp(2)
        loss = (F.cross_entropy(net(x), y, reduction="none") * weights).sum() / weights.sum()
        rule = make_rule(name, net, loss=weighted)
        step = rule(x, y)
        assert step.reports[1].error == pytest.approx(loss.item())
        actual, exact = gradients(rule, step.loss), gradients(net, loss)
        for part in exact:
            if part.startswith("head") or name != "paper":
                torch.testing.assert_close(actual[part], exact[part])

    @every_preset
    def test_a_finer_grid_of_labels_than_of_tokens(self, name):
        # Two labels per token: their mean is the error, whatever their number.
        class Doubled(nn.Module):
            def __init__(self, linear):
                super().__init__()
                self.linear = linear

            def forward(self, state):
                return self.linear(state).repeat_interleave(2, 1)

        net, x, y = transformer(2)
        rule = make_rule(name, net)
        expected = gradients(rule, rule(x, y).loss)
        doubled = make_rule(name, Chain(net.embed, net.blocks, Doubled(net.head)))
        found = gradients(doubled, doubled(x, y.repeat_interleave(2, 1)).loss)
        assert_equal_gradients({name.replace("head.linear", "head"): g for name, g in found.items()}, expected)


class TestNoise:
    """Targets are samples: noise shifts them and nothing else."""

    @every_engine
    @every_preset
    def test_it_has_the_standard_deviation_asked_for(self, name, engine):
        net, x, y = mlp(4)
        x, y = x.repeat(500, 1), y.repeat(500)
        torch.manual_seed(0)
        noisy = targets_of(make_rule(name, net, noise=0.3, engine=engine), x, y)
        still = targets_of(make_rule(name, net, engine=engine), x, y)
        # The first node's target depends on no other: noise is all that differs.
        difference = noisy[2] - still[2]
        assert difference.std().item() == pytest.approx(0.3, rel=0.05)
        assert difference.mean().item() == pytest.approx(0.0, abs=0.02)
        correlation = torch.corrcoef(difference.T) - torch.eye(WIDTH)
        assert correlation.abs().max() < 0.1
        if name == "tree":  # where node 3 does not look at node 2's target
            both = torch.stack([difference.flatten(), (noisy[3] - still[3]).flatten()])
            assert torch.corrcoef(both)[0, 1].abs() < 0.1

    @every_engine
    def test_mean_gradient_in_a_layer_linear_in_the_noise(self, engine):
        # Block scope moves f_1 by (a - target): the noise averages out.
        net, x, y = mlp(3)
        rule, still = make_rule("paper", net, noise=0.5, engine=engine), make_rule("paper", net, engine=engine)
        expected = gradients(still, still(x, y).loss)["blocks.0.linear.bias"]
        torch.manual_seed(0)
        draws = torch.stack([gradients(rule, rule(x, y).loss)["blocks.0.linear.bias"] for _ in range(200)])
        error = draws.std(0) / 200**0.5
        assert (draws.std(0) > 0).all()
        assert ((draws.mean(0) - expected).abs() < 5 * error).all()


class TestInversion:
    """Targets of the exact inversion solve the linearised arc; those of none are the prior."""

    @every_engine
    @settings(max_examples=8)
    @given(variance=st.floats(0.3, 3), seed=st.integers(0, 100))
    def test_exact_between_linear_blocks_and_at_the_label(self, engine, variance, seed):
        net, x, y = mlp(8, block=lambda: nn.Linear(WIDTH, WIDTH), seed=seed)
        rule = make_rule("paper", net, inversion="exact", variance=variance, iterations=2 * WIDTH, engine=engine)
        targets = targets_of(rule, x, y)
        states = priors(net, x, targets)
        identity = torch.eye(WIDTH, dtype=torch.float64)
        for n in net.tree.chain:
            prior, j = states[n].detach(), net.tree.right(n)
            for b in range(BATCH):
                if j == net.tree.nodes:
                    weight = net.head.weight.detach()
                    p = net.head(prior[b]).softmax(0).detach()
                    fisher = torch.diag(p) - torch.outer(p, p)
                    matrix = identity / variance + weight.T @ fisher @ weight
                    right = -weight.T @ (p - F.one_hot(y[b], CLASSES))
                else:
                    weight = net.blocks[j - 1].weight.detach()
                    residual = targets[j][b] - net.blocks[j - 1](prior[b]).detach()
                    matrix, right = (identity + weight.T @ weight) / variance, weight.T @ residual / variance
                expected = prior[b] + torch.linalg.solve(matrix, right)
                torch.testing.assert_close(targets[n][b], expected, rtol=1e-6, atol=1e-6)

    def test_none_leaves_the_prior(self):
        net, x, y = mlp()
        rule = make_rule("paper", net, inversion="none")
        targets, states = targets_of(rule, x, y), priors(net, x, {})
        reports = rule.diagnose(x, y)
        for n in net.tree.chain:
            torch.testing.assert_close(targets[n], states[n])
            assert reports[n].correction == reports[n].divergence == reports[n].distance == 0


class TestFamilies:
    """Bernoulli and Categorical states, against a plain transcription at four nodes."""

    @every_engine
    @pytest.mark.parametrize("family", ["bernoulli", "categorical"])
    def test_targets_and_losses(self, family, engine):
        last = nn.Sigmoid() if family == "bernoulli" else nn.Softmax(-1)
        net, x, y = mlp(4, block=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), last))

        def distribution(mean):
            if family == "bernoulli":
                return torch.distributions.Independent(torch.distributions.Bernoulli(mean), 1)
            return torch.distributions.Categorical(mean)

        def kl(first, second):
            return torch.distributions.kl_divergence(distribution(first), distribution(second))

        def shift(mean, gradient):
            if family == "bernoulli":
                return torch.sigmoid(torch.logit(mean) - 0.5 * gradient)
            return torch.softmax(mean.log() - 0.5 * gradient, -1)

        def corrected(prior, error):
            leaf = prior.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(error(leaf).sum(), leaf)
            return shift(prior, gradient).detach()

        def label(state):
            return F.cross_entropy(net.head(state), y, reduction="none")

        f1, f2, f3 = net.blocks
        z0 = net.embed(x)
        a2 = f2(z0)
        t2 = corrected(a2, label)
        a1, a3 = f1(z0), f3(t2)
        t1 = corrected(a1, lambda state: kl(t2, f2(state)))
        t3 = corrected(a3, label)
        loss = label(a2.detach()) + label(a3.detach()) + kl(t2, f2(a1.detach())) + kl(t2, a2) + kl(t1, a1) + kl(t3, a3)
        rule = make_rule("paper", net, family=family, engine=engine)
        found = targets_of(rule, x, y)
        for n, target in {1: t1, 2: t2, 3: t3}.items():
            torch.testing.assert_close(found[n], target)
        step = rule(x, y)
        torch.testing.assert_close(step.loss.detach(), loss.mean().detach())
        expected = gradients(net, loss.mean())
        for name, gradient in gradients(rule, step.loss).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-10)


class TestReports:
    """A report per node, in nats per sample."""

    @every_engine
    @every_preset
    def test_terms_by_brute_force(self, name, engine):
        net, x, y = mlp(8)
        variance = 2.0
        rule = make_rule(name, net, variance=variance, engine=engine)
        _, targets = reference_loss(net, x, y, *PRESETS[name], variance=variance)
        states = priors(net, x, targets if name == "paper" else {})
        step, found = rule(x, y), rule.diagnose(x, y)
        assert list(found) == list(step.reports) == list(net.tree.chain)
        total = 0.0
        for n, report in found.items():
            change = (targets[n] - states[n]).norm(dim=-1)
            assert report.distance == pytest.approx(change.mean().item())
            assert report.correction == pytest.approx(change.mean().item() / variance)
            assert report.divergence == pytest.approx(change.square().mean().item() / 2 / variance)
            total += report.error + (report.divergence if name == "paper" else 0.0)
            # Of a training step there is what it has at hand.
            plain = step.reports[n]
            assert plain.error == pytest.approx(report.error)
            assert plain.divergence == (pytest.approx(report.divergence) if name == "paper" else None)
            assert plain.rose is plain.cosine is plain.correction is plain.distance is None
        assert total == pytest.approx(step.loss.item())

    @pytest.mark.parametrize("length", [0.05, 0.5, 1.5])
    @every_preset
    def test_share_of_samples_whose_objective_rose(self, name, length):
        torch.manual_seed(1)
        net, x, y = mlp(8, block=lambda: nn.Linear(WIDTH, WIDTH))
        for block in net.blocks:
            nn.init.normal_(block.weight, std=0.5)
        x, y = x.repeat(5, 1) + torch.randn(20, INPUTS), y.repeat(5)
        rule = make_rule(name, net, step=length, variance=1.5)
        targets = targets_of(rule, x, y)
        states = priors(net, x, targets if name == "paper" else {})

        def energy(n, state):
            j = net.tree.right(n)
            if j == 8:
                error = F.cross_entropy(net.head(state), y, reduction="none")
            else:
                error = (net.blocks[j - 1](state) - targets[j]).square().sum(-1) / 3
            return error + (state - states[n]).square().sum(-1) / 3

        shares = []
        for n, report in rule.diagnose(x, y).items():
            rose = energy(n, targets[n]) > energy(n, states[n])
            shares.append(rose.double().mean().item())
            assert report.rose == pytest.approx(shares[-1])
        if length == 1.5:
            assert max(shares) > 0.3
        if length == 0.05:
            assert min(shares) < 0.1

    @every_preset
    def test_cosine_by_brute_force(self, name):
        net, x, y = mlp(8)
        rule = make_rule(name, net, stage=(3, 4))
        ours, exact = gradients(rule, rule(x, y).loss), gradients(net, F.cross_entropy(net(x), y))
        for k, report in rule.diagnose(x, y).items():
            names = [f"blocks.{n - 1}.linear.{p}" for n in rule.stages[k - 1].numbers for p in ("weight", "bias")]
            mine, theirs = (torch.cat([g[name].flatten() for name in names]) for g in (ours, exact))
            assert report.cosine == pytest.approx((mine @ theirs / mine.norm() / theirs.norm()).item())
        (alone,) = make_rule(name, mlp(2)[0]).diagnose(x, y).values()
        assert alone.cosine == pytest.approx(1.0)

    def test_diagnosis_of_frozen_blocks(self):
        net, x, y = mlp()
        net.blocks.requires_grad_(False)
        reports = make_rule("paper", net).diagnose(x, y)
        assert all(report.cosine is None and report.rose is not None for report in reports.values())


@every_engine
@every_preset
@pytest.mark.parametrize("wrong", [1, 4, 6])
def test_a_block_that_changes_the_shape_is_named(name, engine, wrong):
    net, x, y = mlp(8)
    net.blocks[wrong - 1] = nn.Linear(WIDTH, WIDTH + 1).double()
    with pytest.raises(ValueError, match=rf"block {wrong} changes the state's shape from \(4, 6\) to \(4, 7\)"):
        make_rule(name, net, engine=engine)(x, y)
