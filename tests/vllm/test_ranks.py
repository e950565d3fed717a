"""Ranks that share a copy of the policy in vLLM: they make the run of one with `own`, and stop together."""

import pytest

from tests.faults.scenarios import run_cases
from tests.helpers.tiny_run import final_weights, read_lines, read_metrics
from tests.vllm.jobs import run_jobs

VLLM = {"rollout_engine": "vllm"}
SHARED = VLLM | {"vllm_tensor_parallel_size": 2}
CASES = {
    "own": {"zero_stage": 2, "rollout_engine": "own"},
    "alone": VLLM | {"zero_stage": 2},
    "shared": SHARED | {"zero_stage": 1},
    "shared split": SHARED | {"zero_stage": 3, "repetition_penalty": 1.2},
    "own split": {"zero_stage": 3, "rollout_engine": "own", "repetition_penalty": 1.2},
    "stopped": SHARED | {"zero_stage": 2, "fault": "SIGTERM in vLLM", "hang_timeout": 60},
    "other engine": {"zero_stage": 2, "out": "stopped", "rollout_engine": "own"},
    "groups of three": VLLM | {"vllm_tensor_parallel_size": 3},
    "batch invariant": VLLM | {"vllm_batch_invariant": True},
    "bad score": SHARED | {"reward_fn": "reward_file.py:fails"},
}


def test_a_fault_in_the_share_of_one_rank_is_found(inputs, tmp_path):
    """Rank 1 has the last element of every tensor. The first one too of norms, and of keys and values, whose only head
    both ranks have.
    """
    [said, same] = run_jobs(tmp_path, damaged=("tests.vllm.rank_jobs:damage_shards", 2, inputs.policy, 3))["damaged"]
    assert said == same and said.pop("") == [None]
    assert len(said) == 2 * 9 + 3
    for name, (first, last) in said.items():
        found = f"{name} in vLLM of rank 1 is not the policy's (largest difference 1)"
        is_whole = "norm" in name or "k_proj" in name or "v_proj" in name
        assert (first, last) == (found if is_whole else None, found)


@pytest.fixture(scope="module")
def results(inputs, tmp_path_factory):
    cases = {name: {"num_eval_prompts": 1, "save_per_step": 2} | case for name, case in CASES.items()}
    cases["bad score"]["reward_fn"] = f"{inputs.reward_file}:fails"
    return run_cases(tmp_path_factory.mktemp("ranks"), inputs, cases)


def numbers(result) -> list[dict]:
    """The metrics of a run but for those that only vLLM has."""
    return [{k: v for k, v in row.items() if "sampler_" not in k} for row in read_metrics(result.out)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "like"), [("alone", "own"), ("shared", "own"), ("shared split", "own split"), ("other engine", "own")]
)
def test_runs_are_those_of_the_own_engine(results, name, like):
    """Also if it takes over after a signal in vLLM's rollout."""
    found, expected = results[name], results[like]
    assert found.codes == expected.codes == [0, 0], found.log[-3000:]
    samples, others = (read_lines(x.out / "samples.jsonl") for x in (found, expected))
    assert [row["answer"] for row in samples] == [row["answer"] for row in others]
    rows, others = numbers(found), numbers(expected)
    assert len(rows) == 3
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)
    weights, others = final_weights(found.out), final_weights(expected.out)
    assert max(float((weights[key] - others[key]).abs().max()) for key in others) < 1e-6


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_those_that_share_its_model(results):
    result = results["stopped"]
    assert result.codes == [143, 143], result.log[-3000:]
    assert "stopped by SIGTERM after step 1; what followed is made again; the same command resumes" in result.log
    assert "resumed with another --rollout_engine: own, not vllm; only rounding" in results["other engine"].log
    assert "Traceback" not in result.log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "groups of three",
            "error [rank 0]: --vllm_tensor_parallel_size 3: 2 processes do not divide into groups of 3 ",
        ),
        ("batch invariant", "error [rank 0]: --vllm_batch_invariant needs GPUs of compute capability 9.0 or newer"),
    ],
)
def test_refusals(results, name, text):
    assert results[name].codes == [2, 2] and not results[name].out.exists()
    assert results[name].log.count(text) == results[name].log.count("error") == 1, results[name].log


@pytest.mark.slow
def test_an_error_in_training_ends_vllm_too(results):
    result = results["bad score"]
    assert result.codes == [2, 2]
    assert result.log.splitlines()[-1].startswith("error [rank 0]: --reward_fn failed"), result.log[-3000:]
    assert not any(word in result.log for word in ("Traceback", "UserWarning", "FutureWarning", "leaked"))
