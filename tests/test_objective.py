"""Training rules. Oracles: the transcription of the pseudo-code in tests/reference.py, plain autograd, closed forms."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import reference_loss
from torch import nn

import hbll
from hbll.losses import squared_error

BATCH, CLASSES, INPUTS, WIDTH, TOKENS = 4, 3, 5, 6, 7


class Layer(nn.Module):
    """A plain layer of the paper's MLP, without skip or norm."""

    def __init__(self, width=WIDTH, activation=torch.tanh):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.activation = activation

    def forward(self, state):
        return self.activation(self.linear(state))


class Convolution(nn.Module):
    """A residual convolutional block with a norm over channels, states (B, C, H, W)."""

    def __init__(self, width=4):
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, state):
        return state + self.second(F.gelu(self.first(self.norm(state))))


class Transformer(nn.Module):
    """A pre-norm transformer block with causal attention, states (B, T, F)."""

    def __init__(self, width=WIDTH, heads=2, dropout=0.0):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, state):
        split = [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(state)).chunk(3, -1)]
        mixed = F.scaled_dot_product_attention(*split, is_causal=True)
        state = state + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return state + self.dropout(self.mlp(state))


class Pooled(nn.Module):
    """A head that averages over pixels."""

    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(width, CLASSES)

    def forward(self, state):
        return self.linear(state.mean((2, 3)))


def mlp(nodes=8, width=WIDTH, block=Layer, seed=0):
    torch.manual_seed(seed)
    blocks = [block() for _ in range(nodes - 1)]
    net = hbll.TreeNetwork(embed=nn.Linear(INPUTS, width), blocks=blocks, head=nn.Linear(width, CLASSES)).double()
    return net, torch.randn(BATCH, INPUTS, dtype=torch.float64), torch.arange(BATCH) % CLASSES


def convolutional(nodes=8, seed=0):
    torch.manual_seed(seed)
    blocks = [Convolution() for _ in range(nodes - 1)]
    net = hbll.TreeNetwork(embed=nn.Conv2d(2, 4, 3, padding=1), blocks=blocks, head=Pooled()).double()
    return net, torch.randn(BATCH, 2, 5, 4, dtype=torch.float64), torch.arange(BATCH) % CLASSES


