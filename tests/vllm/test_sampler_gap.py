"""The gap between real vLLM and the policy: its size in a run, its weights, and what stops a run at its first buffer.

Each run is a process of its own.
"""

import pytest

from tests.faults.scenarios import run_cases
from tests.helpers.tiny_run import read_metrics

pytestmark = pytest.mark.slow
VLLM = {"rollout_engine": "vllm", "checkpoint_per_step": 0}
CASES = {
    "corrected": {
        "ranks": 1,
        "num_eval_prompts": 3,
        "sampler_correction": "truncate",
        "sampler_correction_cap": 1.000001,
    },
    "stopped": {"ranks": 2, "sampler_kl_limit": 0},
    "other logits": {"ranks": 1, "module": "tests.vllm.other_logits"},
}


@pytest.fixture(scope="module")
def results(inputs, tmp_path_factory):
    return run_cases(tmp_path_factory.mktemp("gap"), inputs, {name: VLLM | case for name, case in CASES.items()})


def test_weights_of_a_run_and_the_gap_of_its_evaluations(results):
    assert results["corrected"].codes == [0], results["corrected"].log[-3000:]
    rows = read_metrics(results["corrected"].out)
    assert len(rows) == 3
    for row in rows:
        assert 0.0 < row["sampler_kl"] < 1e-8 and 0.0 < row["sampler_gap_max"] < 1e-3
        assert 0.0 < row["eval_sampler_kl"] < 1e-8
        assert row["sampler_weight_mean"] == pytest.approx(1.0, abs=1e-4)
        assert 0.0 < row["sampler_truncated_fraction"] < 1.0


@pytest.mark.parametrize(("name", "least"), [("stopped", 0.0), ("other logits", 1e-3)])
def test_a_gap_above_the_limit_stops_all_ranks_before_the_first_update(results, name, least):
    result = results[name]
    assert set(result.codes) == {2}
    (line,) = (line for line in result.log.splitlines() if line.startswith("error"))
    assert ": step 1: vLLM samples from another distribution than the policy's: sampler_kl is " in line
    assert float(line.split("sampler_kl is ")[1].split()[0]) > least
    assert "all weights were equal" in line and "--rollout_engine own" in line
    assert not (result.out / "metrics.jsonl").exists() or not read_metrics(result.out)
