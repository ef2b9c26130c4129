"""Language model blocks. Oracle: the same arithmetic with explicit attention, head by head."""

import pytest
import torch
import torch.nn.functional as F
from tests.networks import assert_equal_gradients, gradients
from tests.oracles.norm import layer_norm, perturbed
from torch.profiler import profile

import hbll
from hbll.models.gpt import GPTBlock, GPTEmbed, GPTHead, KeyValueCache, turned


def test_the_embedding_by_hand():
    torch.manual_seed(0)
    embed = GPTEmbed(11, 8, 6)
    assert embed.token.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert embed.position.weight.std().item() == pytest.approx(0.02, rel=0.4)
    tokens = torch.randint(11, (2, 5))
    found = embed(tokens)
    for b in range(2):
        for t in range(5):
            torch.testing.assert_close(found[b, t], embed.token.weight[tokens[b, t]] + embed.position.weight[t])


def test_the_initialisation_is_gpt_2s():
    torch.manual_seed(0)
    block = GPTBlock(96, 2, depth=8)
    for linear, spread in [
        (block.query_key_value, 0.02),
        (block.perceptron_in, 0.02),
        (block.attention_out, 0.02 / 4),
        (block.perceptron_out, 0.02 / 4),
    ]:
        assert linear.weight.std().item() == pytest.approx(spread, rel=0.05)
        assert linear.bias.abs().max() == 0


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_a_block_by_hand(heads):
    torch.manual_seed(0)
    block = perturbed(GPTBlock(6, heads))
    state = torch.randn(2, 5, 6, dtype=torch.float64)
    qkv = layer_norm(state, block.attention_norm) @ block.query_key_value.weight.mT + block.query_key_value.bias
    query, key, value = qkv[..., :6], qkv[..., 6:12], qkv[..., 12:]
    size, mixed = 6 // heads, torch.zeros_like(state)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for t in range(5):
            scores = torch.einsum("bf,bsf->bs", query[:, t, part], key[:, : t + 1, part]) / size**0.5
            mixed[:, t, part] = torch.einsum("bs,bsf->bf", scores.softmax(-1), value[:, : t + 1, part])
    after = state + mixed @ block.attention_out.weight.mT + block.attention_out.bias
    inner = layer_norm(after, block.perceptron_norm) @ block.perceptron_in.weight.mT + block.perceptron_in.bias
    assert inner.shape[-1] == 24
    inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    expected = after + inner @ block.perceptron_out.weight.mT + block.perceptron_out.bias
    torch.testing.assert_close(block(state), expected)


def test_no_token_sees_a_later_one():
    torch.manual_seed(0)
    block = perturbed(GPTBlock(6, 2))
    state = torch.randn(2, 5, 6, dtype=torch.float64)
    changed = state.clone()
    changed[:, 3] *= -1
    before, after = block(state), block(changed)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=0)
    assert ((before[:, 3:] - after[:, 3:]).abs().amax((0, 2)) > 1e-3).all()


def test_dropout_is_for_training():
    torch.manual_seed(0)
    block, state = GPTBlock(6, 2, dropout=0.5), torch.randn(2, 5, 6)
    assert not torch.equal(block(state), block(state))
    block.eval()
    assert torch.equal(block(state), block(state))


def test_the_head_by_hand():
    torch.manual_seed(0)
    head = perturbed(GPTHead(11, 6))
    state = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = layer_norm(state, head.norm) @ head.predict.weight.mT + head.predict.bias
    torch.testing.assert_close(head(state), expected)


def test_rotary_positions_turn_pairs_as_complex_numbers():
    torch.manual_seed(0)
    state, context = GPTEmbed(11, 9, 12, rotary=6).double()(torch.randint(11, (2, 5)), start=3)
    features = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    pairs = torch.complex(features[..., :3], features[..., 3:])
    angles = torch.tensor([[t * 10000 ** (-i / 3) for i in range(3)] for t in range(3, 8)])
    expected = pairs * torch.polar(torch.ones(5, 3, dtype=torch.float64), angles.double())
    torch.testing.assert_close(turned(features, context["rotary"]), torch.cat([expected.real, expected.imag], -1))
    assert state.shape == (2, 5, 12)


