"""Memory and time of rollouts by vLLM, against sizes worked out by hand for LLaMA-7B."""

import json
import re
from dataclasses import replace

import pytest

from ppo.planning.plan import apply_sizes, fixed_rows, measured_sizes, plan, vllm_sizes
from ppo.planning.shapes import models_of
from ppo.planning.step_time import phases
from ppo.planning.vllm_memory import share_of
from tests.helpers.parts import ppo_config, tiny_models
from tests.unit.test_plan import CRITIC_7B, LLAMA_7B, NORMS_7B, POLICY_7B, paths_7b  # noqa: F401 - a fixture
from train_ppo import main
from utils.engine.memory import device_memory
from utils.errors import UserError

GIB = 2**30
SEQUENCE = 2048 * 32 * 2 * 4096 * 2  # bytes of the cache of 2,048 tokens: 1 GiB
BLOCK = SEQUENCE // 16  # bytes of 128 tokens, which vLLM may keep back
DRAWN = 48 * 32000
SIZES = {"num_rollouts": 128, "batch_size": 32, "maxlen_prompt": 2048, "maxlen_res": 512}
SIZES |= {"rollout_engine": "vllm", "rollout_batch_size": "auto", "plan_gpu": "h100", "gradient_checkpoint": True}
STATES = 12 * (POLICY_7B + CRITIC_7B) // 8


# Of ZeRO-2 on eight GPUs: both trained models whole, an eighth of the frozen ones and their norms, the optimizer.
TRAINING = 2 * (POLICY_7B + CRITIC_7B) + 2 * (POLICY_7B + CRITIC_7B) // 8 + 2 * (2 * NORMS_7B + 4096) + STATES


