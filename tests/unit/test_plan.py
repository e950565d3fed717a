"""`--plan` against what real engines hold, against sizes worked out by hand, and against real passes."""

import json
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel

from ppo.experience import make_experience
from ppo.models import PolicyModel
from ppo.planning.plan import TOKEN, plan
from ppo.planning.shapes import models_of
from ppo.planning.step_time import phases
from ppo.score import score
from tests.helpers.parts import PROMPTS, ppo_config, prompts_of, rollout_by_hand, tiny_models, token_ids
from tests.helpers.tiny import tiny_llama, tiny_llama_config
from train_ppo import main
from utils.engine.engine import DTYPES, TrainEngine
from utils.memory.activation_peak import ATTENTION, LiveBytes, peak_bytes
from utils.memory.zero_bytes import gradient_bytes, optimizer_bytes, weight_bytes
from utils.models.load import enable_checkpointing
from utils.moments import RunningMoments

LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048,
}  # fmt: skip
NORMS_7B = 65 * 4096
# Embedding; in each layer four projections and three of the MLP; norms. The policy has a head of another 32000 x 4096.
DECODER_7B = 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008) + NORMS_7B
POLICY_7B, CRITIC_7B = DECODER_7B + 32000 * 4096, DECODER_7B + 4096


@pytest.fixture
def folder_7b(tmp_path):
    folder = tmp_path / "llama-7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_7B))
    return folder


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


ENGINES = [(0, "fp32", "bf16"), (2, "fp32", "bf16"), (1, "bf16", "bf16"), (2, "bf16", "bf16"), (3, "bf16", "bf16")]
ENGINES += [(2, "bf16", "fp32"), (3, "bf16", "fp32")]


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
    engine.step(1e-3)
    state = {name: x for name, x in engine.state_tensors().items() if not name.startswith("step")}
    if zero_stage == 0:
        state = {name: x for name, x in state.items() if not name.startswith("weight")}
    assert sum(x.nbytes for x in state.values()) == optimizer_bytes(numels, zero_stage, 1)
    parameters = list(module.parameters())
    weights = sum(p.nbytes for p in parameters) + sum(p.ds_tensor.nbytes for p in parameters if zero_stage == 3)
    assert weights == weight_bytes(numels, zero_stage, 1, element)


