"""Prints for each family of causal LMs whether the toolkit is right:   python -m tests.architectures [--only NAME …]

NAME equal              every stage gives what transformers' plain forward gives
NAME refused: …         a stage stops before a step is made, with this line; the others are equal
NAME wrong: …           it differs, or fails in another way: exit code 1
NAME not built: …       transformers has no causal LM of it that can be tried here
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.architectures.configs import FAMILIES, SHORT, VARIANTS
from tests.architectures.outcome import Outcome, check_family, counts
from tests.architectures.table import write_table


def main(argv: list[str] | None = None) -> int:
    """Exit code: 1 when a family is wrong."""
    every = (*FAMILIES, *VARIANTS)
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=every, help="these families alone")
    parser.add_argument("--short", action="store_true", help="the twelve that people use most")
    parser.add_argument("--table", metavar="FILE", help="write the outcomes as a Markdown table")
    args = parser.parse_args(argv)
    names = args.only or (SHORT if args.short else every)
    outcomes: list[Outcome] = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            outcomes.append(check_family(name, Path(folder)))
            print(outcomes[-1], flush=True)
    print(*counts(outcomes), f"{time.monotonic() - begin:.0f} s", sep="\n")
    if args.table:
        write_table(outcomes, Path(args.table))
    return int(any(outcome.kind == "wrong" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
