"""Generated tokens. Oracle: the network on the whole sequence, anew for every token; for draws the exact distribution."""

from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

import hbll
from hbll.generate import generate, probabilities, verified
from hbll.models.gpt import GPTBlock, GPTEmbed, GPTHead


def language_model(blocks=7, vocabulary=11, context=24, rotary=None, spread=0.2):
    torch.manual_seed(0)
    parts = GPTEmbed(vocabulary, context, 8, rotary), [GPTBlock(8, 2) for _ in range(blocks)], GPTHead(vocabulary, 8)
    network = hbll.Chain(*parts)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return network


def greedy(network, tokens, count, path=None):
    for _ in range(count):
        tokens = torch.cat([tokens, network(tokens, path=path)[:, -1:].argmax(-1)], 1)
    return tokens


def prompt(sequences=1, length=4, vocabulary=11):
    torch.manual_seed(1)
    return torch.randint(vocabulary, (sequences, length))


@pytest.mark.parametrize("rotary", [None, 4])
@pytest.mark.parametrize("path", [None, "chain", 1, "4-6", [4, 6, 7]])
def test_greedy_tokens_are_those_of_the_whole_sequence(path, rotary):
    network, tokens = language_model(rotary=rotary), prompt(3)
    found = network.generate(tokens, 20, path=path, temperature=0)
    assert found.tokens.equal(greedy(network, tokens, 20, path))
    assert (found.drafted, found.acceptance_rate, found.passes) == (0, None, 20)
    assert found.tokens_per_second == pytest.approx(60 / found.seconds)


@pytest.mark.parametrize("count", [1, 3, 30])
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("draft", ["stage-1", "stage-3"])
@pytest.mark.parametrize(
    ("rule", "options"), [("greedy", {}), ("stream", {}), ("stream", {"copies": True}), ("solo", {})], ids=str
)
def test_a_stages_readout_changes_no_greedy_token(rule, options, draft, sequences, count):
    network, tokens = language_model(rotary=4), prompt(sequences)
    readout = hbll.make_rule(rule, network, stage=2, **options).readout(draft)
    found = network.generate(tokens, 20, draft=readout, num_draft_tokens=count, temperature=0)
    assert found.tokens.equal(greedy(network, tokens, 20))
    assert found.accepted + found.passes == 20


@pytest.mark.parametrize("rule", ["stream", "greedy"])
def test_a_readout_generates_with_caches_what_it_says_of_the_whole(rule):
    network, tokens = language_model(rotary=4), prompt()
    readout = hbll.make_rule(rule, network, stage=2, copies=True).readout("stage-2")
    assert network.generate(tokens, 20, path=readout, temperature=0).tokens.equal(greedy(network, tokens, 20, readout))


