"""Self-speculative decoding: what each draft and each number of drafted tokens comes to, against plain decoding.

    python benchmarks/speculation.py RUN [RUN ...] --new-tokens 96 --num-draft-tokens 1 2 4 8 --out FILE

The runs are folders of language models (``hbll train shakespeare-gpt``). Prompts are the beginnings of test sequences;
drafts are the run's short paths and its stages' readouts. Each line is of one run, one draft, one number of drafted
tokens, one temperature, and so many prompts of so many tokens with so many new ones: the share of the drafted tokens that
was kept, the tokens a second of draft and verification together, those of plain decoding of the same prompts just before,
and, of greedy decoding, how many of the sequences are the same to the last token. A sweep that was interrupted goes on
where it stopped.
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import ledger
import torch
from gate import gate
from torch import Tensor

from hbll import Chain
from hbll.calls import Readout
from hbll.generate import Generation, check_tokens, generate
from hbll.names import check_number
from hbll.train.device import device
from hbll.train.generate import language_model

COLUMNS = (
    *("run", "draft", "blocks", "drafted", "temperature", "prompts", "prompt tokens", "new tokens"),
    *("accepted", "tokens/s", "plain", "speed-up", "same"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--prompts", type=at_least_one, default=4)
    parser.add_argument("--prompt-tokens", type=at_least_one, default=16)
    parser.add_argument("--new-tokens", type=at_least_one, default=96)
    parser.add_argument("--num-draft-tokens", nargs="+", type=at_least_one, default=[1, 2, 4, 8])
    parser.add_argument("--drafts", nargs="+", help="names of paths and readouts, or numbers of blocks (default: all)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("speculation.jsonl"))
    arguments = parser.parse_args()
    try:
        runs = [(run, *opened(run, arguments)) for run in arguments.runs]
    except ValueError as error:
        parser.error(str(error))
    gate(["test_generate.py"])
    fixed = {name: getattr(arguments, name) for name in ("temperature", "prompts", "prompt_tokens", "new_tokens")}
    for run, network, drafts, prompts in runs:
        for draft, count in product(drafts, arguments.num_draft_tokens):
            setting = {"run": str(run), "draft": draft.name, "num_draft_tokens": count, **fixed}
            if not any(setting.items() <= line.items() for line in ledger.read(arguments.out)):
                found = swept(network, draft, count, prompts, arguments.new_tokens, arguments.temperature)
                ledger.append(arguments.out, setting | found)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for line in ledger.read(arguments.out):
        print("| " + " | ".join(row(line)) + " |")


def at_least_one(text: str) -> int:
    """A whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def opened(folder: Path, arguments: argparse.Namespace) -> tuple[Chain, list[Readout], Sequence[Tensor]]:
    """A run's network, the drafts to try, and the prompts, (1, T) each.

    Raises:
        ValueError: the folder holds no run of a language model, a draft is none, or what is asked for cannot be generated.
    """
    check_number("temperature", arguments.temperature, least=0.0)
    run, rule = language_model(folder)
    inputs = run.recipe.splits(arguments.data_dir or run.data_dir).test.inputs.to(device())
    places = torch.linspace(0, len(inputs) - 1, arguments.prompts).long().tolist()
    prompts = [inputs[place, None, : arguments.prompt_tokens] for place in places]
    rule.eval().build(prompts[0])
    check_tokens(rule.network, prompts[0], arguments.new_tokens)
    _chain, *others = run.recipe.all_readouts(rule)
    drafts = [run.recipe.other_readout(rule, name) for name in arguments.drafts] if arguments.drafts else others
    return rule.network, drafts, prompts


def swept(
    network: Chain, draft: Readout, count: int, prompts: Sequence[Tensor], new_tokens: int, temperature: float
) -> dict:
    """What a draft of so many tokens comes to; without a rate of acceptance where none was drafted."""

    def decoded(draft: Readout | None) -> Iterator[Generation]:
        for seed, prompt in enumerate(prompts):
            generator = torch.Generator(prompt.device).manual_seed(seed)
            options = {"draft": draft, "num_draft_tokens": count, "temperature": temperature, "generator": generator}
            yield generate(network, prompt, new_tokens, **options)

    next(decoded(draft))  # warm
    plain, found = list(decoded(None)), list(decoded(draft))
    drafted = sum(generation.drafted for generation in found)
    return {
        "blocks": draft.blocks,
        "acceptance_rate": sum(generation.accepted for generation in found) / drafted if drafted else None,
        "tokens_per_second": new_tokens * len(found) / sum(generation.seconds for generation in found),
        "plain_tokens_per_second": new_tokens * len(plain) / sum(generation.seconds for generation in plain),
        "same": sum(a.tokens.equal(b.tokens) for a, b in zip(plain, found, strict=True)) if temperature == 0 else None,
    }


def row(line: dict) -> list[str]:
    """A line under ``COLUMNS``."""
    ours, plain = line["tokens_per_second"], line["plain_tokens_per_second"]
    same = "" if line["same"] is None else f"{line['same']} of {line['prompts']}"
    accepted = "" if line["acceptance_rate"] is None else f"{100 * line['acceptance_rate']:.0f} %"
    names = ("run", "draft", "blocks", "num_draft_tokens", "temperature", "prompts", "prompt_tokens", "new_tokens")
    return [*(str(line[name]) for name in names), accepted, f"{ours:.0f}", f"{plain:.0f}", f"{ours / plain:.2f}", same]


if __name__ == "__main__":
    main()
