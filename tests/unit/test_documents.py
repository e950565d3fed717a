"""What the documents say is there: flags, files, modules; and their tables are whole."""

import re
from pathlib import Path

import pytest

from ppo.compare_flags import CompareConfig
from ppo.config import PPOConfig
from reward.config import RewardConfig
from reward.evaluation.flags import EvaluateConfig, StrengthConfig
from reward.scoring.score_flags import ScoreConfig
from sft.config import SFTConfig
from utils.flags.parser import build_parser

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "benchmarks/README.md", "experiments/RESULTS.md")
CONFIGS = (PPOConfig, CompareConfig, RewardConfig, EvaluateConfig, ScoreConfig, StrengthConfig, SFTConfig)
OTHERS = {"--demo", "--use_x", "--help"}  # of the recipes; one for all switches; of every command


def text_of(document: str) -> str:
    return (REPOSITORY / document).read_text("utf-8")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_row_of_a_table_has_as_many_cells_as_its_header(document):
    cells = None
    for number, line in enumerate(text_of(document).splitlines(), 1):
        count = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert None in (count, cells) or count == cells, f"{document}:{number}: {line}"
        cells = count


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_flag_is_one_of_a_command(document):
    parsers = map(build_parser, CONFIGS)
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    for folder in (".", "benchmarks", "experiments", "utils", "utils/weight_diff", "tests", "tests/faults"):
        for file in (REPOSITORY / folder).glob("*.py"):
            known |= set(re.findall(r'"(--[a-z_]+)"', file.read_text("utf-8")))
    named = set(re.findall(r"(?<![-\w])--[a-z][a-z_]+", text_of(document)))
    assert named - known - OTHERS == set()


def test_every_module_is_where_the_readme_says_and_none_is_left_out():
    section = text_of("README.md").split("## Where things are")[1].split("\n## ")[0]
    paths = set(re.findall(r"`([\w./]+)`", section))
    words = {path.split("/")[-1] for path in paths}
    for folder in ("ppo", "reward", "sft", "data", "utils", "utils/weight_diff"):
        modules = {file.stem for file in (REPOSITORY / folder).glob("*.py")} - {"__init__"}
        assert modules - words == set(), folder
    there = list(REPOSITORY.glob("*"))
    for folder in ("ppo", "reward", "sft", "data", "utils", "experiments", "benchmarks"):
        there += (REPOSITORY / folder).rglob("*")
    names = {name for path in there for name in (path.name, path.stem)}
    assert {path for path in paths if path.strip("/").split("/")[-1] not in names} == set()
