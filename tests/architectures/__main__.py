"""Prints for each family of causal LMs whether the toolkit is right:   python -m tests.architectures [--only NAME …]

NAME equal              every stage gives what transformers' plain forward gives
NAME refused: …         a stage stops before a step is made, with this line; the others are equal
NAME wrong: …           it differs, or fails in another way: exit code 1
NAME not built: …       transformers has no causal LM of it that can be tried here
"""

import argparse
import importlib.metadata
import re
import sys
import tempfile
from pathlib import Path

from tests.architectures.checks import STAGES
from tests.architectures.configs import FAMILIES, SHORT, VARIANTS
from tests.architectures.outcome import KINDS, Outcome, check_family

COMMAND = "    python -m tests.architectures --table benchmarks/ARCHITECTURES.md\n"


def main(argv: list[str] | None = None) -> int:
    """Exit code: 1 when a family is wrong."""
    every = (*FAMILIES, *VARIANTS)
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=every, help="these families alone")
    parser.add_argument("--short", action="store_true", help="the twelve that people use most")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the outcomes below the text of this file")
    args = parser.parse_args(argv)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only or (SHORT if args.short else every):
            outcomes.append(check_family(name, Path(folder)))
            print(outcomes[-1], flush=True)
    print(*counts(outcomes), sep="\n")
    if args.table:
        head = args.table.read_text("utf-8").partition(COMMAND)[0]
        args.table.write_text("\n".join([head + COMMAND, *table(outcomes)]) + "\n", "utf-8")
    return int(any(outcome.kind == "wrong" for outcome in outcomes))


def counts(outcomes: list[Outcome]) -> list[str]:
    """Lines of how many are equal, refused, wrong and not built; over all stages, then for each."""

    def line(kinds: list[str]) -> str:
        return ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS if kind in kinds)

    built = [outcome for outcome in outcomes if outcome.stages]
    stages = [f"{stage}: {line([outcome.stages[stage].kind for outcome in built])}" for stage in STAGES]
    return [f"{len(outcomes)} names: {line([outcome.kind for outcome in outcomes])}", *stages]


def table(outcomes: list[Outcome]) -> list[str]:
    """Lines of Markdown: a row per name that was built, what refusals say, what was not built and why."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
    seconds = sum(outcome.seconds for outcome in outcomes)
    lines = [f"{versions}; {seconds:.0f} s.", "", *(f"- {line}" for line in counts(outcomes)), ""]
    lines += [f"| name | {' | '.join(STAGES)} |", "|---" * (len(STAGES) + 1) + "|"]
    texts: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.stages:
            cells = [_cell(outcome, stage, texts) for stage in STAGES]
            lines.append(f"| {outcome.name} | {' | '.join(cells)} |")
    lines += ["", "## What refusals say", "", *(f"{number}. {text}" for text, number in texts.items())]
    return [*lines, "", "## Not built", "", *(f"- {x.name}: {x.reason}" for x in outcomes if not x.stages)]


def _cell(outcome: Outcome, stage: str, texts: dict[str, int]) -> str:
    """The kind, and in brackets how it ran or the number of what was said: one for all that differ in names alone."""
    result = outcome.stages[stage]
    if result.kind == "equal":
        return f"equal ({result.text})" if result.text else "equal"
    text = re.sub(r"(?<=off by )[\d.e+-]+", "…", result.text.replace(" source", ""))
    text = re.sub(r"\b(?!Auto)\w+(ForCausalLM|LMHeadModel|WithLMHead|Model)\b", "…", text)
    text = re.sub(r"(?<=a )(?!causal)[\w-]+(?= model[, ])", "…", text)
    return f"{result.kind} [{texts.setdefault(text, len(texts) + 1)}]"


if __name__ == "__main__":
    sys.exit(main())
