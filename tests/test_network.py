"""The network. Oracle: calling its modules by hand."""

import copy
import json
import math
import pickle

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.networks import mlp
from torch import nn

import hbll
from hbll.calls import Readout
from hbll.files import write_tensors
from hbll.modes import evaluating
from hbll.tree import format_path

WIDTH, BATCH, INPUTS, CLASSES = 4, 3, 5, 2


def network(blocks=7, seed=0, **options):
    torch.manual_seed(seed)
    made = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(blocks)]
    return hbll.Chain(embed=nn.Linear(INPUTS, WIDTH), blocks=made, head=nn.Linear(WIDTH, CLASSES), **options)


def along(net, x, path):
    state = net.embed(x)
    for n in path:
        state = net.blocks[n - 1](state)
    return net.head(state)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


X = torch.randn(BATCH, INPUTS, generator=torch.Generator().manual_seed(0))


@given(st.integers(1, 9), st.data())
def test_forward_along_any_path(blocks, data):
    net = network(blocks)
    path = data.draw(st.sampled_from(list(net.tree.paths())))
    expected = along(net, X, path)
    for way in (path, list(path), format_path(path)):
        same(net(X, path=way), expected)
    same(net.sequential(path)(X), expected)


def test_names_and_budgets():
    net = network(7)
    chain = (1, 2, 3, 4, 5, 6, 7)
    for path, blocks in [
        (None, chain),
        ("chain", chain),
        ("rim", (4, 6, 7)),
        (1, (4,)),
        (2, (4, 6)),
        (4, (4, 5, 6, 7)),
        (7, chain),
        (net.tree.path(blocks=3), (4, 6, 7)),
    ]:
        assert net.resolve(path) == blocks
        same(net(X, path=path), along(net, X, blocks))
    same(net(X), along(net, X, chain))


@pytest.mark.parametrize("path", ["4-7", [4, 7], 0, 8, "nonsense", [], "1-2"])
def test_what_is_no_path(path):
    with pytest.raises(ValueError, match="path"):
        network(7)(X, path=path)


@pytest.mark.parametrize("blocks", [1, 2, 5, 7])
def test_tree_has_a_node_per_block_and_the_label(blocks):
    assert network(blocks).tree.nodes == blocks + 1


def test_no_block():
    with pytest.raises(ValueError, match="at least one block"):
        hbll.Chain(nn.Identity(), [], nn.Identity())


def test_readouts_are_the_chain_and_the_rim_cut_short():
    def found(blocks):
        return [(readout.name, readout.path, readout.blocks) for readout in network(blocks).readouts]

    assert found(7) == [
        ("1-2-3-4-5-6-7", (1, 2, 3, 4, 5, 6, 7), 7),
        ("block-4", (4,), 1),
        ("4-6", (4, 6), 2),
        ("4-6-7", (4, 6, 7), 3),
    ]
    assert found(1) == [("block-1", (1,), 1)]
    assert network(7).readout("rim") == network(7).readout("4-6-7") == Readout("4-6-7", (4, 6, 7), 3)
    assert network(3).readout("chain") == Readout("1-2-3", (1, 2, 3), 3)
    assert network(7).readout("3") == network(7).readout("rim")
    assert network(7).resolve("4") == network(7).resolve(4) == (4, 5, 6, 7)
    with pytest.raises(ValueError, match="'tree' is not a path"):
        network(3).readout("tree")


class TestShapes:
    """States may change shape where blocks are called in order, and must not where some are left out."""

    @staticmethod
    def narrowing():
        torch.manual_seed(0)
        blocks = [nn.Linear(before, after) for before, after in ((8, 6), (6, 6), (6, 4))]
        return hbll.Chain(nn.Linear(INPUTS, 8), blocks, nn.Linear(4, CLASSES))

    def test_the_chain(self):
        net = self.narrowing()
        same(net(X), along(net, X, (1, 2, 3)))
        same(net(X, path=[1, 2, 3]), along(net, X, (1, 2, 3)))

    def test_a_path_that_leaves_blocks_out_names_the_block(self):
        with pytest.raises(ValueError, match=r"^block 1 changes the state's shape from \(3, 8\) to \(3, 6\); .*order"):
            self.narrowing()(X, path=[1, 2])
        net = self.narrowing()
        net.embed = nn.Linear(INPUTS, 6)
        with pytest.raises(ValueError, match=r"^block 3 changes the state's shape from \(3, 6\) to \(3, 4\)"):
            net(X, path=[2, 3])

    def test_states_of_tokens_and_images(self):
        tokens = hbll.Chain(nn.Embedding(9, WIDTH), [nn.LayerNorm(WIDTH) for _ in range(3)], nn.Linear(WIDTH, 9))
        assert tokens(torch.randint(9, (BATCH, 6))).shape == (BATCH, 6, 9)
        images = hbll.Chain(nn.Conv2d(1, 4, 3), [nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)], nn.Flatten())
        assert images(torch.randn(BATCH, 1, 6, 5), path="rim").shape == (BATCH, 4 * 4 * 3)

    @pytest.mark.parametrize(
        ("shape", "feature_dim", "expected"),
        [
            ((3, 4), None, -1),
            ((3, 5, 4), None, -1),
            ((3, 4, 6, 5), None, -3),
            ((3, 4, 2, 6, 5), None, -4),
            ((3, 4, 5), 1, -2),
            ((3, 6, 5, 4), -1, -1),
            ((3, 6, 5, 4), 3, -1),
            ((3, 4), 1, -1),
        ],
    )
    def test_dimension_of_the_features(self, shape, feature_dim, expected):
        assert network(1, feature_dim=feature_dim).features(torch.zeros(shape)) == expected


