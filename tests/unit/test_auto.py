"""Flags that are auto: their parsing, their use of memory, and that the sizes they choose change no number."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel

from ppo.config import PPOConfig
from ppo.decoding.kv_cache import AUTO_SLOTS, slots_in
from ppo.planning.plan import Sizes, apply_sizes, choose_sizes, fit_to_memory, plan, prefill_peak
from ppo.planning.shapes import LOGIT, models_of
from ppo.rollout import decoding_options
from sft.model import AnswerModel
from tests.architectures.configs import tiny_config
from tests.helpers.parts import ppo_config, rollout_by_hand, tiny_models, tiny_policy
from tests.helpers.tiny import tiny_llama, tiny_llama_config
from utils.engine.engine import TrainEngine
from utils.errors import UserError
from utils.flags.engine import EngineConfig
from utils.flags.parser import parse_args
from utils.memory.activation_peak import ATTENTION, LiveBytes
from utils.memory.recompute import (
    layers_kept,
    on_meta,
    predicted,
    recompute_fewest,
    settle_checkpointing,
    training_peak,
)
from utils.models.chunked_logprobs import CHUNK, logits_bytes
from utils.models.compile import layers_of
from utils.models.load import enable_checkpointing, training_mode

LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048,
}  # fmt: skip


def parsed(*words: str) -> PPOConfig:
    return parse_args(PPOConfig, ["--policy_model_path", "P", "--critic_model_path", "C", "--data_path", "D", *words])


@pytest.fixture
def paths_7b(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_7B))
    return {"policy_model_path": str(tmp_path), "critic_model_path": str(tmp_path), "dtype": "bf16", "zero_stage": 2}


def test_auto_is_a_word_beside_numbers_and_switches():
    assert parsed().rollout_batch_size == "auto" and parsed().gradient_checkpoint is False
    assert parsed("--rollout_batch_size", "16").rollout_batch_size == 16
    assert parsed("--gradient_checkpoint").gradient_checkpoint is True
    assert parsed("--gradient_checkpoint", "no").gradient_checkpoint is False
    assert parsed("--gradient_checkpoint", "auto", "--rollout_batch_size", "auto").gradient_checkpoint == "auto"
    with pytest.raises(UserError, match=r"--rollout_batch_size.*invalid auto or int value: 'many'"):
        parsed("--rollout_batch_size", "many")
    with pytest.raises(UserError, match="--rollout_batch_size 0"):
        parsed("--rollout_batch_size", "0")
    with pytest.raises(UserError, match="maybe is neither true nor false"):
        parsed("--gradient_checkpoint", "maybe")


def test_as_many_slots_as_fit():
    for room, slots in ((0, 1), (-5, 1), (99, 1), (399, 3), (799, 4), (899, 8), (3999, 36), (10**6, 60)):
        assert slots_in(room, 100, prompts=60) == slots


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
    peak = training_peak(models_of(config)[0]["policy"].decoder, 16384, 3)
    rows = {"in the backward pass": [0, 0, 9, 0]}
    kept = [choose_sizes(config, 8, rows, peak + more).kept for more in (9, 8)]
    assert kept == [{"policy": layers, "critic": layers} for layers in (3, 2)]
    larger = plan(replace(config, plan_gpu_memory=30), 8).sizes
    assert larger.slots > chosen.slots and larger.kept["policy"] > chosen.kept["policy"]


@pytest.mark.parametrize("joined", [True, False])
def test_gradients_are_the_same_whatever_is_recomputed(joined):
    rollout, results = rollout_by_hand(), []
    for kept in (None, 0, 1, 3, 4):
        policy = tiny_policy(num_hidden_layers=4)
        policy.lm.config._attn_implementation = "sdpa" if joined else "eager"
        assert policy.joins_rows == joined
        if kept is not None:
            enable_checkpointing(policy.lm, kept)
        training_mode(policy)
        flags = [layer.gradient_checkpointing and layer.training for layer in layers_of(policy.lm)]
        assert flags == [kept is not None and i < 4 - kept for i in range(4)]
        logprobs, _ = policy(rollout.sequences, rollout.response_mask)
        logprobs.square().sum().backward()
        results.append([logprobs.detach(), *(p.grad for p in policy.parameters())])
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


def test_layers_are_kept_as_real_passes_allow():
    """Room for what a real pass takes in which 3 of 6 layers keep their activations, and a little more or less."""
    config = tiny_llama_config(1000, hidden_size=256, intermediate_size=700, num_hidden_layers=6)
    real = AutoModel.from_config(config, attn_implementation="sdpa").train()
    enable_checkpointing(real, kept=3)
    for parameter in real.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with LiveBytes() as counter:
        hidden = real(input_ids=torch.zeros(1, 256, dtype=torch.int64), use_cache=False).last_hidden_state
        hidden.backward(torch.ones_like(hidden))
    decoder = on_meta(real)
    assert decoder.config._attn_implementation == ATTENTION and real.config._attn_implementation == "sdpa"
    assert [layers_kept(decoder, 256, int(share * counter.peak)) for share in (0.95, 1.05)] == [2, 3]
    assert [layers_kept(decoder, 256, room) for room in (0, 10**12)] == [0, 6]
    real.config._attn_implementation, said = "eager", []
    assert predicted(lambda: layers_kept(on_meta(real), 256, 10**12), 0, said.append) == 0
    assert said == ["cannot predict the memory of this model's passes (ValueError: eager attention)"]
    ctrl = AutoModel.from_config(tiny_config("ctrl"))
    recompute_fewest(ctrl, 0, "model", said.append)
    assert said[1] == "--gradient_checkpoint auto: the model recomputes 0 of 1 layers"


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_supervised_stage_leaves_room_for_optimizer_and_gradients(single_process, zero_stage):
    lm = tiny_llama(1000, hidden_size=128, num_hidden_layers=4)
    numel = sum(p.numel() for p in lm.parameters())
    config = EngineConfig(dtype="fp32", zero_stage=zero_stage, gradient_checkpoint="auto")
    engine, said = TrainEngine(AnswerModel(lm), config, "model"), []
    ids = torch.arange(3, 35).view(2, 16)

    def norm() -> float:
        engine.module.train()
        engine.backward(engine(ids, ids % 16 > 5))
        found = engine.measure()
        engine.apply(0.0)
        return found

    plain = norm()
    # Adam's moments; gradients, or under ZeRO-3, which has room for them, the weights that it gathers; logits.
    beside = 8 * numel + 4 * numel + logits_bytes(CHUNK * 1000, 4)[1]
    two_kept = training_peak(on_meta(lm), 512, 2)
    settle_checkpointing(engine, lm, config, 512, beside + two_kept, said.append)
    assert said == ["--gradient_checkpoint auto: the model recomputes 2 of 4 layers"]
    assert [layer.gradient_checkpointing for layer in layers_of(lm)] == [True, True, False, False]
    assert norm() == plain
    settle_checkpointing(engine, lm, config, 512, beside + two_kept - 1, said.append)
    assert said[1:] == ["--gradient_checkpoint auto: the model recomputes 3 of 4 layers"]


def test_sizes_reach_the_models_and_are_said():
    models, said = tiny_models(), []
    config = ppo_config(rollout_batch_size="auto", gradient_checkpoint="auto")
    assert decoding_options(config, models.policy.module).max_slots == AUTO_SLOTS
    fit_to_memory(config, models, said.append)  # on a CPU
    assert not said and models.policy.module.slots == AUTO_SLOTS
    apply_sizes(config, models, Sizes(24, {"policy": 1, "critic": 2}), said.append)
    assert models.policy.module.slots == 24
    assert said == [
        "--rollout_batch_size auto: 24 sequences are decoded at once on each GPU",
        "--gradient_checkpoint auto: the policy recomputes 1 of 2 layers",
        "--gradient_checkpoint auto: the critic recomputes 0 of 2 layers",
    ]