def transformer(nodes=8, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    blocks = [Transformer(dropout=dropout) for _ in range(nodes - 1)]
    net = hbll.TreeNetwork(embed=nn.Embedding(11, WIDTH), blocks=blocks, head=nn.Linear(WIDTH, CLASSES)).double()
    return net, torch.randint(11, (BATCH, TOKENS)), torch.randint(CLASSES, (BATCH, TOKENS))


class Residual(Layer):
    """A tanh layer with a skip around it."""

    def forward(self, state):
        return state + super().forward(state)


def residual(nodes=8, seed=0):
    return mlp(nodes, block=Residual, seed=seed)


KINDS = {"mlp": (mlp, -1), "convolutional": (convolutional, -3), "transformer": (transformer, -1)}
RULES = [(boundary, scope) for boundary in ("posterior", "prior") for scope in ("block", "triplet", "tree")]
every_engine = pytest.mark.parametrize("engine", ["loop", "batched"])
every_rule = pytest.mark.parametrize(("boundary", "scope"), RULES)


def gradients(net, loss):
    """The gradient of a loss in every parameter, zero where there is none."""
    names, parameters = zip(*((n, p) for n, p in net.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def assert_equal_gradients(actual, expected):
    scale = max(g.abs().max().item() for g in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-9, atol=1e-12 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def module_of(name):
    return ".".join(name.split(".")[:2]) if name.startswith("blocks") else name.split(".")[0]


class TestPseudoCode:
    """Both engines carry out section 3, to float64 rounding."""

    @every_engine
    @every_rule
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_block_boundary_and_scope(self, kind, boundary, scope, engine):
        make, features = KINDS[kind]
        net, x, y = make()
        expected, targets = reference_loss(net, x, y, boundary, scope, features=features)
        step = hbll.Objective("paper", boundary=boundary, scope=scope, engine=engine)(net, x, y)
        assert step.engine == engine
        torch.testing.assert_close(step.loss.detach(), expected.detach())
        assert_equal_gradients(gradients(net, step.loss), gradients(net, expected))
        for n, target in targets.items():
            torch.testing.assert_close(step.trace.target[n], target)

    @settings(max_examples=60, deadline=None)
    @given(
        nodes=st.integers(2, 17),
        rule=st.sampled_from(RULES),
        engine=st.sampled_from(["loop", "batched", "auto"]),
        variance=st.floats(0.1, 20),
        label_variance=st.floats(0.1, 20),
        step=st.floats(0.01, 1.5),
        seed=st.integers(0, 1000),
    )
    def test_any_depth_and_options(self, nodes, rule, engine, variance, label_variance, step, seed):
        net, x, y = mlp(nodes, seed=seed)
        options = {"variance": variance, "label_variance": label_variance, "step": step}
        boundary, scope = rule
        expected, _ = reference_loss(net, x, y, boundary, scope, **options)
        if engine == "batched" and nodes == 2:
            engine = "auto"
        actual = hbll.Objective("paper", boundary=boundary, scope=scope, engine=engine, **options)(net, x, y)
        torch.testing.assert_close(actual.loss.detach(), expected.detach())
        assert_equal_gradients(gradients(net, actual.loss), gradients(net, expected))

    @every_engine
    @pytest.mark.parametrize("kind", ["convolutional", "transformer"])
    @pytest.mark.parametrize("nodes", [3, 6, 11])
    def test_tokens_with_variances_and_step(self, kind, nodes, engine):
        make, features = KINDS[kind]
        net, x, y = make(nodes, seed=1)
        options = {"variance": 3.0, "label_variance": 0.4, "step": 0.3}
        expected, _ = reference_loss(net, x, y, "posterior", "block", features=features, **options)
        step = hbll.Objective("paper", engine=engine, **options)(net, x, y)
        torch.testing.assert_close(step.loss.detach(), expected.detach())
        assert_equal_gradients(gradients(net, step.loss), gradients(net, expected))

    @every_engine
    def test_presets_are_the_combinations_of_the_specification(self, engine):
        net, x, y = mlp()
        for preset, boundary, scope in [("paper", "posterior", "block"), ("tree", "prior", "triplet")]:
            expected, _ = reference_loss(net, x, y, boundary, scope)
            step = hbll.Objective(preset, engine=engine)(net, x, y)
            assert_equal_gradients(gradients(net, step.loss), gradients(net, expected))

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

        net, x, y = transformer()
        turned = hbll.TreeNetwork(
            Transposed(net.embed, before=False),
            [Transposed(block) for block in net.blocks],
            Transposed(net.head, after=False),
            feature_dim=1,
        )
        expected = gradients(net, hbll.Objective("paper", engine=engine)(net, x, y).loss)
        loss = hbll.Objective("paper", engine=engine)(turned, x, y).loss
        actual = {name.replace("module.", ""): g for name, g in gradients(turned, loss).items()}
        assert_equal_gradients(actual, expected)

    def test_scope_tree_is_autograd_through_the_tree(self):
        # With prior boundaries and a single level of errors: the label's loss alone, at the rim's last node.
        net, x, y = mlp(8)
        tree = net.tree
        states = {0: net.embed(x)}
        for level in tree.levels:
            for n in level:
                states[n] = net.blocks[n - 1](states[tree.left(n)])
        step = hbll.Objective("paper", boundary="prior", scope="tree")(net, x, y)
        loss = 0.0
        for n in tree.chain:
            j = tree.right(n)
            if j == tree.nodes:
                loss = loss + F.cross_entropy(net.head(states[n]), y)
            else:
                target = step.trace.target[j]
                loss = loss + (net.blocks[j - 1](states[n]) - target).square().sum(-1).mean() / 2
        assert_equal_gradients(gradients(net, step.loss), gradients(net, loss))


class TestTwoNodes:
    """At N = 2 the gradients are multiples of backpropagation's (specification, section 3)."""

    @staticmethod
    def backpropagation(net, x, y):
        return gradients(net, F.cross_entropy(net(x), y))

    @pytest.mark.parametrize("step", [0.05, 0.5, 1.0])
    @pytest.mark.parametrize("variance", [0.3, 1.0, 4.0])
    @every_rule
    def test_gaussian(self, boundary, scope, variance, step):
        net, x, y = mlp(2)
        exact = self.backpropagation(net, x, y)
        objective = hbll.Objective("paper", boundary=boundary, scope=scope, step=step, variance=variance)
        below = step if scope == "block" else 1.0
        expected = {n: g if n.startswith("head") else below * g for n, g in exact.items()}
        assert_equal_gradients(gradients(net, objective(net, x, y).loss), expected)

    @pytest.mark.parametrize("kind", ["convolutional", "transformer"])
    def test_gaussian_with_tokens(self, kind):
        net, x, y = KINDS[kind][0](2)
        logits = net(x)
        exact = gradients(net, F.cross_entropy(logits.flatten(0, -2), y.flatten()))
        expected = {n: g if n.startswith("head") else 0.5 * g for n, g in exact.items()}
        assert_equal_gradients(gradients(net, hbll.Objective("paper")(net, x, y).loss), expected)

    def test_label_variance_divides_everything(self):
        net, x, y = mlp(2)
        exact = self.backpropagation(net, x, y)
        actual = gradients(net, hbll.Objective("paper", label_variance=4.0)(net, x, y).loss)
        assert_equal_gradients(actual, {n: g / 4 if n.startswith("head") else g / 8 for n, g in exact.items()})

    @pytest.mark.parametrize("scope", ["triplet", "tree"])
    @pytest.mark.parametrize("family", ["bernoulli", "categorical"])
    def test_other_families_in_wider_scopes(self, family, scope):
        net, x, y = self.of_family(family)
        actual = gradients(net, hbll.Objective("paper", family=family, scope=scope)(net, x, y).loss)
        assert_equal_gradients(actual, self.backpropagation(net, x, y))

    @staticmethod
    def of_family(family):
        if family == "bernoulli":
            return mlp(2, block=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid()))
        return mlp(2, block=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Softmax(-1)))

    @pytest.mark.parametrize("family", ["bernoulli", "categorical"])
    def test_other_families_to_first_order(self, family):
        net, x, y = self.of_family(family)
        exact = self.backpropagation(net, x, y)

        def error(step):
            """Relative distance of gradient / step from backpropagation's, below the head."""
            found = gradients(net, hbll.Objective("paper", family=family, step=step)(net, x, y).loss)
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

    @every_rule
    def test_inversion_none_sends_nothing_below_the_head_in_block_scope(self, boundary, scope):
        net, x, y = mlp(2)
        exact = self.backpropagation(net, x, y)
        objective = hbll.Objective("paper", inversion="none", boundary=boundary, scope=scope)
        actual = gradients(net, objective(net, x, y).loss)
        for name, gradient in exact.items():
            if name.startswith("head") or scope != "block":
                torch.testing.assert_close(actual[name], gradient)
            else:
                assert (actual[name] == 0).all()


class TestBackpropagation:
    """The preset bp is plain autograd."""

    @every_engine
    @pytest.mark.parametrize("kind", KINDS)
    def test_on_the_chain(self, kind, engine):
        net, x, y = KINDS[kind][0]()
        expected = F.cross_entropy(net(x).flatten(0, -2), y.flatten())
        step = hbll.Objective("bp", engine=engine)(net, x, y)
        torch.testing.assert_close(step.loss.detach(), expected.detach())
        assert_equal_gradients(gradients(net, step.loss), gradients(net, expected))

    @pytest.mark.parametrize("path", ["4-6-7", "rim", 1, 4, [2, 4, 6], [1, 2, 3, 4]])
    def test_on_any_path(self, path):
        net, x, y = mlp(8)
        expected = F.cross_entropy(net(x, path=path), y)
        step = hbll.Objective("bp", path=path)(net, x, y)
        torch.testing.assert_close(step.loss.detach(), expected.detach())
        assert_equal_gradients(gradients(net, step.loss), gradients(net, expected))

    def test_label_variance_scales_the_loss(self):
        net, x, y = mlp()
        step = hbll.Objective("bp", label_variance=5.0)(net, x, y)
        torch.testing.assert_close(step.loss.detach(), F.cross_entropy(net(x), y).detach() / 5)


class TestLosses:
    """The label's loss is the user's."""

    @every_engine
    @pytest.mark.parametrize("preset", ["bp", "paper", "tree"])
    def test_regression(self, preset, engine):
        net, x, _ = mlp(8)
        y = torch.randn(BATCH, CLASSES, dtype=torch.float64)
        step = hbll.Objective(preset, loss=squared_error, engine=engine)(net, x, y)
        if preset == "bp":
            expected = (net(x) - y).square().sum(-1).mean() / 2
            assert_equal_gradients(gradients(net, step.loss), gradients(net, expected))
        last = step.nodes[max(step.nodes)]
        state = step.trace.last[1] if preset == "bp" else step.trace.outputs((7,))[0]
        assert last.error == pytest.approx(((net.head(state) - y).square().sum(-1).mean() / 2).item())

    def test_ignored_labels_under_backpropagation(self):
        net, x, y = transformer(4)
        y = torch.where(torch.rand(y.shape) < 0.4, -100, y)
        expected = F.cross_entropy(net(x).flatten(0, 1), y.flatten())
        step = hbll.Objective("bp")(net, x, y)
        torch.testing.assert_close(step.loss.detach(), expected.detach())
        assert_equal_gradients(gradients(net, step.loss), gradients(net, expected))

    @every_engine
    @pytest.mark.parametrize("preset", ["paper", "tree"])
    def test_ignored_labels_have_no_say(self, preset, engine):
        # At N = 2 the multiples of backpropagation's gradient hold for the mean over the counted labels.
        net, x, y = transformer(2)
        y = torch.where(torch.rand(y.shape) < 0.4, -100, y)
        exact = gradients(net, F.cross_entropy(net(x).flatten(0, 1), y.flatten()))
        below = 0.5 if preset == "paper" else 1.0
        objective = hbll.Objective(preset, engine="auto" if engine == "batched" else engine)
        actual = gradients(net, objective(net, x, y).loss)
        assert objective(net, x, y).nodes[1].error == pytest.approx(
            F.cross_entropy(net(x).flatten(0, 1), y.flatten()).item()
        )
        if preset == "tree":
            assert_equal_gradients(actual, exact)
        else:
            for name, gradient in exact.items():
                if name.startswith("head"):
                    torch.testing.assert_close(actual[name], gradient)
            # The target of a token is moved by its own cross-entropy, whatever number of labels is counted.
            (state,) = [net.blocks[0](net.embed(x)).detach().requires_grad_()]
            total = F.cross_entropy(net.head(state).flatten(0, 1), y.flatten(), reduction="sum")
            (own,) = torch.autograd.grad(total, state)
            torch.testing.assert_close(objective(net, x, y).trace.target[1], state.detach() - below * own)

    @pytest.mark.parametrize("preset", ["bp", "paper", "tree"])
    def test_a_plain_callable_with_one_value_per_sample(self, preset):
        def smooth(prediction, y):
            return F.cross_entropy(prediction, y, reduction="none", label_smoothing=0.1)

        net, x, y = mlp(2)
        exact = gradients(net, F.cross_entropy(net(x), y, label_smoothing=0.1))
        actual = gradients(net, hbll.Objective(preset, loss=smooth)(net, x, y).loss)
        scale = 0.5 if preset == "paper" else 1.0
        assert_equal_gradients(actual, {n: g if n.startswith("head") else scale * g for n, g in exact.items()})

    @pytest.mark.parametrize("preset", ["bp", "paper", "tree"])
    def test_values_and_weights(self, preset):
        # Weighted samples: the mean is over the weights.
        weights = torch.tensor([0.0, 1.0, 2.0, 1.0], dtype=torch.float64)

        def weighted(prediction, y):
            return F.cross_entropy(prediction, y, reduction="none"), weights

        net, x, y = mlp(2)
        loss = (F.cross_entropy(net(x), y, reduction="none") * weights).sum() / weights.sum()
        step = hbll.Objective(preset, loss=weighted)(net, x, y)
        actual, exact = gradients(net, step.loss), gradients(net, loss)
        for name in exact:
            if name.startswith("head") or preset != "paper":
                torch.testing.assert_close(actual[name], exact[name])
        assert step.nodes[1].error == pytest.approx(loss.item())

    def test_a_loss_that_averages_over_the_batch_is_refused(self):
        net, x, y = mlp(4)
        with pytest.raises(ValueError, match="per sample"):
            hbll.Objective("paper", loss=F.cross_entropy)(net, x, y)

    @pytest.mark.parametrize("preset", ["bp", "paper"])
    def test_labels_outside_the_classes(self, preset):
        net, x, _ = mlp(4)
        for label in (CLASSES, -1):
            with pytest.raises(ValueError, match=f"classes 0..{CLASSES - 1}"):
                hbll.Objective(preset)(net, x, torch.full((BATCH,), label))

    @pytest.mark.parametrize("preset", ["paper", "tree"])
    def test_a_finer_grid_of_labels_than_of_tokens(self, preset):
        # Two labels per token: their mean is the error, whatever their number.
        class Doubled(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(WIDTH, CLASSES)

            def forward(self, state):
                return self.linear(state).repeat_interleave(2, 1)

        net, x, y = transformer(2)
        doubled = hbll.TreeNetwork(net.embed, net.blocks, Doubled().double())
        doubled.head.linear.load_state_dict(net.head.state_dict())
        expected = gradients(net, hbll.Objective(preset)(net, x, y).loss)
        loss = hbll.Objective(preset)(doubled, x, y.repeat_interleave(2, 1)).loss
        actual = {
            name.replace("linear.", "") if "head" in name else name: g for name, g in gradients(doubled, loss).items()
        }
        assert_equal_gradients(actual, expected)


class TestNoise:
    """Targets are samples: noise shifts them and nothing else."""

    @every_engine
    @pytest.mark.parametrize("preset", ["paper", "tree"])
    def test_noise_has_the_standard_deviation_asked_for(self, preset, engine):
        net, x, y = mlp(4)
        x, y = x.repeat(500, 1), y.repeat(500)
        torch.manual_seed(0)
        noisy = hbll.Objective(preset, noise=0.3, engine=engine)(net, x, y)
        still = hbll.Objective(preset, engine=engine)(net, x, y)
        # The first node's target depends on no other: noise is all that differs.
        difference = noisy.trace.target[2] - still.trace.target[2]
        assert difference.std().item() == pytest.approx(0.3, rel=0.05)
        assert difference.mean().item() == pytest.approx(0.0, abs=0.02)
        correlation = torch.corrcoef(difference.T) - torch.eye(WIDTH)
        assert correlation.abs().max() < 0.1
        assert not torch.equal(noisy.trace.target[1], noisy.trace.target[3])

    @pytest.mark.parametrize("engine", ["loop", "batched"])
    def test_mean_gradient_in_a_layer_linear_in_the_noise(self, engine):
        # At N = 2 block scope moves f_1 by (a - target): the noise averages out, the head is untouched by it.
        net, x, y = mlp(3)
        objective = hbll.Objective("paper", noise=0.5, engine=engine)
        head = gradients(net, hbll.Objective("paper", engine=engine)(net, x, y).loss)["blocks.0.linear.bias"]
        torch.manual_seed(0)
        draws = torch.stack([gradients(net, objective(net, x, y).loss)["blocks.0.linear.bias"] for _ in range(200)])
        error = draws.std(0) / 200**0.5
        assert (draws.std(0) > 0).all()
        assert ((draws.mean(0) - head).abs() < 5 * error).all()

    def test_no_noise_is_deterministic(self):
        net, x, y = mlp()
        objective = hbll.Objective("paper")
        assert objective(net, x, y).loss.item() == objective(net, x, y).loss.item()


class TestInversion:
    """Targets of the exact inversion solve the linearised arc; those of none are the prior."""

    @every_engine
    @settings(max_examples=10)
    @given(variance=st.floats(0.3, 3), seed=st.integers(0, 100))
    def test_exact_between_linear_blocks_and_at_the_label(self, engine, variance, seed):
        net, x, y = mlp(8, block=lambda: nn.Linear(WIDTH, WIDTH), seed=seed)
        objective = hbll.Objective("paper", inversion="exact", variance=variance, iterations=2 * WIDTH, engine=engine)
        trace = objective(net, x, y).trace
        identity = torch.eye(WIDTH, dtype=torch.float64)
        for n in net.tree.chain:
            prior = net.blocks[n - 1](trace.boundary[net.tree.left(n)]).detach()
            j = net.tree.right(n)
            for b in range(BATCH):
                if j == net.tree.nodes:
                    weight = net.head.weight.detach()
                    p = net.head(prior[b]).softmax(0).detach()
                    fisher = torch.diag(p) - torch.outer(p, p)
                    matrix = identity / variance + weight.T @ fisher @ weight
                    right = -weight.T @ (p - F.one_hot(y[b], CLASSES))
                else:
                    weight = net.blocks[j - 1].weight.detach()
                    residual = trace.target[j][b] - net.blocks[j - 1](prior[b]).detach()
                    matrix, right = (identity + weight.T @ weight) / variance, weight.T @ residual / variance
                expected = prior[b] + torch.linalg.solve(matrix, right)
                torch.testing.assert_close(trace.target[n][b], expected, rtol=1e-6, atol=1e-6)

    def test_none_leaves_the_prior(self):
        net, x, y = mlp()
        step = hbll.Objective("paper", inversion="none")(net, x, y)
        for n in net.tree.chain:
            torch.testing.assert_close(step.trace.target[n], step.trace.outputs((n,))[0])
            assert step.nodes[n].correction == step.nodes[n].divergence == step.nodes[n].distance == 0

    def test_exact_is_for_gaussians(self):
        with pytest.raises(ValueError, match="exact inversion is for Gaussian"):
            hbll.Objective("paper", inversion="exact", family="bernoulli")


class TestFamilies:
    """Bernoulli and Categorical states: both engines agree with a plain transcription of one level."""

    @every_engine
    @pytest.mark.parametrize("family", ["bernoulli", "categorical"])
    def test_targets_and_losses_at_four_nodes(self, family, engine):
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
        step = hbll.Objective("paper", family=family, engine=engine)(net, x, y)
        for n, target in {1: t1, 2: t2, 3: t3}.items():
            torch.testing.assert_close(step.trace.target[n], target)
        torch.testing.assert_close(step.loss.detach(), loss.mean().detach())
        expected = gradients(net, loss.mean())
        for name, gradient in gradients(net, step.loss).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-10)


class TestReports:
    """A report per node, in nats per sample."""

    @every_engine
    @pytest.mark.parametrize("preset", ["paper", "tree"])
    def test_terms_by_brute_force(self, preset, engine):
        net, x, y = mlp(8)
        variance = 2.0
        step = hbll.Objective(preset, variance=variance, engine=engine)(net, x, y)
        _, targets = reference_loss(net, x, y, *RULES[0 if preset == "paper" else 4], variance=variance)
        assert list(step.nodes) == list(net.tree.chain)
        total = 0.0
        for n, report in step.nodes.items():
            prior = net.blocks[n - 1](step.trace.boundary[net.tree.left(n)])
            change = (targets[n] - prior).norm(dim=-1)
            assert report.distance == pytest.approx(change.mean().item())
            assert report.correction == pytest.approx(change.mean().item() / variance)
            assert report.divergence == pytest.approx(change.square().mean().item() / 2 / variance)
            total += report.error + (report.divergence if preset == "paper" else 0.0)
            assert report.rose is None
            assert report.cosine is None
        assert total == pytest.approx(step.loss.item())

    @pytest.mark.parametrize("length", [0.05, 0.5, 1.5])
    @pytest.mark.parametrize("preset", ["paper", "tree"])
    @every_engine
    def test_share_of_samples_whose_objective_rose(self, preset, length, engine):
        torch.manual_seed(1)
        net, x, y = mlp(8, block=lambda: nn.Linear(WIDTH, WIDTH))
        for block in net.blocks:
            nn.init.normal_(block.weight, std=0.5)
        x, y = x.repeat(5, 1) + torch.randn(20, INPUTS), y.repeat(5)
        objective = hbll.Objective(preset, step=length, variance=1.5, engine=engine)
        trace = objective(net, x, y).trace

        def energy(n, state):
            j = net.tree.right(n)
            prior = net.blocks[n - 1](trace.boundary[net.tree.left(n)])
            if j == 8:
                error = F.cross_entropy(net.head(state), y, reduction="none")
            else:
                error = (net.blocks[j - 1](state) - trace.target[j]).square().sum(-1) / 3
            return error + (state - prior).square().sum(-1) / 3

        reports = objective.diagnose(net, x, y)
        shares = []
        for n, report in reports.items():
            prior = net.blocks[n - 1](trace.boundary[net.tree.left(n)])
            rose = energy(n, trace.target[n]) > energy(n, prior)
            shares.append(rose.double().mean().item())
            assert report.rose == pytest.approx(shares[-1])
        assert max(shares) <= 1
        if length == 1.5:
            assert max(shares) > 0.3
        if length == 0.05:
            assert min(shares) < 0.1

    @pytest.mark.parametrize("preset", ["paper", "tree"])
    def test_cosine_is_one_where_the_gradient_is_backpropagations(self, preset):
        net, x, y = mlp(2)
        reports = hbll.Objective(preset).diagnose(net, x, y)
        assert reports[1].cosine == pytest.approx(1.0)
        assert 0 <= reports[1].rose <= 1

    def test_cosine_by_brute_force(self):
        net, x, y = mlp(8)
        objective = hbll.Objective("tree")
        ours = gradients(net, objective(net, x, y).loss)
        exact = gradients(net, F.cross_entropy(net(x), y))
        for n, report in objective.diagnose(net, x, y).items():
            names = [name for name in exact if name.startswith(f"blocks.{n - 1}.")]
            mine, theirs = (torch.cat([g[name].flatten() for name in names]) for g in (ours, exact))
            assert report.cosine == pytest.approx((mine @ theirs / mine.norm() / theirs.norm()).item())

    def test_diagnosis_leaves_gradients_alone(self):
        net, x, y = mlp()
        hbll.Objective("paper").diagnose(net, x, y)
        assert all(p.grad is None for p in net.parameters())

    @pytest.mark.parametrize("look", ["diagnose", "audit", "predict"])
    def test_looking_leaves_running_statistics_alone(self, look):
        blocks = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(3)]
        net = hbll.TreeNetwork(nn.Linear(4, 6), blocks, nn.Linear(6, 3))
        net.blocks[1].eval()
        x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
        if look == "diagnose":
            hbll.Objective("paper").diagnose(net, x, y)
        elif look == "audit":
            hbll.audit(net, hbll.Objective("paper"), x, y)
        else:
            hbll.Objective("scan").predict(net, x, 2)
        assert all(block[1].num_batches_tracked == 0 for block in net.blocks)
        assert [block.training for block in net.blocks] == [True, False, True]

    def test_diagnosis_of_frozen_blocks(self):
        net, x, y = mlp()
        net.blocks.requires_grad_(False)
        reports = hbll.Objective("paper").diagnose(net, x, y)
        assert all(report.cosine is None and report.rose is not None for report in reports.values())


def test_a_wrapped_network_is_to_be_unwrapped():
    net, x, y = mlp()
    with pytest.raises(
        ValueError, match=r"trains a TreeNetwork, not a Sequential; of a wrapper .* hand over its \.module"
    ):
        hbll.Objective("paper")(nn.Sequential(net), x, y)


class TestOrdinaryTraining:
    """Whatever works on a network trained by backpropagation works here."""

    @every_engine
    @pytest.mark.parametrize("preset", ["paper", "tree", "bp"])
    def test_optimizer_with_weight_decay_moves_every_parameter(self, preset, engine):
        net, x, y = mlp()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
        objective = hbll.Objective(preset, engine=engine)
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        losses = []
        for _ in range(30):
            step = objective(net, x, y)
            optimizer.zero_grad()
            step.loss.backward()
            norm = nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            losses.append(F.cross_entropy(net(x), y).item())
            assert norm > 0
        assert losses[-1] < 0.9 * losses[0]
        for name, parameter in net.named_parameters():
            assert not torch.equal(parameter, before[name])
            assert parameter.grad is not None

    def test_clipping_bounds_the_norm(self):
        net, x, y = mlp()
        hbll.Objective("paper")(net, x, y).loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        total = torch.stack([p.grad.norm() for p in net.parameters()]).norm()
        assert total.item() == pytest.approx(1e-3, rel=1e-2)

    @every_engine
    @every_rule
    def test_a_scaled_loss_scales_every_gradient(self, boundary, scope, engine):
        net, x, y = mlp()
        loss = hbll.Objective("paper", boundary=boundary, scope=scope, engine=engine)(net, x, y).loss
        plain = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        scaled = torch.autograd.grad(1024 * loss, list(net.parameters()))
        for one, other in zip(plain, scaled, strict=True):
            torch.testing.assert_close(1024 * one, other, rtol=1e-12, atol=0)

    @every_engine
    @pytest.mark.parametrize("frozen", ["embed", "head", "blocks.2", "blocks"])
    @pytest.mark.parametrize("preset", ["paper", "tree", "bp"])
    def test_frozen_parameters_change_no_other_gradient(self, preset, frozen, engine):
        net, x, y = mlp()
        objective = hbll.Objective(preset, engine=engine)
        expected = gradients(net, objective(net, x, y).loss)
        net.get_submodule(frozen).requires_grad_(False)
        objective(net, x, y).loss.backward()
        for name, parameter in net.named_parameters():
            if name.startswith(frozen):
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, expected[name])

    @every_engine
    @pytest.mark.parametrize("preset", ["paper", "tree", "bp"])
    def test_unused_parameters_get_no_gradient(self, preset, engine):
        class Unused(Layer):
            def __init__(self):
                super().__init__()
                self.spare = nn.Linear(3, 3)

        net, x, y = mlp(block=Unused)
        hbll.Objective(preset, engine=engine)(net, x, y).loss.backward()
        for block in net.blocks:
            assert block.spare.weight.grad is None or (block.spare.weight.grad == 0).all()
            assert block.linear.weight.grad.abs().max() > 0

    @every_engine
    @pytest.mark.parametrize("preset", ["paper", "tree", "bp"])
    @pytest.mark.parametrize(
        ("kind", "dtype"),
        [
            ("mlp", torch.bfloat16),
            ("mlp", torch.float16),
            ("convolutional", torch.bfloat16),
            ("transformer", torch.bfloat16),
        ],
    )
    def test_autocast_stays_close(self, preset, engine, kind, dtype):
        net, x, y = KINDS[kind][0](4)
        net = net.float()
        x = x.float() if x.is_floating_point() else x
        objective = hbll.Objective(preset, engine=engine)
        exact = gradients(net, objective(net, x, y).loss)
        with torch.autocast("cpu", dtype=dtype):
            loss = objective(net, x, y).loss
        found = gradients(net, loss)
        assert loss.dtype == torch.float32
        mine, theirs = (torch.cat([g.flatten() for g in d.values()]) for d in (found, exact))
        assert torch.cosine_similarity(mine, theirs, dim=0) > 0.99
        assert all(g.dtype == torch.float32 for g in found.values())
        # And full precision is back afterwards.
        assert_equal_gradients(gradients(net, objective(net, x, y).loss), exact)

    @pytest.mark.parametrize("preset", ["paper", "tree", "bp"])
    def test_half_precision_networks(self, preset):
        net, x, y = mlp()
        exact = hbll.Objective(preset)(net, x, y).loss.item()
        step = hbll.Objective(preset)(net.to(torch.bfloat16), x.to(torch.bfloat16), y)
        step.loss.backward()
        assert step.loss.item() == pytest.approx(exact, rel=0.05)
        assert net.head.weight.grad.dtype == torch.bfloat16

    @pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at the states' own
    @pytest.mark.parametrize("preset", ["paper", "tree", "bp"])
    def test_compiled_blocks(self, preset):
        net, x, y = mlp(4)
        expected = gradients(net, hbll.Objective(preset)(net, x, y).loss)
        compiled = hbll.TreeNetwork(
            net.embed, [torch.compile(block, backend="eager") for block in net.blocks], net.head
        )
        step = hbll.Objective(preset)(compiled, x, y)
        actual = {n.replace("_orig_mod.", ""): g for n, g in gradients(compiled, step.loss).items()}
        assert_equal_gradients(actual, expected)

    def test_compiled_network(self):
        net, x, y = mlp(4)
        expected = net(x)
        compiled = torch.compile(net, backend="eager")
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(compiled(x, path="rim"), net(x, path="rim"))
        loss = hbll.Objective("paper")(net, x, y).loss
        torch.testing.assert_close(hbll.Objective("paper")(compiled, x, y).loss, loss)

    @every_engine
    @pytest.mark.parametrize("preset", ["paper", "tree", "bp"])
    def test_a_batch_of_one_and_strided_input(self, preset, engine):
        net, x, y = mlp()
        objective = hbll.Objective(preset, engine=engine)
        each = [gradients(net, objective(net, x[b : b + 1], y[b : b + 1]).loss) for b in range(BATCH)]
        strided, labels = x.T.contiguous().T, torch.stack([y, y], 1)[:, 0]
        assert not strided.is_contiguous()
        whole = gradients(net, objective(net, strided, labels).loss)
        # Samples do not see each other: the batch's gradient is the mean of theirs.
        assert_equal_gradients(whole, {n: sum(g[n] for g in each) / BATCH for n in whole})

    @every_engine
    def test_dtype_changes_between_steps(self, engine):
        net, x, y = mlp()
        objective = hbll.Objective("paper", engine=engine)
        exact = objective(net, x, y).loss.item()
        assert objective(net.float(), x.float(), y).loss.item() == pytest.approx(exact, rel=1e-5)
        assert objective(net.double(), x, y).loss.item() == pytest.approx(exact, rel=1e-5)

    def test_two_objectives_on_one_network_and_one_objective_on_two(self):
        (one, x, y), (two, *_) = mlp(8), mlp(5, seed=3)
        paper, tree = hbll.Objective("paper"), hbll.Objective("tree")
        expected = {(o, n): o(n, x, y).loss.item() for o in (paper, tree) for n in (one, two)}
        assert len(set(expected.values())) == 4
        for (objective, net), loss in expected.items():
            assert objective(net, x, y).loss.item() == loss

    @pytest.mark.parametrize("preset", ["paper", "tree", "bp"])
    def test_copies_of_a_used_objective_train_the_network_given(self, preset):
        net, x, y = mlp()
        objective = hbll.Objective(preset)
        expected = gradients(net, objective(net, x, y).loss)
        for duplicate in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
            assert_equal_gradients(gradients(net, duplicate(net, x, y).loss), expected)
            assert duplicate.rule == objective.rule

    def test_copies_of_a_used_network_are_independent(self):
        net, x, y = mlp()
        objective = hbll.Objective("paper")
        expected = gradients(net, objective(net, x, y).loss)
        for duplicate in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert_equal_gradients(gradients(duplicate, objective(duplicate, x, y).loss), expected)
            objective(duplicate, x, y).loss.backward()
        assert all(p.grad is None for p in net.parameters())

    @every_engine
    def test_a_block_replaced_after_the_first_step(self, engine):
        net, x, y = mlp()
        objective = hbll.Objective("paper", engine=engine)
        objective(net, x, y)
        net.blocks[3] = Layer().double()
        expected, _ = reference_loss(net, x, y)
        assert_equal_gradients(gradients(net, objective(net, x, y).loss), gradients(net, expected))

    @every_engine
    def test_a_block_used_twice(self, engine):
        net, x, y = mlp(4)
        first, second, _ = net.blocks
        shared = hbll.TreeNetwork(net.embed, [first, second, first], net.head)
        expected, _ = reference_loss(shared, x, y)
        step = hbll.Objective("paper", engine=engine)(shared, x, y)
        assert_equal_gradients(gradients(shared, step.loss), gradients(shared, expected))