class Scaled(nn.Module):
    """A block that takes a scale beside the state and returns what it has seen beside the new one."""

    def forward(self, state, scale):
        return state * scale, "seen"


class Shifted(nn.Module):
    def forward(self, state, *, shift=0.0):
        return state + shift


class Any(nn.Module):
    """Takes whatever there is."""

    def forward(self, state, **context):
        self.seen = set(context)
        return state + context["shift"]


def with_context(blocks, head=None, **context):
    """A chain whose embed returns the input and that context."""
    return hbll.Chain(hbll.part(lambda x: (x, context)), blocks, head or nn.Identity())


class TestContext:
    """What travels with the batch reaches those that name it."""

    def test_each_block_gets_what_it_names(self):
        anything = Any()
        net = with_context([Scaled(), Shifted(), nn.Identity(), anything], scale=2.0, shift=torch.ones(1))
        same(net(X), X * 2 + 1 + 1)
        assert anything.seen == {"scale", "shift"}
        same(net(X, path=[2, 3]), X + 1)

    def test_the_head_does_too(self):
        same(with_context([nn.Identity()], head=Shifted(), shift=3.0)(X), X + 3)

    def test_an_entry_that_nothing_takes_is_named(self):
        net = with_context([Shifted(), nn.Identity()], shift=1.0, mask=torch.ones(1))
        with pytest.raises(ValueError, match="has an entry 'mask', which neither a block nor the head takes"):
            net(X)
        # The state's own name is none of the context's.
        with pytest.raises(ValueError, match="has an entry 'state'"):
            with_context([Shifted()], state=1.0)(X)

    def test_a_function_without_a_signature_takes_nothing(self):
        same(with_context([hbll.part(torch.tanh), Shifted()], shift=1.0)(X), X.tanh() + 1)

    def test_a_block_that_returns_a_tuple(self):
        # Of which the first item is the state, with a context or without.
        class Pair(nn.Linear):
            def forward(self, state):
                return super().forward(state), None

        torch.manual_seed(0)
        net = hbll.Chain(nn.Identity(), [Pair(INPUTS, INPUTS), Pair(INPUTS, INPUTS)], nn.Identity())
        first, second = net.blocks
        same(net(X), second(first(X)[0])[0])

    @pytest.mark.parametrize(
        ("module", "sentence"),
        [
            (lambda x: [x], "returns a list; it must return a state, which is one tensor"),
            (lambda x: (None, x), "returns a NoneType; it must return a state, which is one tensor"),
            (lambda x: (), "returns a tuple; it must return a state, which is one tensor"),
            (lambda x: {"state": x}, "returns a dict; it must return a state, which is one tensor"),
        ],
    )
    @pytest.mark.parametrize("place", ["embed", "block 2"])
    def test_what_is_no_state_is_named(self, place, module, sentence):
        parts = [nn.Identity(), nn.Identity(), nn.Identity()]
        parts[0 if place == "embed" else 2] = hbll.part(module)
        with pytest.raises(ValueError, match=f"^{place} {sentence}$"):
            hbll.Chain(parts[0], parts[1:], nn.Identity())(X)

    @pytest.mark.parametrize("more", [(1.0,), (1.0, {}), ({}, {})])
    def test_embed_returns_a_state_or_a_pair(self, more):
        net = hbll.Chain(hbll.part(lambda x: (x, *more)), [nn.Identity()], nn.Identity())
        with pytest.raises(
            ValueError, match="embed returns a state, or a pair of a state and a context, which is a dict"
        ):
            net(X)