def test_the_cache_takes_what_training_leaves_and_no_more_than_all_sequences_need(paths_7b):  # noqa: F811
    """12.55 GiB of weights, 1 of graphs, 1 per sequence. Unless 8 of 16 fit, the optimizer goes to host memory."""
    config = ppo_config(**paths_7b | SIZES)
    found = plan(replace(config, plan_gpu_memory=66), 8)
    rows = {name: row for name, row in found.rows.items() if name.startswith("vLLM")}
    forward = rows["vLLM: activations"][0]
    assert rows == {
        "vLLM: weights": [2 * POLICY_7B, 0, 0, 0],
        "vLLM: activations": [forward, 0, 0, 0],
        "vLLM: CUDA graphs": [GIB] * 4,
        "vLLM: key-value cache": [16 * SEQUENCE + BLOCK, 0, 0, 0],
        "vLLM: drawing of tokens": [16 * DRAWN, 0, 0, 0],
    }
    assert "key-value cache" not in found.rows and found.rows["activations"][:2] == [0, forward]
    assert found.rows["optimizer of policy and critic"] == [0, STATES, STATES, STATES]
    assert found.host["optimizer during rollouts"] == STATES and found.sizes.slots == 16
    needed = 2 * POLICY_7B + forward + GIB + BLOCK
    for memory, slots, offload in ((90, 16, False), (80, 11, False), (77, 8, False), (76, 16, True), (64, 15, True)):
        sizes = vllm_sizes(config, 8, memory * GIB)
        room = int(0.9 * memory * GIB) - TRAINING - needed
        fit = [min(16, (room + more) // (SEQUENCE + DRAWN)) for more in (0, STATES)]
        assert (sizes.slots, sizes.offload_states) == (slots, offload) == (fit[offload], fit[0] < 8)
        assert sizes.budget == needed + slots * SEQUENCE and sizes.missing == 0
        assert share_of(sizes, config, memory * GIB) == pytest.approx(sizes.budget / memory / GIB)


def test_what_is_split_over_gpus(paths_7b):  # noqa: F811
    """Two GPUs share weights and cache: each holds half of twice as many sequences. ZeRO-3 gathers one layer."""
    config = ppo_config(**paths_7b | SIZES | {"vllm_tensor_parallel_size": 2, "zero_stage": 3, "num_eval_prompts": 136})
    found, memory = vllm_sizes(config, 8, 80 * GIB), 80 * GIB
    assert found.awake["vLLM: weights"] == POLICY_7B and found.slots == 2 * 17
    assert found.awake["vLLM: key-value cache"] == 17 * SEQUENCE + BLOCK // 2
    gathered = fixed_rows(config, 8)[0]["weights gathered from all GPUs"][0]
    assert 0 < gathered - 4 * (4 * 4096**2 + 3 * 4096 * 11008) < 4 * 3 * 4096
    assert vllm_sizes(replace(config, rollout_cache_tokens=7000), 8, memory).slots == 3
    assert vllm_sizes(replace(config, rollout_batch_size=5), 8, memory).slots == 5


def test_a_share_of_the_users(paths_7b):  # noqa: F811
    config = ppo_config(**paths_7b | SIZES | {"vllm_gpu_memory_utilization": 0.25})
    sizes = vllm_sizes(config, 8, 80 * GIB)
    assert sizes.budget == 20 * GIB and sizes.awake["vLLM: key-value cache"] // SEQUENCE == sizes.slots == 5
    assert not sizes.offload_states and vllm_sizes(config, 8, 64 * GIB).offload_states
    assert share_of(sizes, config, 80 * GIB) == 0.25


def test_too_little_memory_names_what_helps(paths_7b, tmp_path):  # noqa: F811
    config = ppo_config(**paths_7b | SIZES)
    for memory in (24 * GIB, 40 * GIB):
        sizes = vllm_sizes(config, 8, memory)
        missing = TRAINING - STATES + sizes.budget + DRAWN - int(0.9 * memory)
        assert (sizes.slots, sizes.offload_states, sizes.missing) == (1, True, missing)
        with pytest.raises(
            UserError, match=r"--vllm_tensor_parallel_size\).*--zero_stage 3.*--offload_optimizer"
        ) as told:
            share_of(sizes, config, memory)
        assert f"{missing / GIB:.1f} more than" in str(told.value) and "--rollout_engine own" in str(told.value)
    memory = device_memory()
    tiny = ppo_config(
        **paths_7b | SIZES | {"zero_stage": 3, "vllm_tensor_parallel_size": 8, "maxlen_prompt": 64, "maxlen_res": 8}
    )
    sizes = vllm_sizes(tiny, 10**4, memory)
    assert share_of(sizes, tiny, memory) == sizes.budget / memory


def test_seconds_of_rollouts_by_vllm_are_those_worked_out_by_hand(paths_7b):  # noqa: F811
    """128 texts of 512 + 512 tokens on 8 H100s; a decoding step reads 13.215 GB, a token's cache has 524,288 bytes."""
    sizes = SIZES | {"maxlen_prompt": 1024}

    def found(slots: int, moved: int = 0, **changes) -> dict:
        config = ppo_config(**paths_7b | sizes | changes)
        models, rewards = models_of(config)
        trained = {name: model.work for name, model in models.items()}
        return {x.name: x for x in phases(config, 8, trained, [x.work for x in rewards], slots, 1.0, moved)}

    rate, whole, tensors = 0.85 * 3.35e12, 2 * 6.7384e9, 9 * 32
    alone = found(16)
    assert list(alone) == ["weights", "comparison", "prompts", "new tokens", "scoring", "update"]
    copied = 2 * whole / rate  # read and written; read twice
    expected = {"weights": copied + tensors * 5e-4 + 0.2, "comparison": copied + tensors * 1e-4}
    read = (512 * 13.215e9 + 8192 * 768 * 524288) / rate
    expected |= {"prompts": 1.0721e14 / (0.56 * 989e12), "new tokens": read + 512 * 2e-3 + 8192 * 2e-5}
    assert {name: alone[name].seconds for name in expected} == pytest.approx(expected, rel=1e-3)
    assert [alone[name].sent for name in expected] == [0, 0, 0, 0]
    moved = found(16, moved=10**10)["weights"].seconds - alone["weights"].seconds
    assert moved == pytest.approx(2 * 10**10 / (0.8 * 64e9))
    own = found(16, rollout_engine="own")
    assert alone["new tokens"].seconds - own["new tokens"].seconds == pytest.approx(512 * 2e-3 + 8192 * 2e-5)

    pair = found(32, vllm_tensor_parallel_size=2, zero_stage=3)  # 32 texts, of which each holds half of all numbers
    sent = 7 / 8 * whole
    gathered = sent / (0.75 * 450e9) + 3 * whole / rate  # read and copied whole, and a half written
    reads = (512 * 13.215e9 / 2 + 8192 * 768 * 524288) / rate
    expected = {
        "weights": gathered + tensors * 5e-4 + 0.2,
        "comparison": gathered + tensors * 1e-4,
        "prompts": expected["prompts"],
        "new tokens": reads + 512 * 2e-3 + 2 * 8192 * 2e-5 + 2 * 32 * 512 * 15e-6,
    }
    assert {name: pair[name].seconds for name in expected} == pytest.approx(expected, rel=1e-3)
    assert [pair[name].sent for name in expected] == pytest.approx([sent, sent, 0, 0], rel=1e-3)


def test_the_command_prints_vllms_share_and_what_would_help(paths_7b, capsys):  # noqa: F811
    """Where only the rollout does not fit."""
    words = {"rollout_engine": "vllm", "plan_gpus": 8, "data_path": "-", "maxlen_prompt": 1024, "zero_stage": 3}
    words |= {"offload_optimizer": True, "gradient_checkpoint": True, "plan_gpu_memory": 16}
    main(["--plan", *(f"--{name}={value}" for name, value in (paths_7b | words).items())])
    printed = capsys.readouterr().out
    assert "vLLM: weights" in printed and "\ncomparison " in printed
    assert re.search(r"\n--vllm_gpu_memory_utilization 0\.9\d\d\n\nDOES NOT FIT: .* in rollout\.", printed)
    assert "--rollout_engine own: " in printed and "--vllm_tensor_parallel_size 2: " in printed


def test_a_run_with_vllm_chooses_no_slots_for_the_policys_engine(paths_7b, tmp_path):  # noqa: F811
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B | {"num_hidden_layers": 2}))
    config, models, said = ppo_config(**paths_7b | SIZES | {"gradient_checkpoint": "auto"}), tiny_models(), []
    before = models.policy.module.slots
    apply_sizes(config, models, measured_sizes(config, models, 10**15), said.append)
    assert models.policy.module.slots == before
    assert ["recomputes 0 of 2 layers" in text for text in said] == [True, True]