def test_with_rotary_positions_a_block_sees_distances_alone():
    torch.manual_seed(0)
    embed, block = GPTEmbed(11, 40, 12, rotary=6).double(), perturbed(GPTBlock(12, 2))
    tokens = torch.randint(11, (2, 5))
    outputs = [block(state, **context) for state, context in (embed(tokens), embed(tokens, start=30))]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)  # angles are those of single precision
    assert (outputs[0] - block(embed(tokens)[0])).abs().max() > 1e-3


def test_queries_and_keys_turn_by_the_same_cosines():
    state, context = GPTEmbed(11, 9, 12, rotary=6)(torch.randint(11, (2, 5)))
    with profile() as profiled:
        GPTBlock(12, 2)(state, **context)
    assert [event.count for event in profiled.key_averages() if event.key in ("aten::cos", "aten::sin")] == [1, 1]


def test_there_are_no_positions_to_learn_where_they_are_rotary():
    assert [name for name, _ in GPTEmbed(11, 8, 6, rotary=2).named_parameters()] == ["token.weight"]


@pytest.mark.parametrize("size", [0, 3])
def test_heads_of_an_odd_size_cannot_be_turned(size):
    with pytest.raises(ValueError, match=f"heads of an even size, not of {size}"):
        GPTEmbed(11, 8, 6, rotary=size)


@pytest.mark.parametrize("rotary", [None, 2])
def test_a_sequence_beyond_the_context_is_refused(rotary):
    embed = GPTEmbed(11, 8, 6, rotary)
    embed(torch.zeros(1, 3, dtype=torch.long), start=5)
    with pytest.raises(ValueError, match="a sequence of 9 tokens is longer than the 8 that the network is made for"):
        embed(torch.zeros(1, 3, dtype=torch.long), start=6)


@pytest.mark.parametrize("rotary", [None, 2])
@pytest.mark.parametrize("pieces", [(7,), (1,) * 7, (3, 1, 3), (1, 4, 2)])
def test_a_sequence_in_pieces_with_a_cache_is_the_sequence(pieces, rotary):
    torch.manual_seed(0)
    embed, blocks = GPTEmbed(11, 8, 6, rotary).double(), [perturbed(GPTBlock(6, 3)) for _ in range(2)]
    tokens, caches = torch.randint(11, (2, 7)), [KeyValueCache() for _ in blocks]

    def through(tokens, start=0, caches=(None, None)):
        output = embed(tokens, start=start)
        state, context = output if rotary else (output, {})
        for block, cache in zip(blocks, caches, strict=True):
            state = block(state, cache=cache and cache.rewound(), **context)
        return state

    expected, found, start = through(tokens), [], 0
    for piece in pieces:
        # What was read in vain is forgotten.
        through((tokens[:, start : start + 2] + 1) % 11, start, caches)
        for cache in caches:
            cache.cut(start)
        found.append(through(tokens[:, start : start + piece], start, caches))
        start += piece
    torch.testing.assert_close(torch.cat(found, 1), expected)


def test_a_cache_has_a_place_for_each_attention_of_a_module():
    torch.manual_seed(0)
    blocks, state, cache = [perturbed(GPTBlock(6, 2)) for _ in range(2)], torch.randn(1, 4, 6).double(), KeyValueCache()

    def both(state):
        cache.rewound()
        return blocks[1](blocks[0](state, cache=cache), cache=cache)

    torch.testing.assert_close(torch.cat([both(state[:, :3]), both(state[:, 3:])], 1), blocks[1](blocks[0](state)))


@pytest.mark.parametrize("rotary", [None, 2])
@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_scan_trains_it_exactly(engine, rotary):
    torch.manual_seed(0)
    net = hbll.Chain(GPTEmbed(11, 8, 6, rotary), [GPTBlock(6, 3) for _ in range(4)], GPTHead(11, 6)).double()
    x, y = torch.randint(11, (2, 2, 5))
    step = hbll.make_rule("scan", net, guess="mean", stage=2, sweeps=2, credit_sweeps=2, engine=engine)(x, y)
    exact = F.cross_entropy(net(x).flatten(0, 1), y.flatten())
    assert_equal_gradients(gradients(net, step.loss), gradients(net, exact))


def test_heads_divide_the_width():
    with pytest.raises(ValueError, match="a width of 16 cannot be divided among 3 attention heads"):
        GPTBlock(16, 3)