def test_a_part_registers_the_modules_that_its_function_uses():
    model = nn.ModuleDict({"first": nn.Linear(INPUTS, WIDTH), "second": nn.Linear(WIDTH, WIDTH)})
    both = hbll.part(lambda x, gain=1.0: gain * model["second"](model["first"](x)), model["first"], model["second"])
    assert list(both.parameters()) == list(model.parameters())
    same(both(X), model["second"](model["first"](X)))
    same(both(X, gain=2.0), 2 * both(X))
    both.eval()
    assert not model["first"].training


def test_evaluation_mode_is_left_as_it_was_found():
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(), nn.Linear(2, 2))
    network[1].eval()
    with evaluating(network):
        assert not any(module.training for module in network.modules())
        network(torch.randn(4, 2))
    assert [module.training for module in network] == [True, False, True]
    assert network[0].num_batches_tracked == 0


class TestModules:
    """The modules stay the user's."""

    def test_state_dict_is_that_of_ordinary_modules(self):
        net = network(3)
        expected = {f"blocks.{n}.0.{p}" for n in range(3) for p in ("weight", "bias")}
        expected |= {f"{part}.{p}" for part in ("embed", "head") for p in ("weight", "bias")}
        assert set(net.state_dict()) == expected
        hbll.make_rule("paper", net)(X, torch.zeros(BATCH, dtype=torch.long)).loss.backward()
        assert set(net.state_dict()) == expected
        other = network(3, seed=1)
        other.load_state_dict(net.state_dict())
        same(other(X), net(X))

    def test_from_a_trained_sequential_and_back(self):
        torch.manual_seed(0)
        layers = [nn.Linear(INPUTS, WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(3)), nn.Linear(WIDTH, CLASSES)]
        plain = nn.Sequential(*layers)
        before = plain(X)
        net = hbll.Chain(embed=plain[0], blocks=plain[1:-1], head=plain[-1])
        same(net(X), before)
        rule = hbll.make_rule("paper", net)
        rule(X, torch.zeros(BATCH, dtype=torch.long)).loss.backward()
        torch.optim.SGD(rule.parameters(), lr=0.1).step()
        # The modules are shared: the plain network has learnt.
        same(plain(X), net(X))
        assert not torch.equal(plain(X), before)
        back = net.sequential()
        assert isinstance(back, nn.Sequential)
        assert all(a is b for a, b in zip(back.parameters(), plain.parameters(), strict=True))
        assert len(net.sequential("rim")) == 2 + len(net.tree.rim)

    def test_copies_are_independent(self):
        net = network(3)
        for duplicate in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            same(duplicate(X), net(X))
            with torch.no_grad():
                duplicate.head.bias += 1
            assert not torch.equal(duplicate(X), net(X))

    def test_a_network_may_be_compiled(self):
        net = network(3)
        compiled = torch.compile(net, backend="eager")
        torch.testing.assert_close(compiled(X), net(X))
        torch.testing.assert_close(compiled(X, path="rim"), net(X, path="rim"))


