"""Models of many kinds in vLLM: tokens and log-probabilities are the policy's, before and after ten optimizer steps."""

import ast
import re

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from data.demo import english
from data.demo.files import package_file
from ppo.sampler_gap import KL_LIMITS
from tests.helpers.tiny_run import REPOSITORY, run_flags, run_module
from tests.vllm.jobs import run_jobs
from tests.vllm.models import MODELS, REFUSED, tiny_folder
from utils.errors import UserError
from utils.fast_dtype import fast_dtype

JOBS = "tests.vllm.proof_jobs"
ALSO = {"Llama": [(2, 1), (3, 1), (3, 2)], "Qwen2": [(3, 1)], "Phi-3": [(2, 1)], "Gemma 3": [(3, 1)]}
CASES = [(name, *case) for name in MODELS for case in [(1, 1), *ALSO.get(name, [])]]  # model, ZeRO stage, ranks


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> dict[str, list]:
    """Case -> what `follow` found on each rank; all in processes of one that has imported vLLM."""
    folder = tmp_path_factory.mktemp("architectures")
    models = {name: tiny_folder(folder / name.replace(" ", "_"), name) for name in MODELS}
    jobs = {str(case): (f"{JOBS}:follow", case[2], models[case[0]], case[1]) for case in CASES}
    return run_jobs(folder, **jobs)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_vllm_samples_what_the_own_decoder_samples(case, followed):
    for found in followed[str(case)]:
        assert found["version"] == 10 and found["moved"] > 1e-3  # ten steps of 1e-3 in every tensor
        for when in ("before", "after"):
            for how in ("greedy", "sampled"):
                result = found[when][how]
                assert result["same"] and result["gap"] < 1e-4 and result["tokens"] > 30, (when, how, result)
        # vLLM restores buffers after sleep of level 2, and no other tensors. These are no weights.
        assert found["discards"] and set(found["elsewhere"]) <= {"kv_cache", "_k_scale_cpu", "_v_scale_cpu"}


def test_sleep_discards_no_other_classes():
    source = (REPOSITORY / "ppo" / "decoding" / "vllm_engine.py").read_text()  # vLLM must not be imported here
    listed = re.search(r"^DISCARDED = (\(.*?\))", source, re.MULTILINE | re.DOTALL)[1]
    assert set(ast.literal_eval(listed)) == {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family] for family, _ in MODELS.values()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_demo_model(dtype, tmp_path):
    """SmolLM2 with 135 million parameters. In bf16 roundings differ, and one may decide which token is drawn."""
    try:
        package_file(english.MODEL_PACKAGE, english.MODEL_FILE)
    except UserError as error:
        pytest.skip(str(error))
    if fast_dtype(torch.device("cpu")) != dtype == "bf16":
        pytest.skip("this CPU multiplies bf16 in software")
    english.build_model(tmp_path / "model")
    [found] = run_jobs(tmp_path, follow=(f"{JOBS}:follow", 1, tmp_path / "model", 1, dtype, 3, 1e-5))["follow"]
    for when in ("before", "after"):
        for how in ("greedy", "sampled"):
            assert found[when][how]["kl"] < KL_LIMITS[dtype], (when, how, found)
        if dtype == "fp32":
            assert found[when]["greedy"]["same"] and found[when]["greedy"]["gap"] < 1e-3, found


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compared_is_refused_before_the_run_has_a_folder(name, inputs, tmp_path):
    folder = tiny_folder(tmp_path / "model", name)
    flags = run_flags(inputs, tmp_path / "run", policy_model_path=folder, rollout_engine="vllm")
    result = run_module("train_ppo", *flags)
    [line] = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    assert result.returncode == 2
    assert "--rollout_engine vllm: " in line and line.endswith("pass --rollout_engine own")
    assert not (tmp_path / "run").exists()