class TestWords:
    """Bad options get one sentence."""

    @pytest.mark.parametrize(
        ("arguments", "options", "sentence"),
        [
            (("papr",), {}, "unknown rule 'papr'; did you mean paper"),
            (("zzz",), {}, "unknown rule 'zzz'; there are paper, tree"),
            ((), {"stepp": 1}, "unknown option 'stepp'; did you mean step"),
            ((), {"family": "gamma"}, "family is one of gaussian, bernoulli, categorical; got 'gamma'"),
            ((), {"scope": "global"}, "scope is one of block, triplet, tree"),
            ((), {"step": 0.0}, "step must be positive"),
            ((), {"variance": -1.0}, "variance must be positive"),
            ((), {"label_variance": float("nan")}, "label_variance must be positive"),
            ((), {"noise": -0.1}, "noise"),
            ((), {"iterations": 0}, "iterations"),
            ((), {"engine": "gpu"}, "engine is one of auto, loop, batched"),
            (("tree",), {"credit": "exact"}, "states='chain'"),
            (("paper",), {"states": "chain"}, "boundary='prior'"),
            (("paper",), {"path": "4-6"}, "path other than the whole chain"),
        ],
    )
    def test_options(self, arguments, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            hbll.Objective(*arguments, **options)

    @pytest.mark.parametrize("engine", ["loop", "batched"])
    @pytest.mark.parametrize("preset", ["paper", "tree", "bp"])
    def test_a_block_that_changes_the_shape(self, preset, engine):
        net, x, y = mlp(8, block=lambda: nn.Linear(WIDTH, WIDTH + 1))
        with pytest.raises(ValueError, match=r"block \d changes the state's shape from \(4, 6\) to \(4, 7\)"):
            hbll.Objective(preset, engine=engine)(net, x, y)

    @pytest.mark.parametrize("engine", ["loop", "batched"])
    @pytest.mark.parametrize("preset", ["paper", "tree", "scan", "bp"])
    def test_a_block_or_embed_that_returns_more_than_a_state(self, preset, engine):
        class Two(nn.Linear):
            def forward(self, state):
                return super().forward(state), state

        net, x, y = mlp(8, block=lambda: Two(WIDTH, WIDTH))
        with pytest.raises(ValueError, match=r"block.* returns a tuple; it must return a state, which is one tensor"):
            hbll.Objective(preset, engine=engine)(net, x, y)
        net, x, y = mlp(8)
        net.embed = Two(INPUTS, WIDTH).double()
        with pytest.raises(ValueError, match="embed returns a tuple; it must return a state, which is one tensor"):
            hbll.Objective(preset, engine=engine)(net, x, y)

    def test_a_path_that_is_none(self):
        net, x, y = mlp()
        with pytest.raises(ValueError, match="4-7 is not a path"):
            hbll.Objective("bp", path="4-7")(net, x, y)
