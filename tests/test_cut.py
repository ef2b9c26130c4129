"""Cuts. Oracles: the model itself, and all ways to cut by brute force."""

from itertools import combinations, pairwise

import pytest
import torch
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
