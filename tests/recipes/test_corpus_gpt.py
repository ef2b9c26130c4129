"""The recipes of language models on long texts: their tokens, and what perplexities are of."""

import math

import pytest
import torch

from hbll.recipes import RECIPES
from hbll.train import metrics
from hbll.train.evaluate import evaluate_run, load_rule
from hbll.train.loop import train
from hbll.train.parallel import Task
from hbll.train.run import Run

NOVELS, WIKITEXT = RECIPES["novels-gpt"], RECIPES["wikitext-gpt"]
TINY = {"blocks": 2, "width": 8, "context": 16, "epochs": 1, "batch_size": 4, "vocabulary_size": 300}


def test_the_papers_hyper_parameters():
    for recipe, corpus in ((WIKITEXT, "wikitext-103"), (NOVELS, "novels")):
        paper = recipe.of_preset("paper")
        assert (paper.corpus, paper.batch_size, paper.context, paper.optimizer) == (corpus, 2, 1024, "adamw")
        assert (paper.learning_rate, paper.weight_decay, paper.epochs) == (1e-4, 0.01, 10)
        assert (paper.precision, paper.noise, paper.block_count) == ("bfloat16", 0.005, 7)


@pytest.mark.parametrize("method", ["bp", "stream", "paper"])
def test_perplexities_are_of_the_whole_text(small_data, tmp_path, method):
    recipe = NOVELS(**TINY)
    run = Run(recipe=recipe, method=method, seed=0, folder=tmp_path / "run", data_dir=small_data)
    train(run)
    text = (small_data / "novels" / "novels.test.txt").read_text()
    tokens = torch.tensor(recipe.vocabulary(small_data).encode(text))
    start = torch.tensor([recipe.vocabulary(small_data).start])
    # Token by token, each from those before it within its sequence of 16.
    network, nats = load_rule(run).network.eval(), 0.0
    before = torch.cat([start, tokens[:-1]])
    with torch.no_grad():
        for place, token in enumerate(tokens.tolist()):
            context = before[place - place % 16 : place + 1]
            nats -= network(context[None])[0, -1].log_softmax(-1)[token].item()
    result = metrics.read(run.metrics_file)[-1].chain
    assert result["perplexity"] == pytest.approx(math.exp(nats / len(tokens)), rel=1e-4)
    assert result["word_perplexity"] == pytest.approx(math.exp(nats / len(text.split())), rel=1e-3)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-4)
    assert evaluate_run(run.folder)[0] == result


def test_other_tokens_than_those_of_the_run_are_refused(small_data, tmp_path):
    recipe = WIKITEXT(**{**TINY, "tokens": "words", "vocabulary_size": None})
    run = Run(recipe=recipe, method="bp", seed=0, folder=tmp_path / "run", data_dir=small_data)
    train(run)
    file = small_data / "wikitext-2" / "wiki.train.tokens"
    file.write_text(file.read_text().replace("fox", "cat"))
    metrics_before = run.metrics_file.read_text()
    for use in (
        lambda: evaluate_run(run.folder),
        lambda: train(run, resume=True),
        lambda: Task.of(run, recipe.splits(small_data), resume=True),
    ):
        with pytest.raises(ValueError, match=r"tokens of the data are not those of .*vocabulary\.json"):
            use()
    assert run.metrics_file.read_text() == metrics_before


@pytest.mark.parametrize("tokens", ["words", "characters"])
def test_a_size_that_the_text_has_not_is_named(small_data, tokens):
    size = WIKITEXT(tokens=tokens).load(small_data) and WIKITEXT(tokens=tokens).token_count
    with pytest.raises(
        ValueError, match=f"wikitext-2 has {size} different {tokens}, not 999: give --vocabulary-size {size}"
    ):
        WIKITEXT(tokens=tokens, vocabulary_size=999).load(small_data)


def test_more_byte_pairs_than_there_are(small_data):
    with pytest.raises(ValueError, match=r"novels has (\d+) different bytepairs, not 4096: give --vocabulary-size \1"):
        NOVELS().load(small_data)


@pytest.mark.parametrize(
    ("recipe", "options", "sentence"),
    [
        (NOVELS, {"vocabulary_size": 256}, "--vocabulary-size must be at least 257, not 256"),
        (WIKITEXT, {"tokens": "words", "vocabulary_size": 1}, "--vocabulary-size must be at least 2, not 1"),
        (WIKITEXT, {"corpus": "wikitext-103", "tokens": "characters"}, "how many characters .* give --vocabulary-size"),
    ],
)
def test_a_value_that_cannot_be_is_one_sentence(recipe, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        recipe(**options)