@pytest.mark.parametrize("count", [1, 3, 30])
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("draft", [1, "rim", 6, "chain"])
def test_a_draft_changes_no_greedy_token(draft, sequences, count):
    network, tokens = language_model(rotary=4), prompt(sequences)
    found = network.generate(tokens, 20, draft=draft, num_draft_tokens=count, temperature=0)
    assert found.tokens.equal(greedy(network, tokens, 20))
    assert found.accepted + found.passes == 20
    if draft == "chain":
        assert found.acceptance_rate == 1
        assert found.passes == -(-20 // (count + 1))


def test_a_path_may_be_verified_too():
    network, tokens = language_model(), prompt()
    found = network.generate(tokens, 20, path="4-6-7", draft="4-6", temperature=0)
    assert found.tokens.equal(greedy(network, tokens, 20, "4-6-7"))


@pytest.mark.parametrize(("draft", "shared"), [("stage-2", (1, 2, 3, 4)), ("rim", ())])
def test_blocks_in_common_read_every_token_once(draft, shared):
    network, tokens = language_model(), prompt()
    readout = hbll.make_rule("greedy", network, stage=2).readout(draft)
    read = dict.fromkeys(range(1, 8), 0)
    for n, block in enumerate(network.blocks, 1):
        block.register_forward_hook(lambda _, args, __, n=n: read.update({n: read[n] + args[0].shape[1]}))
    found = network.generate(tokens, 20, draft=readout, num_draft_tokens=3, temperature=0)
    # In each pass the last token known, and those drafted after it; in the first one all others known beside.
    verified_once = tokens.shape[1] - 1 + found.drafted + found.passes
    assert found.accepted < found.drafted
    twice = set(readout.path) - set(shared)
    assert all((read[n] > verified_once) if n in twice else (read[n] == verified_once) for n in read)


def joint(network, tokens, count, vocabulary, path, temperature, top_k):
    """The probability of each way in which a sequence may go on."""
    found = []
    for added in product(range(vocabulary), repeat=count):
        whole = torch.cat([tokens, torch.tensor([added])], 1)
        logits = network(whole, path=path)[0, tokens.shape[1] - 1 : -1] / temperature
        if top_k:
            least = logits.sort(-1, descending=True).values[:, top_k - 1, None]
            logits = torch.where(logits >= least, logits, -torch.inf)
        found.append(logits.softmax(-1)[torch.arange(count), list(added)].prod())
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.7, 2)])
@pytest.mark.parametrize("draft", [None, "2", "stage-1"])
def test_draws_are_distributed_as_the_chains(draft, temperature, top_k):
    network = language_model(blocks=2, vocabulary=3, spread=0.4).double()
    if draft == "stage-1":
        draft = hbll.make_rule("greedy", network, copies=False).readout(draft)
    elif draft:
        network = language_model(blocks=3, vocabulary=3, spread=0.4).double()
    tokens, generator = prompt(1, 2, 3).expand(2, -1), torch.Generator().manual_seed(0)
    options = {"temperature": temperature, "top_k": top_k}
    counts, drafted, accepted = torch.zeros(27, dtype=torch.float64), 0, 0
    for _ in range(400):
        found = network.generate(tokens, 3, draft=draft, num_draft_tokens=2, generator=generator, **options)
        counts += torch.bincount((found.tokens[:, 2:] * torch.tensor([9, 3, 1])).sum(1), minlength=27)
        drafted, accepted = drafted + found.drafted, accepted + found.accepted

    def chi_square(path):
        expected = counts.sum() * joint(network, tokens[:1], 3, 3, path, **options)
        assert not counts[expected == 0].any()
        counted = expected > 0
        return ((counts - expected).square() / expected)[counted].sum().item(), int(counted.sum()) - 1

    value, freedom = chi_square(None)
    assert value < freedom + 4 * (2 * freedom) ** 0.5
    if draft is not None:
        assert 0.1 < accepted / drafted < 0.99
    if draft is not None and top_k is None:
        assert chi_square(draft)[0] > 3 * value  # the draft alone draws otherwise


def test_what_is_verified_has_the_distribution_of_the_truth():
    torch.manual_seed(0)
    truth, guess = torch.randn(2, 5).softmax(-1)
    rows = 40_000
    drafted = torch.multinomial(guess, rows, replacement=True)[:, None]
    truths = truth.expand(rows, 2, 5)
    draw = partial(torch.multinomial, num_samples=1)
    kept, following = verified(truths, [guess.expand(rows, 5)], drafted, draw, None)
    assert kept == 0  # of so many one is wrong
    expected = rows * truth
    assert ((following.flatten().bincount(minlength=5) - expected).square() / expected).sum() < 4 + 4 * 8**0.5
    # A token stays with probability sum min(p, q).
    stays = torch.minimum(truth, guess).sum().item()
    assert (following == drafted).double().mean().item() == pytest.approx(stays, abs=0.01)


def test_the_likeliest_tokens():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    assert probabilities(logits, 0).tolist() == [[0, 1, 0, 0]]
    torch.testing.assert_close(probabilities(logits, 2.0), (logits / 2).softmax(-1))
    torch.testing.assert_close(probabilities(logits, 1.0, 9), logits.softmax(-1))
    two = probabilities(logits, 1.0, 2)
    torch.testing.assert_close(two, torch.tensor([[0, 0.5, 0, 0.5]]))
    assert probabilities(logits, 1.0, 1).max() == 1


