"""`--plan` against what real engines hold and sizes worked out by hand, and the sizes that `auto` chooses."""

import json
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

from ppo.decoding.kv_cache import AUTO_SLOTS
from ppo.models import PolicyModel
from ppo.planning.plan import Sizes, apply_sizes, choose_sizes, fit_to_memory, plan, prefill_peak
from ppo.planning.shapes import LOGIT, models_of
from ppo.planning.step_time import phases
from ppo.rollout import decoding_options
from tests.helpers.parts import ppo_config, tiny_models
from tests.helpers.tiny import tiny_llama
from train_ppo import main
from utils.engine.engine import DTYPES, TrainEngine
from utils.memory.zero_bytes import gradient_bytes, optimizer_bytes, weight_bytes

LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048,
}  # fmt: skip
NORMS_7B = 65 * 4096
# Embedding; in each layer four projections and three of the MLP; norms. The policy has a head of another 32000 x 4096.
DECODER_7B = 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008) + NORMS_7B
POLICY_7B, CRITIC_7B = DECODER_7B + 32000 * 4096, DECODER_7B + 4096


@pytest.fixture
def paths_7b(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    return {"policy_model_path": str(tmp_path), "critic_model_path": str(tmp_path), "dtype": "bf16", "zero_stage": 2}


def held(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of these tensors' storages, each counted once."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in tensors if x is not None}
    return sum(storage.nbytes() for storage in storages.values())


def gradients(engine: TrainEngine) -> Iterable[torch.Tensor | None]:
    """Wherever DeepSpeed keeps them between backward and step."""
    optimizer = engine.engine.optimizer
    for parameter in engine.module.parameters():
        yield parameter.grad
    for by_group in (getattr(optimizer, "averaged_gradients", {}), getattr(optimizer, "all_grad_tensors", {})):
        for group in by_group.values():
            yield from group or []
    yield getattr(optimizer, "grad_partitions_flat_buffer", None)


ENGINES = [(0, "fp32", "bf16"), (1, "bf16", "bf16"), (2, "bf16", "bf16"), (3, "bf16", "bf16"), (3, "bf16", "fp32")]


@pytest.mark.parametrize(("zero_stage", "dtype", "grad_accum_dtype"), ENGINES)
def test_weights_gradients_and_optimizer_are_what_an_engine_holds(single_process, zero_stage, dtype, grad_accum_dtype):
    """Matrices of 128 x 64 stay whole under ZeRO-3, those of 128 x 128 and above do not."""
    module = PolicyModel(tiny_llama(1000, hidden_size=128).to(DTYPES[dtype]))
    numels, element = [p.numel() for p in module.parameters()], DTYPES[dtype].itemsize
    config = ppo_config(zero_stage=zero_stage, dtype=dtype, grad_accum_dtype=grad_accum_dtype)
    engine = TrainEngine(module, config, "policy")
    ids = torch.arange(3, 35).view(2, 16)
    answer = (torch.arange(16) > 5).expand(2, -1)
    for _ in range(2):  # what is left over from an earlier micro-batch would count
        logprobs, _ = engine(ids, answer)
        engine.backward(logprobs.sum())
    in_sum = 4 if "fp32" in (dtype, grad_accum_dtype) else 2
    assert held(gradients(engine)) == gradient_bytes(numels, zero_stage, 1, in_sum)
    engine.measure()
    engine.apply(1e-3)
    state = {name: x for name, x in engine.state_tensors().items() if not name.startswith("step")}
    if zero_stage == 0:
        state = {name: x for name, x in state.items() if not name.startswith("weight")}
    assert sum(x.nbytes for x in state.values()) == optimizer_bytes(numels, zero_stage, 1)
    parameters = list(module.parameters())
    weights = sum(p.nbytes for p in parameters) + sum(p.ds_tensor.nbytes for p in parameters if zero_stage == 3)
    assert weights == weight_bytes(numels, zero_stage, 1, element)


def rows_and_host(flags: dict, gpus: int, **changes) -> tuple[dict, dict]:
    found = plan(ppo_config(**flags | changes), gpus)
    return found.rows, found.host


def test_sizes_of_7b_are_those_worked_out_by_hand(paths_7b):
    sizes = {"rollout_batch_size": 16, "num_rollouts": 128, "batch_size": 32, "maxlen_prompt": 2048, "maxlen_res": 512}
    flags = paths_7b | sizes | {"gradient_checkpoint": True}
    rows, host = rows_and_host(flags, 8)
    assert rows["weights of the policy"] == [2 * POLICY_7B] * 4
    assert rows["weights of the critic"] == [2 * CRITIC_7B] * 4
    assert rows["weights of the reference"] == [2 * POLICY_7B // 8 + 2 * NORMS_7B] * 4
    assert rows["weights of 1 reward model(s)"] == [2 * CRITIC_7B // 8 + 2 * (NORMS_7B + 4096)] * 4
    assert rows["weights gathered from all GPUs"] == [0, 2 * 10**9, 0, 0]
    assert rows["optimizer of policy and critic"] == [12 * (POLICY_7B + CRITIC_7B) // 8] * 4
    assert rows["gradients of policy and critic"] == [0, 0] + [2 * (POLICY_7B + CRITIC_7B) // 8] * 2
    assert rows["key-value cache"] == [16 * (2048 + 256) * 32 * 2 * 4096 * 2, 0, 0, 0]
    assert host == {"final/ being written (first process only)": 2 * POLICY_7B}

    rows, _ = rows_and_host(flags, 8, grad_accum_dtype="fp32")
    assert rows["gradients of policy and critic"] == [0, 0] + [4 * (POLICY_7B + CRITIC_7B) // 8] * 2

    whole = 2 * (POLICY_7B + CRITIC_7B)
    for gpus, waiting in [(8, whole // 8 + 2 * (2 * NORMS_7B + 4096)), (1, whole)]:
        rows, host = rows_and_host(flags, gpus, zero_stage=1, offload_frozen=True)
        assert "weights of the reference" not in rows
        assert rows.get("one frozen model at a time") == ([0, 2 * POLICY_7B, 0, 0] if gpus == 1 else None)
        assert host["reference and reward models"] == waiting

    rows, host = rows_and_host(flags, 8, zero_stage=3, offload_optimizer=True, offload_frozen=True)
    assert rows["weights of the policy"] == [2 * POLICY_7B // 8 + 2 * NORMS_7B] * 4
    assert rows["optimizer of policy and critic"] == [0] * 4
    assert rows["weights gathered from all GPUs"] == [2 * POLICY_7B, 2 * 10**9, 2 * 10**9, 0]
    assert host["optimizer, with float32 gradients"] == 16 * (POLICY_7B + CRITIC_7B) // 8


def test_activations_of_a_checkpointed_layer_are_its_input(paths_7b):
    """With checkpointing 32 layers keep 32 x 4096 numbers per token, beside the layer that is being recomputed."""
    flags = paths_7b | {"maxlen_prompt": 2048, "maxlen_res": 512, "micro_batch_tokens": 8192}
    kept, recomputed = (
        rows_and_host(flags, 1, gradient_checkpoint=checkpointing)[0]["activations"][2]
        for checkpointing in (False, True)
    )
    inputs, one_layer = 8192 * 32 * 4096 * 2, kept / 32
    assert inputs + one_layer < recomputed < inputs + 2 * one_layer


def test_seconds_of_7b_are_those_worked_out_by_hand(paths_7b):
    """128 texts of 512 + 512 tokens on 8 H100s: 16 per GPU in two micro-batches, four optimizer steps.

    FLOPs per forward of policy and reference: 2 x 6.4763e9 x 16,384, in attention 2 x 131,072 x 1,024^2 x 16, in the
    head 2 x 131.07e6 x 8,192, in all 2.1876e14; of critic and reward model 2.1661e14.
    """
    sizes = {"num_rollouts": 128, "batch_size": 32, "maxlen_prompt": 1024, "maxlen_res": 512, "plan_gpu": "h100"}

    def found(gpus: int = 8, slots: int = 16, recomputed: float = 1.0, captured: bool = True, **changes) -> dict:
        config = ppo_config(**paths_7b | sizes | changes)
        models, rewards = models_of(config)
        trained = {name: replace(model.work, captured=captured) for name, model in models.items()}
        assert models["policy"].work.captured
        works = (trained, [model.work for model in rewards])
        return {phase.name: phase for phase in phases(config, gpus, *works, slots, recomputed)}

    h100 = found()
    floors = {
        "prompts": 1.0721e14 / 989e12,
        "new tokens": 512 * 13.215e9 / 3.35e12 + 8192 * 768 * 524288 / 3.35e12,  # weights, cache
        "scoring": 2 * (2.1876e14 + 2.1661e14) / 989e12,
        "update": 3 * (2.1876e14 + 2.1661e14) / 989e12 + 4 * 30 * 13.346e9 / 8 / 3.35e12,
    }
    assert {name: phase.floor for name, phase in h100.items()} == pytest.approx(floors, rel=1e-3)
    gradients = 2 * 13.346e9 * 7 / 8 / (0.75 * 450e9)  # the weights of an optimizer step, gathered
    seconds = {
        "prompts": 1.0721e14 / (0.56 * 989e12),
        "new tokens": floors["new tokens"] / 0.85,
        "scoring": floors["scoring"] / 0.56,
        "update": 4 * 4.3537e14 / (0.56 * 989e12) + 4 * (gradients + 30 * 13.346e9 / 8 / (0.85 * 3.35e12)),
    }
    assert {name: phase.seconds for name, phase in h100.items()} == pytest.approx(seconds, rel=1e-3)
    assert [phase.bound for phase in h100.values()] == ["matrix products", "memory"] + 2 * ["matrix products"]
    again = 512 * 13.215e9 / (0.85 * 3.35e12)  # with half the slots the weights are read twice as often
    assert found(slots=8)["new tokens"].seconds == pytest.approx(seconds["new tokens"] + again, rel=1e-3)
    eager = found(captured=False)["new tokens"]
    assert (eager.seconds, eager.bound) == (pytest.approx(512 * 32 * 23 * 11e-6), "launches")
    update = found(recomputed=0.0)["update"].seconds
    assert update == pytest.approx(seconds["update"] - 4.3537e14 / (0.56 * 989e12), rel=1e-3)

    alone, offloaded = (found(gpus=1, offload_frozen=offload)["scoring"] for offload in (False, True))
    copied = 2 * 13.346e9 / (0.8 * 64e9)  # reference and reward model, once
    assert offloaded.seconds - alone.seconds == pytest.approx(copied, rel=1e-3)
    waiting = found(offload_frozen=True)["scoring"].seconds
    assert waiting - h100["scoring"].seconds == pytest.approx(2 * copied / 8, rel=1e-3)  # a share in each micro-batch


def test_the_command_prints_a_verdict_and_starts_nothing(paths_7b, tmp_path, capsys):
    """7B on eight cards of 80 GiB does not fit by default, but with checkpointing and offloaded frozen models."""
    out = tmp_path / "run"
    others = {"data_path": tmp_path / "none", "model_save_path": out, "plan_gpus": 8, "rollout_batch_size": 16}
    flags = ["--plan", *(f"--{name}={value}" for name, value in (paths_7b | others).items())]
    main(flags)
    printed = capsys.readouterr().out
    assert "GiB on each of 8 GPU(s), ZeRO-2, bf16, 16 slots, 0 of 32 layers of the policy recomputed" in printed
    assert "DOES NOT FIT" in printed and "--gradient_checkpoint True: " in printed
    assert "Seconds of a buffer on a100" in printed and "checkpoint" in printed.splitlines()[-1]
    main([*flags, "--gradient_checkpoint", "--offload_frozen"])
    assert "\nFITS: " in capsys.readouterr().out
    assert not out.exists()


def test_slots_of_7b_are_those_worked_out_by_hand(paths_7b):
    """A token's keys and values are 32 x 2 x 4096 numbers in bf16; a slot of 2,048 tokens has 2,048 + 256 columns."""
    config = ppo_config(**paths_7b, rollout_batch_size="auto", num_rollouts=1024, maxlen_prompt=2048, maxlen_res=512)
    slot = 2304 * 32 * 2 * 4096 * 2 * 33 // 32 + LOGIT * 32000 + 8 * 512
    prefill = prefill_peak(config, models_of(config)[0]["policy"], 1024)
    rows = {"in every phase": [7] * 4, "in the rollout": [5, 0, 0, 0]}
    assert choose_sizes(config, 8, rows, prefill + 24 * slot + 5).slots == 24
    assert choose_sizes(config, 8, rows, prefill + 24 * slot + 4).slots == 20
    assert choose_sizes(config, 8, rows, prefill + 10**15).slots == 128  # one a prompt
    few = ppo_config(**paths_7b, rollout_batch_size="auto", maxlen_prompt=2048, rollout_cache_tokens=7000)
    assert choose_sizes(few, 1, rows, 10**15).slots == 3
    fixed = ppo_config(**paths_7b, rollout_batch_size=48, num_rollouts=1024, maxlen_prompt=2048)
    assert choose_sizes(fixed, 8, rows, 0).slots == 48


def test_a_plan_with_auto_fits_its_card_and_no_larger_size_would(paths_7b, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B | {"num_hidden_layers": 6}))
    sizes = {"num_rollouts": 1024, "batch_size": 32, "maxlen_prompt": 2048, "maxlen_res": 512, "offload_frozen": True}
    auto = {"rollout_batch_size": "auto", "gradient_checkpoint": "auto", "plan_gpu": "4090"}
    config = ppo_config(**paths_7b, **sizes, **auto, micro_batch_tokens=16384)
    chosen = plan(config, 8).sizes
    assert 8 < chosen.slots < 128 and 0 < chosen.kept["policy"] < 6

    def fits(**changes) -> list[bool]:
        totals = plan(replace(config, **changes), 8).totals
        return [totals[phase] <= 0.9 * 24 * 2**30 for phase in (0, 2)]

    assert fits() == [True, True]
    assert fits(rollout_batch_size=chosen.slots + 16, gradient_checkpoint=False) == [False, False]
    larger = plan(replace(config, plan_gpu_memory=30), 8).sizes
    assert larger.slots > chosen.slots and larger.kept["policy"] > chosen.kept["policy"]


def test_sizes_reach_the_models_and_are_said():
    models, said = tiny_models(), []
    config = ppo_config(rollout_batch_size="auto", gradient_checkpoint="auto")
    fit_to_memory(config, models, said.append)  # on a CPU
    assert not said and decoding_options(config, models.policy.module).max_slots == AUTO_SLOTS
    apply_sizes(config, models, Sizes(24, {"policy": 1, "critic": 2}), said.append)
    assert decoding_options(config, models.policy.module).max_slots == 24
    assert ["1 of 2 layers" in text for text in said] == [False, True, False] and "24 sequences" in said[0]
