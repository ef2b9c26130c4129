"""Cuts. Oracles: the model itself, and all ways to cut by brute force."""

import copy
import pickle
from itertools import combinations, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hbll
from hbll.cut import at_blocks, cut, even


def chain(*blocks):
    return hbll.Chain(nn.Identity(), blocks, nn.Identity())


def linear(*sizes):
    """Linear blocks of so many units, and a ReLU after each."""
    layers = [layer for before, after in pairwise(sizes) for layer in (nn.Linear(before, after), nn.ReLU())]
    return chain(*layers)


class TestStages:
    """Stages are consecutive blocks, all of them."""

    @given(st.integers(1, 9), st.data())
    def test_they_are_the_chain(self, count, data):
        net = chain(*(nn.Linear(2, 2) for _ in range(count)))
        size = data.draw(st.none() | st.integers(1, 10) | st.lists(st.integers(1, 4), min_size=1, max_size=9))
        if isinstance(size, list) and sum(size) != count:
            with pytest.raises(ValueError, match=rf"add up to {sum(size)} blocks; the network has {count}$"):
                cut(net, size)
            return
        stages = cut(net, size)
        assert [block for stage in stages for block in stage.blocks] == list(net.blocks)
        assert [n for stage in stages for n in stage.numbers] == list(range(1, count + 1))
        sizes = [len(stage.blocks) for stage in stages]
        if isinstance(size, list):
            assert sizes == size
        elif size is not None:
            assert all(s == size for s in sizes[:-1])
            assert sizes[-1] <= size
        else:
            assert sizes == [count]
        state = x = torch.randn(3, 2)
        for stage in stages:
            state = stage(state)
        assert state.equal(net(x))

    def test_what_messages_call_them(self):
        net = chain(*(nn.Identity() for _ in range(6)))
        assert [stage.title for stage in cut(net, (1, 2, 3))] == [
            "block 1",
            "stage 2 (blocks 2-3)",
            "stage 3 (blocks 4-6)",
        ]

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_a_block_inside_that_returns_no_state_is_named(self, size):
        *_, stage = cut(chain(nn.Identity(), nn.Identity(), hbll.part(lambda state: [state])), size)
        with pytest.raises(ValueError, match=r"^block 3 returns a list"):
            stage(torch.ones(1))

    def test_each_block_takes_what_it_names_of_the_context(self):
        (stage,) = cut(chain(hbll.part(lambda z, by: z * by), hbll.part(lambda z, plus: z + plus), nn.Identity()), None)
        assert stage(torch.ones(1), by=3.0, plus=2.0) == 5

    @pytest.mark.parametrize(
        ("size", "sentence"),
        [
            (0, "stage must be at least 1; got 0"),
            ((2, 0, 4), r"stage must be at least 1; got \(2, 0, 4\)"),
            ((), r"stage must be at least 1; got \(\)"),
            (2.0, "stage is a whole number, or one for every stage; got 2.0"),
            ("23", "stage is a whole number, or one for every stage; got '23'"),
            ((2, 3), "stages of 2, 3 add up to 5 blocks; the network has 6"),
        ],
    )
    def test_sizes_that_cannot_be(self, size, sentence):
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            cut(chain(*(nn.Identity() for _ in range(6))), size)

    @pytest.mark.parametrize("network", [nn.Sequential(nn.Linear(2, 2)), nn.DataParallel(linear(2, 2)), None])
    def test_what_is_no_chain_is_refused(self, network):
        with pytest.raises(
            ValueError, match=rf"trains a hbll.Chain, not a {type(network).__name__}; a wrapper .* around"
        ):
            hbll.make_rule("bp", network)


class TestEven:
    """Sizes of stages that are as even as can be."""

    @given(st.integers(1, 6), st.data())
    def test_stages_keep_blocks_without_parameters_with_the_one_before(self, layers, data):
        net = linear(*[2] * (layers + 1))
        count = data.draw(st.integers(1, layers))
        stages = cut(net, even(net, count, data.draw(st.sampled_from(["count", "parameters"]))))
        assert len(stages) == count
        assert all(isinstance(stage.blocks[-1], nn.ReLU) for stage in stages)

    def test_those_at_the_start_go_with_the_first_that_has_some(self):
        net = chain(nn.ReLU(), nn.Tanh(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
        assert even(net, 2) == (4, 1)

    @given(st.integers(1, 12), st.data())
    def test_by_count_they_differ_by_one_at_most(self, layers, data):
        count = data.draw(st.integers(1, layers))
        sizes = even(chain(*(nn.Linear(1, 1) for _ in range(layers))), count)
        assert sum(sizes) == layers
        assert list(sizes) == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1

    @given(st.lists(st.integers(1, 9), min_size=2, max_size=7), st.data())
    def test_by_parameters_no_other_cut_has_a_smaller_largest_stage(self, sizes, data):
        layers = len(sizes) - 1
        count = data.draw(st.integers(1, layers))
        net = linear(*sizes)
        weights = [(before + 1) * after for before, after in pairwise(sizes)]
        best = min(
            max(sum(weights[a:b]) for a, b in pairwise((0, *places, layers)))
            for places in combinations(range(1, layers), count - 1)
        )
        stages = cut(net, even(net, count, "parameters"))
        assert max(sum(p.numel() for p in stage.parameters()) for stage in stages) == best

    @pytest.mark.parametrize("count", [0, 3])
    def test_there_are_no_more_stages_than_blocks_with_parameters(self, count):
        with pytest.raises(ValueError, match=rf"2 blocks with parameters: cut it into 1\.\.2 stages, not {count}"):
            even(linear(2, 3, 4), count)

    def test_an_unknown_balance_is_refused(self):
        with pytest.raises(ValueError, match="unknown balance 'size'"):
            even(linear(2, 3, 4), 2, "size")


class TestAtBlocks:
    """Sizes of stages that begin with named blocks."""

    @given(st.sets(st.integers(1, 6)))
    def test_stages_begin_there(self, starts):
        net = chain(*(nn.Identity() for _ in range(7)))
        stages = cut(net, at_blocks(net, [f"blocks.{i}" for i in sorted(starts)]))
        assert [stage.numbers[0] for stage in stages] == [1, *(i + 1 for i in sorted(starts))]

    def test_a_block_that_there_is_not(self):
        with pytest.raises(ValueError, match=r"unknown block 'block\.2'; did you mean blocks\.2"):
            at_blocks(linear(2, 3, 4), ["block.2"])

    @pytest.mark.parametrize("starts", [["blocks.0"], ["blocks.2", "blocks.1"], ["blocks.2", "blocks.2"]])
    def test_out_of_order(self, starts):
        with pytest.raises(ValueError, match="in the order of the network, after the first"):
            at_blocks(linear(2, 3, 4), starts)


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