def test_sizes_of_7b_are_those_worked_out_by_hand(folder_7b):
    paths = {"policy_model_path": str(folder_7b), "critic_model_path": str(folder_7b)}
    sizes = {"rollout_batch_size": 16, "num_rollouts": 128, "batch_size": 32, "maxlen_prompt": 2048, "maxlen_res": 512}
    flags = paths | sizes | {"dtype": "bf16", "gradient_checkpoint": True}
    rows, host = plan(ppo_config(**flags, zero_stage=2), gpus=8)
    assert rows["weights of the policy"] == [2 * POLICY_7B] * 4
    assert rows["weights of the critic"] == [2 * CRITIC_7B] * 4
    assert rows["weights of the reference"] == [2 * POLICY_7B // 8 + 2 * NORMS_7B] * 4
    assert rows["weights of 1 reward model(s)"] == [2 * CRITIC_7B // 8 + 2 * (NORMS_7B + 4096)] * 4
    assert rows["weights gathered from all GPUs"] == [0, 2 * 10**9, 0, 0]
    assert rows["optimizer of policy and critic"] == [12 * (POLICY_7B + CRITIC_7B) // 8] * 4
    assert rows["gradients of policy and critic"] == [0, 0] + [2 * (POLICY_7B + CRITIC_7B) // 8] * 2
    assert rows["key-value cache"] == [16 * (2048 + 256) * 32 * 2 * 4096 * 2, 0, 0, 0]
    assert host == {"final/ being written (first process alone)": 2 * POLICY_7B}

    rows, _ = plan(ppo_config(**flags, zero_stage=2, grad_accum_dtype="fp32"), gpus=8)
    assert rows["gradients of policy and critic"] == [0, 0] + [4 * (POLICY_7B + CRITIC_7B) // 8] * 2

    whole = 2 * (POLICY_7B + CRITIC_7B)
    for gpus, waiting in [(8, whole // 8 + 2 * (2 * NORMS_7B + 4096)), (1, whole)]:
        rows, host = plan(ppo_config(**flags, zero_stage=1, offload_frozen=True), gpus)
        assert "weights of the reference" not in rows
        assert rows.get("a frozen model at a time") == ([0, 2 * POLICY_7B, 0, 0] if gpus == 1 else None)
        assert host["reference and reward models"] == waiting

    rows, host = plan(ppo_config(**flags, zero_stage=3, offload_optimizer=True, offload_frozen=True), gpus=8)
    assert rows["weights of the policy"] == [2 * POLICY_7B // 8 + 2 * NORMS_7B] * 4
    assert rows["optimizer of policy and critic"] == [0] * 4
    assert rows["weights gathered from all GPUs"] == [2 * POLICY_7B, 2 * 10**9, 2 * 10**9, 0]
    assert host["optimizer, with float32 gradients"] == 16 * (POLICY_7B + CRITIC_7B) // 8


def test_activations_of_a_checkpointed_layer_are_its_input(folder_7b):
    """With checkpointing 32 layers keep 32 x 4096 numbers a token, beside the layer that is being recomputed."""
    sizes = {"maxlen_prompt": 2048, "maxlen_res": 512, "micro_batch_tokens": 8192, "dtype": "bf16", "zero_stage": 2}
    paths = {"policy_model_path": str(folder_7b), "critic_model_path": str(folder_7b)}
    found = {}
    for checkpointing in (False, True):
        rows, _ = plan(ppo_config(**sizes, **paths, gradient_checkpoint=checkpointing), gpus=1)
        found[checkpointing] = rows["activations"][2]
    inputs = 8192 * 32 * 4096 * 2
    one_layer = found[False] / 32
    assert inputs + one_layer < found[True] < inputs + 2 * one_layer


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_a_pass_on_shapes_takes_what_a_real_one_takes(backward, checkpointing):
    config = tiny_llama_config(1000, hidden_size=256, intermediate_size=700, num_hidden_layers=4)
    with torch.device("meta"):
        shapes = AutoModel.from_config(config, attn_implementation=ATTENTION).train()
    real = AutoModel.from_config(config).train()
    if checkpointing:
        enable_checkpointing(shapes)
        enable_checkpointing(real)
    for parameter in real.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with torch.set_grad_enabled(backward), LiveBytes() as counter:
        hidden = real(input_ids=torch.zeros(2, 128, dtype=torch.int64), use_cache=False).last_hidden_state
        if backward:
            hidden.backward(torch.ones_like(hidden))
    assert peak_bytes(shapes, 2, 128, backward) == pytest.approx(counter.peak, rel=0.05)


def test_live_bytes_forget_what_was_freed():
    x = torch.ones(1000)
    with LiveBytes() as counter:
        y = x * 2
        z = y + 1
        del y
        z = z * z
        x.view(10, 100).add_(1)  # nothing new
    assert counter.peak == 8000


def test_seconds_of_7b_are_those_worked_out_by_hand(folder_7b):
    """128 texts of 512 + 512 tokens on 8 H100s: 16 per GPU in two micro-batches, four optimizer steps.

    FLOPs per forward of policy and reference: 2 x 6.4763e9 x 16,384, in attention 2 x 131,072 x 1,024^2 x 16, in the
    head 2 x 131.07e6 x 8,192, in all 2.1876e14; of critic and reward model 2.1661e14.
    """
    paths = {"policy_model_path": str(folder_7b), "critic_model_path": str(folder_7b)}
    sizes = {"num_rollouts": 128, "batch_size": 32, "maxlen_prompt": 1024, "maxlen_res": 512}
    flags = paths | sizes | {"dtype": "bf16", "zero_stage": 2}

    def found(
        card: str, gpus: int = 8, slots: int = 16, recomputed: float = 1.0, captured: bool = True, **changes
    ) -> dict:
        config = ppo_config(**flags | {"plan_gpu": card} | changes)
        policy, critic, rewards = models_of(config)
        assert policy.work.captured
        works = (replace(policy.work, captured=captured), critic.work, [model.work for model in rewards])
        return {phase.name: phase for phase in phases(config, gpus, *works, slots, recomputed)}

    h100 = found("h100")
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
    assert found("h100", slots=8)["new tokens"].seconds == pytest.approx(seconds["new tokens"] + again, rel=1e-3)
    eager = found("h100", captured=False)["new tokens"]
    assert (eager.seconds, eager.bound) == (pytest.approx(512 * 32 * 23 * 11e-6), "launches")
    update = found("h100", recomputed=0.0)["update"].seconds
    assert update == pytest.approx(seconds["update"] - 4.3537e14 / (0.56 * 989e12), rel=1e-3)

    alone, offloaded = (found("h100", gpus=1, offload_frozen=offload)["scoring"] for offload in (False, True))
    copied = 2 * 13.346e9 / (0.8 * 64e9)  # reference and reward model, once
    assert offloaded.seconds - alone.seconds == pytest.approx(copied, rel=1e-3)
    waiting = found("h100", offload_frozen=True)["scoring"].seconds
    assert waiting - h100["scoring"].seconds == pytest.approx(2 * copied / 8, rel=1e-3)  # a share in each micro-batch


def test_the_buffer_is_what_the_stages_hand_on():
    models, config, rollout = tiny_models(), ppo_config(), rollout_by_hand()
    scores = score(rollout, prompts_of(*PROMPTS), models, None, token_ids(), 1.0, config)
    experience = make_experience(rollout, scores, RunningMoments(), config)
    tensors = [x for batch in (rollout, scores, experience) for x in vars(batch).values()]
    per_token = [x for x in tensors if x.shape == rollout.sequences.shape]
    assert held(per_token) == TOKEN * rollout.sequences.numel()


def test_the_command_prints_a_verdict_and_starts_nothing(folder_7b, tmp_path, capsys):
    """7B on eight cards of 80 GiB: not as it is by default, but with checkpointing and offloaded frozen models."""
    out = tmp_path / "run"
    flags = ["--policy_model_path", folder_7b, "--critic_model_path", folder_7b, "--data_path", tmp_path / "none"]
    flags = [*map(str, flags), "--model_save_path", str(out), "--plan", "--plan_gpus", "8"]
    main([*flags, "--rollout_batch_size", "16"])
    printed = capsys.readouterr().out
    assert "GiB on each of 8 GPU(s), ZeRO-2, bf16, 16 slots, 0 of 32 layers of the policy recomputed" in printed
    assert "DOES NOT FIT" in printed and "--gradient_checkpoint True: " in printed
    assert "Seconds of a buffer on a100" in printed and "checkpoint" in printed.splitlines()[-1]
    main([*flags, "--rollout_batch_size", "16", "--gradient_checkpoint", "--offload_frozen"])
    assert "\nFITS: " in capsys.readouterr().out
    assert not out.exists()


def test_a_folder_without_a_config_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--policy_model_path", str(tmp_path), "--critic_model_path", "C", "--data_path", "D", "--plan"])
    assert stopped.value.code == 2
    assert f"--policy_model_path {tmp_path}: no model's config.json there" in capsys.readouterr().err
