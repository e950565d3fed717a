"""Runs with vLLM repeat bit for bit, also after a kill or a signal, and leave the global random streams alone."""

import pytest

from tests.faults.scenarios import run_cases
from tests.helpers.tiny_run import assert_same_run, read_metrics

SCORES = """
import random, numpy, torch

def score(prompts, answers):
    return [random.random() + numpy.random.rand() + float(torch.rand(())) for _ in answers]
"""
ALONE = {"ranks": 1, "zero_stage": 0, "reward_fn": "random_scores.py:score"}
VLLM = ALONE | {"rollout_engine": "vllm"}
BOTH = {"rollout_engine": "vllm", "zero_stage": 3, "num_eval_prompts": 3, "save_per_step": 1}
CASES = {
    "own": ALONE | {"rollout_engine": "own"},
    "undisturbed": VLLM,
    "killed": VLLM | {"fault": [0, "update", 11]},
    "after killed": VLLM | {"out": "killed"},
    "own killed": ALONE | {"rollout_engine": "own", "fault": [0, "update", 11]},
    "after own killed": VLLM | {"out": "own killed"},
    "two ranks": BOTH,
    "stopped": BOTH | {"fault": "SIGTERM in vLLM"},
    "after stopped": BOTH | {"out": "stopped"},
}


@pytest.fixture(scope="module")
def results(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    (folder / "random_scores.py").write_text(SCORES)
    file = {"reward_fn": f"{folder}/{ALONE['reward_fn']}"}
    return run_cases(
        folder, inputs, {name: case | (file if "reward_fn" in case else {}) for name, case in CASES.items()}
    )


@pytest.mark.slow
def test_random_streams_are_those_of_a_run_without_vllm(results):
    """A reward function draws from the streams of Python, NumPy and PyTorch. Samples are the same in float32."""
    rows, others = (read_metrics(results[name].out) for name in ("undisturbed", "own"))
    assert len(rows) == 3
    for row, other in zip(rows, others, strict=True):
        assert {key: value for key, value in row.items() if key in other} == other


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "like", "codes"),
    [("killed", "undisturbed", [-9]), ("stopped", "two ranks", [143, 143]), ("own killed", "own", [-9])],
)
def test_resumed_runs_are_those_that_nothing_befell(results, name, like, codes):
    assert results[name].codes == codes, results[name].log[-3000:]
    after = results[f"after {name}"]
    assert after.codes == [0] * len(codes) and "resuming from" in after.log, after.log[-3000:]
    if name.startswith("own"):
        assert "resumed with another --rollout_engine: vllm, not own; only rounding and dropout differ" in after.log
        rows = [{k: v for k, v in row.items() if not k.startswith("sampler_")} for row in read_metrics(after.out)]
        assert rows == read_metrics(results[like].out)
    else:
        assert_same_run(after.out, results[like].out)
