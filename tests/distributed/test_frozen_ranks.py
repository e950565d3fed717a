"""Frozen models on three ranks under ZeRO-1 and 2: each holds a third, scores are those of the whole model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.frozen import CASES, RANKS, SHAPE
from tests.helpers.tiny import tiny_llama
from tests.helpers.tiny_run import REPOSITORY, clean_environment
from utils.engine.engine import PERSISTENT


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[dict]]:
    """Case -> what each rank found."""
    folder = tmp_path_factory.mktemp("frozen")
    result = subprocess.run(
        [sys.executable, "-m", "tests.distributed.frozen", str(folder)],
        cwd=REPOSITORY, env=clean_environment() | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return {name: json.loads(Path(folder, f"{name}.json").read_text()) for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_the_whole_model(found, case):
    for own in found[case]:
        assert max(own["off"]) < 1e-5
        assert own["linear"], "torch.nn.functional.linear is replaced for the models that are trained, too"


@pytest.mark.parametrize("case", ["ZeRO-1", "ZeRO-2, offloaded"])
def test_a_rank_holds_its_share(found, case):
    numels = [p.numel() for p in tiny_llama(**SHAPE).parameters()]
    shards = sum(-(-n // RANKS) for n in numels)
    small = sum(n for n in numels if n <= PERSISTENT)
    assert shards + small < sum(numels) / 2  # norms, and of this tiny model its key and value projections
    for own in found[case]:
        first, *later = own["held"]
        assert first == shards and max(later) <= shards + small


@pytest.mark.parametrize("case", CASES)
def test_a_policy_is_compared_with_what_each_rank_holds_of_the_reference(found, case):
    assert [own["same"] for own in found[case]] == [[True] * 3] * RANKS
    assert [own["changed"] for own in found[case]] == [[True] * 2] * (RANKS - 1) + [[False] * 2]
