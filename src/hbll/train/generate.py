"""Text that a run's language model goes on with."""

from pathlib import Path

import torch

from hbll.calls import Readout
from hbll.data.vocabulary import load_vocabulary
from hbll.generate import Generation, generate
from hbll.recipes.gpt import GptRecipe
from hbll.rule import Rule
from hbll.train.device import device
from hbll.train.evaluate import load_rule
from hbll.train.run import Run, check_seed, open_run


def language_model(folder: Path, best: bool = False) -> tuple[Run, Rule]:
    """A run of a language model that generates text, and its rule with the network, as `load_rule` has it.

    Raises:
        ValueError: `folder` holds no such run, or it cannot be read.
    """
    run = open_run(folder)
    if not isinstance(run.recipe, GptRecipe):
        raise ValueError(f"{run.recipe.name} is no language model of blocks, which alone generates text")
    return run, load_rule(run, best).to(device())


def generate_run(
    folder: Path,
    prompt: str,
    max_new_tokens: int,
    *,
    path: str | None = None,
    draft: str | None = None,
    seed: int = 0,
    num_draft_tokens: int = 4,
    temperature: float = 1.0,
    top_k: int | None = None,
    best: bool = False,
) -> tuple[str, Generation]:
    """The prompt and what a run's network says next, and what that took.

    Args:
        folder: of the run.
        prompt: a text.
        path, draft: names of readouts: `chain`, `4-6-7`, a number of blocks (`3`), `stage-2`.
        seed: of the draws.
        max_new_tokens, num_draft_tokens, temperature, top_k: as of `hbll.generate.generate`.
        best: as of `load_rule`.

    Raises:
        ValueError: the prompt has no token, or others than the vocabulary; the seed is none; or as of `language_model` and
            `hbll.generate.generate`.
    """
    check_seed(seed)
    run, rule = language_model(folder, best)
    vocabulary = load_vocabulary(run.vocabulary_file)
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # what a terminal of another encoding hands over
        raise ValueError(f"the prompt is no text in UTF-8 ({error})") from error
    known = vocabulary.encode(prompt)
    if not known:
        raise ValueError("there is nothing to go on from: give a prompt of one token at least")
    tokens = torch.tensor([known], device=device())
    rule.build(tokens)

    def way(name: str | None) -> Readout | None:
        return None if name is None else run.recipe.other_readout(rule, name)

    generation = generate(
        rule.network,
        tokens,
        max_new_tokens,
        path=way(path),
        draft=way(draft),
        num_draft_tokens=num_draft_tokens,
        temperature=temperature,
        top_k=top_k,
        generator=torch.Generator(device()).manual_seed(seed),
    )
    return vocabulary.decode(generation.tokens[0].tolist()), generation
