"""Faults between the policy's weights and vLLM's: each stops the run at the first buffer that it touches."""

import pytest

from tests.faults.scenarios import run_forked
from tests.helpers.tiny_run import read_metrics, run_flags
from tests.vllm.jobs import run_jobs
from tests.vllm.models import ROPE, tiny_folder

JOBS = "tests.vllm.fault_jobs"
# (model, dtype, learning rate, ZeRO stage). A step of 5e-7 changes few bf16 weights, by a bit. A tied head can be stale
# only where vLLM holds a packed copy of it: in float32 on every CPU, in bf16 on those with AVX-512.
CASES = {
    "fp32": ("Llama, tied", "fp32", 1e-4, 1),
    "bf16": ("Llama", "bf16", 5e-7, 2),
    "fp32, ZeRO-3": ("Qwen2", "fp32", 5e-7, 3),
}


@pytest.mark.parametrize("case", [pytest.param(x, marks=[] if x == "bf16" else pytest.mark.slow) for x in CASES])
def test_each_fault_is_stopped_and_named(case, tmp_path):
    model, dtype, lr, stage = CASES[case]
    folder = tiny_folder(tmp_path / "model", model)
    [found] = run_jobs(tmp_path, faults=(f"{JOBS}:inject", 1, folder, dtype, lr, stage))["faults"]
    clean = {"none", "repaired", "changed before the sync"}
    for name in clean & found.keys():
        assert found.pop(name) == ["", ""], name
    for name in ("asleep: sync", "asleep: generate", "no cache: generate"):
        error, _ = found.pop(name)
        assert "while it sleeps" in error, name
    for name, held in (("sync left out", "None"), ("a step after the sync", "1")):
        error, _ = found.pop(name)
        assert error.startswith(f"UserError: --rollout_engine vllm: version {held} of the weights"), error
    if "policy changed behind the sync" in found:
        error, tensor = found.pop("policy changed behind the sync")
        assert "sampler_kl is" in error and f"{tensor} in vLLM is not the policy's" in error
    if dtype == "bf16":  # exact
        assert found.pop("through bfloat16") == ["", ""]
    assert {"nothing delivered", "one layer stale", "rows shuffled", "lost in sleep"} <= found.keys()
    for name, (error, tensor) in found.items():
        assert tensor, name
        assert error.startswith(f"UserError: --rollout_engine vllm: {tensor} in vLLM is not the policy's"), error
        assert "nothing was sampled" in error


@pytest.mark.slow
def test_a_run_of_two_ranks_ends_when_the_weights_of_one_are_stale(inputs, tmp_path):
    """Under ZeRO-3, where both have to gather all weights although one has found the difference."""
    flags = run_flags(inputs, tmp_path / "run", rollout_engine="vllm", zero_stage=3, num_eval_prompts=0)
    row = {"module": JOBS, "function": "stale_run", "argv": [flags]}
    result = run_forked(tmp_path, {"run": row})["run"]
    assert result.codes == [2, 2]
    assert "model.layers.1.self_attn.q_proj.weight in vLLM of rank 1 is not the policy's" in result.log
    assert len(read_metrics(tmp_path / "run")) == 1


@pytest.mark.slow
def test_another_config_is_found_by_the_log_probabilities(tmp_path):
    folder = tiny_folder(tmp_path / "model", "Llama")
    changes = {"rope": {"rope_parameters": ROPE | {"rope_theta": 1e6}}, "norm": {"rms_norm_eps": 0.01}}
    jobs = {x: (f"{JOBS}:other_config", 1, folder, tmp_path / x / "copy", changes[x]) for x in changes}
    for name, [[error]] in run_jobs(tmp_path, **jobs).items():
        assert error.startswith("vLLM samples from another distribution than the policy's: sampler_kl is"), name
        assert "all weights were equal" in error
