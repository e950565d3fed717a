"""Memory of passes with recomputed layers: shapes predict it, and what is recomputed changes no gradient."""

import pytest
import torch
from transformers import AutoModel

from sft.model import AnswerModel
from tests.architectures.configs import tiny_config
from tests.helpers.parts import rollout_by_hand, tiny_policy
from tests.helpers.tiny import tiny_llama, tiny_llama_config
from utils.engine.engine import TrainEngine
from utils.flags.engine import EngineConfig
from utils.memory.activation_peak import ATTENTION, LiveBytes, peak_bytes
from utils.memory.recompute import (
    choose_checkpointing,
    layers_kept,
    on_meta,
    predicted,
    recompute_fewest,
    training_peak,
)
from utils.models.chunked_logprobs import CHUNK, logits_bytes
from utils.models.compile import layers_of
from utils.models.load import enable_checkpointing, training_mode


@pytest.mark.parametrize(("backward", "checkpointing"), [(False, False), (True, False), (True, True)])
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


@pytest.mark.parametrize("joined", [True, False])
def test_gradients_are_the_same_whatever_is_recomputed(joined):
    rollout, results = rollout_by_hand(), []
    for kept in (None, 0, 3, 4):
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


def test_models_whose_passes_cannot_be_predicted_or_recomputed_keep_going():
    said, eager = [], AutoModel.from_config(tiny_llama_config(100), attn_implementation="eager")
    assert predicted(lambda: layers_kept(on_meta(eager), 256, 10**12), 0, said.append) == 0
    recompute_fewest(AutoModel.from_config(tiny_config("ctrl")), 0, "model", said.append)
    assert said == [
        "cannot predict the memory of this model's passes (ValueError: eager attention)",
        "--gradient_checkpoint auto: the model recomputes 0 of 1 layers",
    ]


@pytest.mark.parametrize("zero_stage", [0, 3])
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
    choose_checkpointing(engine, lm, config, 512, beside + two_kept, said.append)
    assert said == ["--gradient_checkpoint auto: the model recomputes 2 of 4 layers"]
    assert [layer.gradient_checkpointing for layer in layers_of(lm)] == [True, True, False, False]
    assert norm() == plain
    choose_checkpointing(engine, lm, config, 512, beside + two_kept - 1, said.append)
    assert said[1:] == ["--gradient_checkpoint auto: the model recomputes 3 of 4 layers"]