class TestFiles:
    """Save and load."""

    def test_round_trip(self, tmp_path):
        net = network(7)
        net.save(tmp_path / "a" / "b")
        other = network(7, seed=1)
        assert not torch.equal(other(X), net(X))
        other.load(tmp_path / "a" / "b")
        same(other(X), net(X))
        for name, parameter in net.state_dict().items():
            assert torch.equal(other.state_dict()[name], parameter)

    def test_formats_are_open(self, tmp_path):
        net = network(3)
        net.save(tmp_path)
        weights = safetensors.torch.load_file(tmp_path / "weights.safetensors")
        assert set(weights) == set(net.state_dict())
        assert json.loads((tmp_path / "network.json").read_text())["blocks"] == 3

    def test_buffers_and_shared_modules(self, tmp_path):
        def make(seed):
            torch.manual_seed(seed)
            block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
            return hbll.Chain(nn.Linear(INPUTS, WIDTH), [block, block, nn.Identity()], nn.Linear(WIDTH, CLASSES))

        net, other = make(0), make(1)
        net(X)  # moves the running statistics
        net.save(tmp_path)
        other.load(tmp_path)
        same(other.eval()(X), net.eval()(X))
        assert other.blocks[0] is other.blocks[1]

    @pytest.mark.parametrize(
        "other",
        [
            lambda: network(6),
            lambda: network(7, feature_dim=-1),
            lambda: hbll.Chain(nn.Linear(INPUTS, 9), [nn.Linear(9, 9) for _ in range(7)], nn.Linear(9, CLASSES)),
        ],
    )
    def test_another_network_is_refused_and_left_as_it_was(self, tmp_path, other):
        network(7).save(tmp_path)
        net = other()
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ValueError, match="holds another network"):
            net.load(tmp_path)
        assert all(torch.equal(p, before[n]) for n, p in net.state_dict().items())

    @pytest.mark.parametrize("damage", ["nothing there", "no weights", "half the weights", "half a description"])
    def test_a_damaged_folder_is_said_to_be(self, tmp_path, damage):
        net = network(3)
        if damage != "nothing there":
            net.save(tmp_path)
            file = tmp_path / ("network.json" if "description" in damage else "weights.safetensors")
            content = file.read_bytes()
            file.unlink() if damage == "no weights" else file.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="holds no saved network, or a damaged one"):
            net.load(tmp_path)

    @pytest.mark.parametrize("content", ["{}", "[]", "3", "null"])
    def test_a_description_of_nothing_is_refused(self, tmp_path, content):
        net = network(3)
        net.save(tmp_path)
        (tmp_path / "network.json").write_text(content)
        with pytest.raises(ValueError, match=r"holds (another network|no saved network)"):
            net.load(tmp_path)

    @pytest.mark.parametrize("lost", [True, False])
    def test_a_tensor_missing_or_too_many_is_named(self, tmp_path, lost):
        net = network(3)
        net.save(tmp_path)
        weights = net.state_dict()
        if lost:
            del weights["head.bias"]
        else:
            weights["tail.bias"] = torch.ones(1)
        write_tensors(tmp_path / "weights.safetensors", weights, {})
        said = r"head\.bias has shape None there" if lost else r"tail\.bias has shape \[1\] there and None here"
        with pytest.raises(ValueError, match=said):
            net.load(tmp_path)

    def test_a_flipped_bit_is_seen(self, tmp_path):
        net = network(3)
        net.save(tmp_path)
        file = tmp_path / "weights.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"a damaged one: .* its checksum is not that of its content"):
            net.load(tmp_path)

    def test_weights_that_differ_are_not_put_into_one(self, tmp_path):
        apart, tied = network(3), network(3, seed=1)
        tied.blocks[2][0].weight = tied.blocks[0][0].weight
        before = tied(X)
        apart.save(tmp_path)
        with pytest.raises(
            ValueError, match=r"blocks\.0\.0\.weight and blocks\.2\.0\.weight differ there and are one here"
        ):
            tied.load(tmp_path)
        same(tied(X), before)
        tied.save(tmp_path)
        other = network(3, seed=2)
        other.blocks[2][0].weight = other.blocks[0][0].weight
        for net in (apart, other):  # of which the first may have equal weights twice
            net.load(tmp_path)
            same(net(X), before)

    def test_saving_again_replaces(self, tmp_path):
        network(3).save(tmp_path)
        net = network(3, seed=5)
        net.save(tmp_path)
        other = network(3)
        other.load(tmp_path)
        same(other(X), net(X))


@pytest.mark.parametrize(
    ("name", "said"),
    [("TreeNetwork", "hbll.Chain"), ("Objective", "hbll.make_rule")],
)
def test_former_names_say_the_new_ones(name, said):
    with pytest.raises(ImportError, match=f"^hbll.{name} is now .*{said}"):
        getattr(hbll, name)


@pytest.mark.parametrize("path", [2.0, True, (1, 2.0), {1}])
def test_what_is_no_path_is_refused(path):
    net, x, _ = mlp(4)
    with pytest.raises(ValueError, match="a path is a name such as 4-6-7, a list of blocks, or their number; got"):
        net(x, path=path)
    with pytest.raises(ValueError, match="a path is"):
        hbll.make_rule("bp", net, path=path)


@pytest.mark.parametrize(
    ("dim", "right"), [(0, False), (1, True), (2, True), (3, False), (-1, True), (-2, True), (-3, False)]
)
def test_the_dimension_of_features_is_one_of_the_state_and_not_the_batchs(dim, right):
    net, *_ = mlp(4)
    net.feature_dim = dim
    state = torch.zeros(2, 3, 4)
    if right:
        assert state.shape[net.features(state)] == state.shape[dim]
    else:
        with pytest.raises(ValueError, match=f"feature_dim={dim} is no dimension of features of a state"):
            net.features(state)


def test_states_of_vectors_have_no_second_dimension_of_features():
    net, x, y = mlp(4)
    net.feature_dim = 2
    with pytest.raises(ValueError, match="feature_dim=2 is no dimension of features"):
        hbll.make_rule("tree", net)(x, y)


def test_a_rule_is_given_by_its_name():
    with pytest.raises(ValueError, match=r"give the rule by its name, one of paper, .*; got None"):
        hbll.make_rule(None, mlp(4)[0])
    for value in (math.inf, math.nan):
        with pytest.raises(ValueError, match="variance must be"):
            hbll.make_rule("tree", mlp(4)[0], variance=value)