def test_without_an_end_to_temperature_all_that_may_be_drawn_is_alike():
    logits = torch.tensor([[2.0, 5.0, -1.0, 3.0]])
    assert probabilities(logits, torch.inf).tolist() == [[0.25] * 4]
    assert probabilities(logits, torch.inf, 2).tolist() == [[0, 0.5, 0, 0.5]]
    assert probabilities(torch.tensor([[1.0, -torch.inf]]), torch.inf).tolist() == [[1, 0]]


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-38, 1e-40, 1e-300, 5e-324])
def test_tiny_temperatures_take_the_likeliest_token(temperature):
    logits = torch.tensor([[-1.0, 30.0, 29.5, -torch.inf], [0.0, -2.0, -1.0, -3.0]])
    for top_k in (None, 2):
        assert probabilities(logits, temperature, top_k).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    network, tokens = language_model(), prompt()
    assert network.generate(tokens, 8, temperature=temperature, draft=2).tokens.equal(greedy(network, tokens, 8))


def test_the_same_seed_draws_the_same_tokens():
    network, tokens = language_model(), prompt()

    def found(seed):
        return network.generate(tokens, 20, draft=2, generator=torch.Generator().manual_seed(seed)).tokens

    assert found(3).equal(found(3))
    assert not found(3).equal(found(4))


def test_generating_leaves_modes_as_they_are_and_drops_nothing_out():
    network, tokens = language_model(), prompt()
    for block in network.blocks:
        block.dropout.p = 0.5
    rule = hbll.make_rule("greedy", network, stage=3)
    found = network.generate(tokens, 20, draft=rule.exits[0], temperature=0)
    assert network.training
    assert found.tokens.equal(greedy(network.eval(), tokens, 20))
    assert not found.tokens.requires_grad


def test_the_context_may_be_filled():
    network, tokens = language_model(context=8), prompt()
    assert network.generate(tokens, 5, temperature=0, draft=2).tokens.equal(greedy(network, tokens, 5))
    with pytest.raises(
        ValueError, match=r"4 tokens and 6 new ones are more than the context of 8 tokens .* room for 5"
    ):
        network.generate(tokens, 6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": -0.5}, "temperature must not be negative; got -0.5"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"num_draft_tokens": 0}, "num_draft_tokens must be at least 1; got 0"),
        ({"draft": "4-5"}, "4-5 is not a path"),
        ({"draft": 8}, "a path has between 1 and 7 blocks here; got 8"),
        ({"path": "short"}, "'short' is not a path"),
        ({"tokens": torch.zeros(3, dtype=torch.long)}, r"integers \(B, T\), one at least in each sequence; got \(3,\)"),
        ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, r"one at least in each sequence; got \(1, 0\)"),
        ({"tokens": torch.zeros(1, 2)}, r"integers \(B, T\).*; got \(1, 2\) of torch.float32"),
        ({"tokens": torch.tensor([[3, 11]])}, "knows tokens 0 to 10; got 3 to 11: they are of another vocabulary"),
    ],
)
def test_what_cannot_be_is_one_sentence(options, sentence):
    arguments = {"tokens": prompt(), "max_new_tokens": 3} | options
    with pytest.raises(ValueError, match=sentence):
        generate(language_model(), **arguments)


class TakesMore(GPTBlock):
    def forward(self, state, cache=None, **kwargs):
        return super().forward(state, cache=cache)


def test_a_block_that_names_the_cache_among_others_goes_on_with_a_sequence():
    torch.manual_seed(0)
    network = hbll.Chain(GPTEmbed(11, 8, 8), [TakesMore(8, 2), GPTBlock(8, 2)], nn.Linear(8, 11))
    tokens = network.generate(prompt(), 3, temperature=0).tokens
    for end in range(prompt().shape[1], tokens.shape[1]):
        assert network(tokens[:, :end])[:, -1].argmax(-1).equal(tokens[:, end])


class TakesAnything(nn.Module):
    def forward(self, state, **kwargs):
        return state.cumsum(1)  # of the tokens before, which it would not have


def test_networks_that_cannot_go_on_with_a_sequence_are_told():
    tokens, block, head = prompt(), GPTBlock(8, 2), nn.Linear(8, 11)
    with pytest.raises(ValueError, match="the embed, a Embedding, names no start="):
        hbll.Chain(nn.Embedding(11, 8), [block], head).generate(tokens, 3)
    for other in (nn.LayerNorm(8), TakesAnything()):
        with pytest.raises(ValueError, match=f"block 2, a {type(other).__name__}, names no cache="):
            hbll.Chain(GPTEmbed(11, 8, 8), [block, other], head).generate(tokens, 3)
