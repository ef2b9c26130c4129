"""The network. Oracle: calling its modules by hand."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hbll

WIDTH, BATCH, INPUTS, CLASSES = 4, 3, 5, 2


def network(blocks=7, seed=0, **options):
    torch.manual_seed(seed)
    made = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(blocks)]
    return hbll.TreeNetwork(embed=nn.Linear(INPUTS, WIDTH), blocks=made, head=nn.Linear(WIDTH, CLASSES), **options)


def along(net, x, path):
    state = net.embed(x)
    for n in path:
        state = net.blocks[n - 1](state)
    return net.head(state)


X = torch.randn(BATCH, INPUTS, generator=torch.Generator().manual_seed(0))


@given(st.integers(1, 9), st.data())
def test_forward_along_any_path(blocks, data):
    net = network(blocks)
    path = data.draw(st.sampled_from(list(net.tree.paths())))
    expected = along(net, X, path)
    torch.testing.assert_close(net(X, path=path), expected, rtol=0, atol=0)
    torch.testing.assert_close(net(X, path=list(path)), expected, rtol=0, atol=0)
    torch.testing.assert_close(net(X, path="-".join(map(str, path))), expected, rtol=0, atol=0)
    torch.testing.assert_close(net.sequential(path)(X), expected, rtol=0, atol=0)


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
        torch.testing.assert_close(net(X, path=path), along(net, X, blocks), rtol=0, atol=0)
    torch.testing.assert_close(net(X), along(net, X, chain), rtol=0, atol=0)


@pytest.mark.parametrize("path", ["4-7", [4, 7], 0, 8, "nonsense", [], "1-2"])
def test_what_is_no_path(path):
    with pytest.raises(ValueError, match="path"):
        network(7)(X, path=path)


@pytest.mark.parametrize("blocks", [1, 2, 5, 7])
def test_tree_has_a_node_per_block_and_the_label(blocks):
    assert network(blocks).tree.nodes == blocks + 1


def test_no_block():
    with pytest.raises(ValueError, match="at least one block"):
        hbll.TreeNetwork(nn.Identity(), [], nn.Identity())


@pytest.mark.parametrize("wrong", [1, 4, 7])
def test_a_block_that_changes_the_shape_is_named(wrong):
    net = network(7)
    net.blocks[wrong - 1] = nn.Linear(WIDTH, WIDTH + 3)
    with pytest.raises(ValueError, match=rf"block {wrong} changes the state's shape from \(3, 4\) to \(3, 7\)"):
        net(X)


def test_state_dict_is_that_of_ordinary_modules():
    net = network(3)
    expected = {f"blocks.{n}.0.{p}" for n in range(3) for p in ("weight", "bias")}
    expected |= {f"{part}.{p}" for part in ("embed", "head") for p in ("weight", "bias")}
    assert set(net.state_dict()) == expected
    hbll.Objective("paper")(net, X, torch.zeros(BATCH, dtype=torch.long)).loss.backward()
    assert set(net.state_dict()) == expected
    other = network(3, seed=1)
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other(X), net(X), rtol=0, atol=0)


def test_from_a_trained_sequential_and_back():
    torch.manual_seed(0)
    layers = [nn.Linear(INPUTS, WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(3)), nn.Linear(WIDTH, CLASSES)]
    plain = nn.Sequential(*layers)
    before = plain(X)
    net = hbll.TreeNetwork(embed=plain[0], blocks=plain[1:-1], head=plain[-1])
    torch.testing.assert_close(net(X), before, rtol=0, atol=0)
    hbll.Objective("paper")(net, X, torch.zeros(BATCH, dtype=torch.long)).loss.backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    # The modules are shared: the plain network has learnt.
    torch.testing.assert_close(plain(X), net(X), rtol=0, atol=0)
    assert not torch.equal(plain(X), before)
    back = net.sequential()
    assert isinstance(back, nn.Sequential)
    assert list(back.parameters()) == list(plain.parameters()) or all(
        a is b for a, b in zip(back.parameters(), plain.parameters(), strict=True)
    )
    assert len(net.sequential("rim")) == 2 + len(net.tree.rim)


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
def test_dimension_of_the_features(shape, feature_dim, expected):
    assert network(1, feature_dim=feature_dim).features(torch.zeros(shape)) == expected


class TestFiles:
    """Save and load."""

    def test_round_trip(self, tmp_path):
        net = network(7)
        net.save(tmp_path / "a" / "b")
        other = network(7, seed=1)
        assert not torch.equal(other(X), net(X))
        other.load(tmp_path / "a" / "b")
        torch.testing.assert_close(other(X), net(X), rtol=0, atol=0)
        for name, parameter in net.state_dict().items():
            assert torch.equal(other.state_dict()[name], parameter)

    def test_formats_are_open(self, tmp_path):
        import safetensors.torch

        net = network(3)
        net.save(tmp_path)
        weights = safetensors.torch.load_file(tmp_path / "weights.safetensors")
        assert set(weights) == set(net.state_dict())
        assert json.loads((tmp_path / "network.json").read_text())["blocks"] == 3

    def test_buffers_and_shared_modules(self, tmp_path):
        def make(seed):
            torch.manual_seed(seed)
            block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
            return hbll.TreeNetwork(nn.Linear(INPUTS, WIDTH), [block, block, nn.Identity()], nn.Linear(WIDTH, CLASSES))

        net, other = make(0), make(1)
        net(X)  # moves the running statistics
        net.save(tmp_path)
        other.load(tmp_path)
        torch.testing.assert_close(other.eval()(X), net.eval()(X), rtol=0, atol=0)
        assert other.blocks[0] is other.blocks[1]

    @pytest.mark.parametrize(
        "other",
        [
            lambda: network(6),
            lambda: network(7, feature_dim=-1),
            lambda: hbll.TreeNetwork(nn.Linear(INPUTS, 9), [nn.Linear(9, 9) for _ in range(7)], nn.Linear(9, CLASSES)),
        ],
    )
    def test_another_network_is_refused_and_left_as_it_was(self, tmp_path, other):
        network(7).save(tmp_path)
        net = other()
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ValueError, match="holds another network"):
            net.load(tmp_path)
        assert all(torch.equal(p, before[n]) for n, p in net.state_dict().items())

    def test_saving_again_replaces(self, tmp_path):
        network(3).save(tmp_path)
        net = network(3, seed=5)
        net.save(tmp_path)
        other = network(3)
        other.load(tmp_path)
        torch.testing.assert_close(other(X), net(X), rtol=0, atol=0)


def test_copies_are_independent():
    net = network(3)
    duplicate = copy.deepcopy(net)
    torch.testing.assert_close(duplicate(X), net(X), rtol=0, atol=0)
    with torch.no_grad():
        duplicate.head.bias += 1
    assert not torch.equal(duplicate(X), net(X))


def test_states_of_tokens_and_images():
    torch.manual_seed(0)
    tokens = hbll.TreeNetwork(nn.Embedding(9, WIDTH), [nn.LayerNorm(WIDTH) for _ in range(3)], nn.Linear(WIDTH, 9))
    assert tokens(torch.randint(9, (BATCH, 6))).shape == (BATCH, 6, 9)
    images = hbll.TreeNetwork(nn.Conv2d(1, 4, 3), [nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)], nn.Flatten())
    assert images(torch.randn(BATCH, 1, 6, 5), path="rim").shape == (BATCH, 4 * 4 * 3)
