"""docs/algorithms.md has a row for every estimator and preset, and what it says of them is so."""

import re
import shlex

import pytest
import torch

from ppo.advantages import ADVANTAGE_ESTIMATORS
from ppo.config import AMOUNTS, PPOConfig
from ppo.estimators import load_estimator, needs_of
from ppo.presets import PRESETS
from tests.unit.test_documents import text_of
from utils.flags.parser import parse_args

TEXT = text_of("docs/algorithms.md")
MODELS = ["--policy_model_path", "P", "--critic_model_path", "C", "--data_path", "D"]


def table(heading: str) -> dict[str, list[str]]:
    """The rows of the first table below a heading: name in the first cell -> all cells."""
    lines = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {row[0].split("`")[1]: row for row in rows if not row[0].startswith("`--")}


def config_of(*flags: str) -> PPOConfig:
    return parse_args(PPOConfig, [*MODELS, *flags], PRESETS, AMOUNTS)


def test_every_estimator_has_a_row():
    assert list(table("Advantage estimators")) == list(ADVANTAGE_ESTIMATORS)


@pytest.mark.parametrize("name", ADVANTAGE_ESTIMATORS)
def test_what_an_estimator_needs(name):
    needs = table("Advantage estimators")[name][3]
    names = {"critic": "values", "groups": "groups", "greedy": "baselines"}
    assert {word for word in names if word in needs} == {word for word in names if names[word] in needs_of(name)}


def test_every_preset_has_a_row():
    assert list(table("Presets")) == list(PRESETS)


@pytest.mark.parametrize("name", sorted({*PRESETS} - {"ppo_max", "vanilla"}))
def test_the_flags_of_a_preset(name):
    """The flags in its row and in the text below the table make the same run as --preset."""
    below = " ".join(TEXT.partition("Every preset but `ppo_max`")[2].partition("## Losses")[0].split())
    flags = [table("Presets")[name][1].strip("`"), re.search(r"`(--.*?)`", below)[1]]
    for names, more in re.findall(r"((?:`\w+`[, and]*)+) also set `(--.*?)`", below):
        flags += [more] if f"`{name}`" in names else []
    spelt, preset = (vars(config_of(*words)) for words in (shlex.split(" ".join(flags)), ("--preset", name)))
    assert {key for key in preset if spelt[key] != preset[key]} - {"preset", "given", "replaced_defaults"} == set()


def test_the_estimator_of_the_page(tmp_path):
    """The code of the page, loaded as the run loads it."""
    file = tmp_path / "my_estimators.py"
    file.write_text(re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1])
    estimator = load_estimator(f"{file}:against_median")
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 1]]).bool()
    rewards = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 6.0], [0.0, 5.0]])
    others = dict.fromkeys(("values", "gamma", "lam", "critic_lam", "length_alpha", "baselines"))
    advantages, returns = estimator(rewards=rewards, response_mask=mask, groups=torch.tensor([4, 4, 4, 0]), **others)
    assert advantages.tolist() == [[-1.0, -1.0], [0.0, 0.0], [4.0, 4.0], [0.0, 0.0]]
    assert returns is None and "values" not in needs_of(f"{file}:against_median")
