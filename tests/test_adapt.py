"""Models of others, cut at their modules. Oracle: the model itself, its modules, function and gradients."""

import copy
import functools
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hbll


class Model(nn.Module):
    """Of others: nested, with a function and a parameter of its own between the modules."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"stem": nn.Linear(5, 6), "layers": nn.Sequential(*(self.layer() for _ in range(3)))})
        self.gain = nn.Parameter(torch.rand(6))
        self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 3)

    @staticmethod
    def layer():
        return nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh())

    def forward(self, x):
        state = F.relu(self.body["stem"](x))
        return self.fc(F.silu(self.norm(self.body["layers"](state)) * self.gain))


STARTS = ["body.layers.0", "body.layers.1", "body.layers.2", "norm"]


def model(kind=Model):
    torch.manual_seed(0)
    return kind().double(), torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])


class TestModelsOfOthers:
    """A model that is cut is the model: its modules, its function, its gradients."""

    def test_it_shares_modules_and_computes_the_same(self):
        whole, x, y = model()
        net = hbll.Chain.cut(whole, STARTS)
        assert list(net.blocks) == list(whole.body["layers"])  # the user's own modules
        assert set(net.parameters()) == set(whole.parameters())
        torch.testing.assert_close(net(x), whole(x), rtol=0, atol=0)
        hbll.make_rule("bp", net)(x, y).loss.backward()
        found = {p: p.grad.clone() for p in whole.parameters()}
        whole.zero_grad()
        F.cross_entropy(whole(x), y).backward()
        for parameter, gradient in found.items():
            torch.testing.assert_close(gradient, parameter.grad)
        assert whole.body["layers"][0][1].num_batches_tracked == 4

    @pytest.mark.parametrize("rule", ["paper", "stream", "dgl"])
    def test_every_rule_trains_it(self, rule):
        whole, x, y = model()
        before = copy.deepcopy(whole.state_dict())
        rule = hbll.make_rule(rule, hbll.Chain.cut(whole, STARTS), example=x)
        optimizer = torch.optim.SGD(rule.parameters(), lr=0.1)
        for _ in range(6):
            rule.backward(x, y)
        optimizer.step()
        assert all(not torch.equal(parameter, before[name]) for name, parameter in whole.named_parameters())

    def test_functions_between_modules_go_with_the_one_before(self):
        class Plain(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 3)

            def forward(self, x):
                return self.c(F.relu(self.b(F.relu(self.a(x))))) * 2

        whole, x, _ = model(Plain)
        net = hbll.Chain.cut(whole, ["b", "c"])
        torch.testing.assert_close(net.embed(x), F.relu(whole.a(x)))
        torch.testing.assert_close(net.blocks[0](net.embed(x)), F.relu(whole.b(F.relu(whole.a(x)))))
        torch.testing.assert_close(net(x), whole(x))

    @pytest.mark.parametrize("nested", [False, True])
    def test_a_sequential(self, nested):
        torch.manual_seed(0)
        layers = [nn.Linear(5, 6), *(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)), nn.Linear(6, 3)]
        whole = nn.Sequential(layers[0], nn.Sequential(*layers[1:4]), layers[4]) if nested else nn.Sequential(*layers)
        starts = ["1.0", "1.1", "1.2", "2"] if nested else ["1", "2", "3", "4"]
        net = hbll.Chain.cut(whole, starts, feature_dim=-1)
        assert [net.embed, *net.blocks, net.head] == layers
        assert net.feature_dim == -1
        # Two of the layers in one block.
        x = torch.randn(4, 5)
        wide = hbll.Chain.cut(whole, [starts[0], starts[2], starts[3]])
        assert [len(list(block.parameters())) for block in wide.blocks] == [4, 2]
        torch.testing.assert_close(wide(x), whole(x), rtol=0, atol=0)

    def test_modes_and_copies_follow(self, tmp_path):
        whole, x, _ = model()
        net = hbll.Chain.cut(whole, STARTS)
        assert whole.training  # as it was
        for duplicate in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            torch.testing.assert_close(duplicate.eval()(x), whole.eval()(x))
            assert not set(duplicate.parameters()) & set(whole.parameters())
        net.save(tmp_path)
        other = hbll.Chain.cut(Model().double(), STARTS)
        other.load(tmp_path)
        torch.testing.assert_close(other.eval()(x), net.eval()(x))

    @pytest.mark.parametrize(
        ("starts", "sentence"),
        [
            (["body.layer.0", "norm"], "unknown module 'body.layer.0'; did you mean body.layers.0"),
            (["norm"], "name the modules that start each block, and the one that starts the head: two at least"),
            ([], "two at least"),
            (
                ["body.layers.1", "body.layers.0", "norm"],
                "runs through these modules in another order: body.layers.1, ",
            ),
            (["body.layers.1", "body.layers.1", "norm"], "another order"),
            (["body.stem", "body.layers.0", "norm"], "nothing lies before body.stem: the embed would be empty"),
        ],
    )
    def test_cuts_that_cannot_be(self, starts, sentence):
        with pytest.raises(ValueError, match=sentence):
            hbll.Chain.cut(model()[0], starts)

    def test_more_than_one_state_across_a_cut(self):
        class Skipping(Model):
            def forward(self, x):
                stem = self.body["stem"](x)
                return self.fc(self.norm(self.body["layers"](stem)) + stem)

        with pytest.raises(
            ValueError, match=r"more than one state crosses a cut of the model \(.*\): move the cut, or cut"
        ):
            hbll.Chain.cut(model(Skipping)[0], STARTS)

        class Looking(Model):
            def forward(self, x):
                state = self.body["layers"](self.body["stem"](x))
                return self.fc(self.norm(state)), state

        with pytest.raises(ValueError, match="more than one state crosses a cut"):
            hbll.Chain.cut(model(Looking)[0], STARTS)

    def test_a_module_that_the_model_does_not_call(self):
        class Idle(Model):
            def forward(self, x):
                return self.fc(self.body["layers"](self.body["stem"](x)))

        with pytest.raises(ValueError, match="the model does not call norm"):
            hbll.Chain.cut(model(Idle)[0], STARTS)

    def test_a_model_that_decides_by_values(self):
        class Branching(Model):
            def forward(self, x):
                return super().forward(x if x.sum() > 0 else -x)

        with pytest.raises(ValueError, match=r"^a Branching does more than hand one tensor on \(.*hbll.part"):
            hbll.Chain.cut(model(Branching)[0], STARTS)

    def test_a_model_that_is_another_one_in_training(self):
        class Dropping(Model):
            def forward(self, x):
                return super().forward(F.dropout(x, 0.5, self.training))

        with pytest.raises(ValueError, match=r"depends on whether it trains, as F.dropout.* make that a module"):
            hbll.Chain.cut(model(Dropping)[0], STARTS)

    @pytest.mark.parametrize("seed", range(6))
    def test_a_model_that_draws_which_layers_it_has(self, seed):
        class LayerDrop(Model):
            def forward(self, x):
                return super().forward(x * 2 if self.training and torch.rand(()).item() < 0.1 else x)

        whole = model(LayerDrop)[0]
        torch.manual_seed(seed)
        with pytest.raises(ValueError, match="draws random numbers between these modules, as layer drop does"):
            hbll.Chain.cut(whole, STARTS)

    def test_what_is_not_sequential_is_cut_by_hand(self):
        # A mask reaches every block as context; the layers are the model's own.
        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
                self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

            def layer(self, i, state, mask):
                return state + torch.tanh(self.layers[i](state)) * mask

            def forward(self, x):
                mask, state = (x[:, :1] > 0).to(x), self.stem(x)
                for i in range(3):
                    state = self.layer(i, state, mask)
                return self.head(state)

        whole, x, y = model(Masked)
        net = hbll.Chain(
            hbll.part(lambda x: (whole.stem(x), {"mask": (x[:, :1] > 0).to(x)}), whole.stem),
            [hbll.part(lambda z, mask, i=i: whole.layer(i, z, mask), layer) for i, layer in enumerate(whole.layers)],
            whole.head,
        )
        torch.testing.assert_close(net(x), whole(x), rtol=0, atol=0)
        hbll.make_rule("bp", net).backward(x, y)
        found = [p.grad.clone() for p in whole.parameters()]
        whole.zero_grad()
        F.cross_entropy(whole(x), y).backward()
        for gradient, parameter in zip(found, whole.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)


class TestWhatIsEasilyLost:
    def test_statements_in_place_are_kept(self):
        class InPlace(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.block, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
                self.activation = nn.ReLU(inplace=True)

            def forward(self, x):
                x = self.first(x)
                x.relu_()
                y = self.block(x)
                y.add_(1.0)
                self.activation(y)
                return self.head(y)

        model, x = InPlace(), torch.randn(4, 5)
        torch.testing.assert_close(hbll.Chain.cut(model, at=["block", "head"])(x), model(x))

    def test_copies_of_parts_call_their_own_modules(self):
        def made():
            linear = nn.Linear(6, 3)

            def inner(state):
                return linear(state)

            def outer(state, *, scale=(inner, 2.0)):
                return scale[1] * inner(state)

            return hbll.part(outer, linear)

        original = made()
        twin, x = copy.deepcopy(original), torch.randn(4, 6)
        with torch.no_grad():
            original.used[0].weight.zero_()
            original.used[0].bias.zero_()
        assert twin(x).abs().min() > 0
        torch.testing.assert_close(twin(x), 2 * twin.used[0](x))

    @pytest.mark.parametrize("how", ["partial", "list", "tuple", "dict"])
    def test_so_do_those_of_functions_that_something_holds(self, how):
        def made():
            linear = nn.Linear(6, 3)

            def scaled(state, scale):
                return scale * linear(state)

            held = {
                "partial": functools.partial(scaled, scale=2.0),
                "list": [lambda state: scaled(state, 2.0)],
                "tuple": (lambda state: scaled(state, 2.0), 1),
                "dict": {0: lambda state: scaled(state, 2.0)},
            }[how]
            return hbll.part(held if how == "partial" else lambda state: held[0](state), linear)

        original = made()
        twin, x = copy.deepcopy(original), torch.randn(4, 6)
        with torch.no_grad():
            original.used[0].weight.zero_()
        torch.testing.assert_close(twin(x), 2 * twin.used[0](x))

    @pytest.mark.parametrize("held", [[], {}])
    def test_what_parts_share_their_copies_share(self, held):
        def put(x):
            held.update(x=x) if isinstance(held, dict) else held.append(x)
            return x

        def take(z):
            return z + (held.pop("x") if isinstance(held, dict) else held.pop())

        net = hbll.Chain(hbll.part(put), [nn.Linear(5, 5)], hbll.part(functools.partial(take)))
        x = torch.randn(4, 5)
        torch.testing.assert_close(copy.deepcopy(net)(x), net(x))
        assert not held
        itself = [lambda z: z]
        itself.append(itself)
        twin = copy.deepcopy(hbll.part(lambda z: itself[1][0](z)))
        torch.testing.assert_close(twin(x), x)

    def test_a_global_module_of_an_attributes_name_is_no_hindrance(self, monkeypatch):
        linear, x = nn.Linear(6, 3), torch.randn(4, 6)
        held = SimpleNamespace(project=linear)
        reads = hbll.part(lambda state: held.project(state), linear)
        monkeypatch.setitem(globals(), "project", nn.Linear(1, 1))
        torch.testing.assert_close(copy.deepcopy(reads)(x), linear(x))

    def test_modules_that_nothing_would_train_are_asked_for(self):
        linear = nn.Linear(6, 3)
        with pytest.raises(ValueError, match="handed over"):
            hbll.part(lambda state: linear(state))
        assert list(hbll.part(linear).parameters()) == list(linear.parameters())


class Reading(nn.Module):
    """A model whose layers read a tensor beside their own weights."""

    def __init__(self, what):
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 3)
        self.plain = torch.ones(6)
        self.register_buffer("table", torch.rand(6))
        self.scale = nn.Parameter(torch.rand(6))
        self.what = what

    def forward(self, x):
        state = self.embed(x)
        for layer in self.layers:
            state = torch.tanh(layer(state)) * (torch.arange(6) if self.what == "made" else getattr(self, self.what))
        return self.head(state)


AT = ["layers.0", "layers.1", "layers.2", "head"]


@pytest.mark.parametrize("what", ["plain", "made"])
def test_a_tensor_that_tracing_would_freeze_is_refused(what):
    with pytest.raises(ValueError, match="neither its parameter nor its buffer and that the parts would keep as it is"):
        hbll.Chain.cut(Reading(what), AT)


@pytest.mark.parametrize("what", ["table", "scale"])
def test_a_models_own_tensor_is_shared_by_the_parts_that_read_it(what):
    model, x = Reading(what), torch.randn(4, 5)
    chain = hbll.Chain.cut(model, AT)
    torch.testing.assert_close(chain(x), model(x))
    parameters = [p for name, p in model.named_parameters() if what == "scale" or name != "scale"]
    assert {id(p) for p in chain.parameters()} == {id(p) for p in parameters}
    found, expected = (torch.autograd.grad(net(x).square().sum(), parameters) for net in (chain, model))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
