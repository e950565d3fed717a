"""Engine steps: AdamW on the summed gradients, none after a bad batch, DeepSpeed's bits in chunks, float32 sums."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import utils.engine.chunked_adamw as chunked
from ppo.update import update
from tests.helpers.accumulation import add_up, add_up_after_drops, config_for, error, gradient_of_first_step, policy
from tests.helpers.parts import ppo_config, rollout_by_hand, scored, tiny_models, tiny_policy, tiny_scalar_model
from utils.engine.engine import TrainEngine
from utils.errors import UserError

CHUNK = chunked.NORM_CHUNK
SHAPES = [(20 * CHUNK + 5,), (), (7, 11), (0,), (2, CHUNK), (1,), (40,)]  # over chunks, within one, and nothing
SCALES = [1.0, 3.0, 0.1, 1.0, 1e-3, 20.0, 1e-2]  # as different as the gradients of layers
STAGES = [{"zero_stage": 2}, {"zero_stage": 3}, {"zero_stage": 2, "offload_optimizer": True}]
STAGE_3_OFFLOADED = {"zero_stage": 3, "offload_optimizer": True}


def weights(engine: TrainEngine) -> torch.Tensor:
    return torch.cat([x.flatten() for x in engine.full_state_dict().values()])


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_trap_14_both_step_or_neither_and_a_bad_batch_leaves_no_trace(single_process, zero_stage):
    """Loss of the policy, loss of the critic, and a gradient of either that explodes though the losses are finite."""
    experience, config = scored(rollout_by_hand(), tiny_models(), batch_size=4, zero_stage=zero_stage)
    limit = replace(config, explosion_limit=1e4)

    def engines() -> dict[str, TrainEngine]:
        models = {"policy": tiny_policy(), "critic": tiny_scalar_model(seed=2)}
        return {name: TrainEngine(model, limit, name) for name, model in models.items()}

    def step(pair: dict[str, TrainEngine], batch, **options) -> None:
        update(*pair.values(), batch, limit, 0, 1e-3, 1e-3, **options)

    def broken(name: str, value: float):
        column = getattr(experience, name).clone()
        column[experience.response_mask] = value
        return replace(experience, **{name: column})

    ours, others, told = engines(), engines(), []
    bad = {
        "the loss of the policy is not finite": broken("advantages", math.nan),
        "the loss of the critic is not finite": broken("returns", math.inf),
        "the loss of the critic is beyond --explosion_limit": broken("returns", 1e4),
        "the gradient of the policy is not finite, or beyond --explosion_limit": broken("advantages", 100.0),
        # The last: the policy's gradient, which is good, must not be there in the next step.
        "the gradient of the critic is not finite, or beyond --explosion_limit": broken("returns", 100.0),
    }
    before = {name: weights(engine) for name, engine in ours.items()}
    for text, batch in bad.items():
        if text.startswith("the gradient"):
            ours[text.split()[4]].explosion_limit = 10.0
        step(ours, batch, on_bad=lambda problem, _: told.append(problem))
        assert told[-1].startswith(text)
        for name, engine in ours.items():
            engine.explosion_limit = 1e4
            assert torch.equal(weights(engine), before[name])
    assert len(told) == len(bad)
    with pytest.raises(UserError, match=r"policy is not finite .* no weights were changed"):
        step(ours, next(iter(bad.values())))
    step(ours, experience)
    step(others, experience)
    for name, engine in ours.items():
        assert torch.equal(weights(engine), weights(others[name])) and not torch.equal(weights(engine), before[name])


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_step_is_adamw_on_the_sum_of_the_micro_batches(single_process, zero_stage):
    config = ppo_config(zero_stage=zero_stage, gradient_clip=0.05)
    engine, plain = TrainEngine(tiny_scalar_model(), config, "critic"), tiny_scalar_model()
    betas = (config.adam_beta1, config.adam_beta2)
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=betas, eps=config.adam_eps, weight_decay=0.0)
    generator, start = torch.Generator().manual_seed(0), nn.utils.parameters_to_vector(plain.parameters()).detach()
    for _ in range(3):
        for length in (9, 4, 6):
            ids = torch.randint(24, (2, length), generator=generator)
            engine.backward(engine(ids, torch.ones_like(ids)).square().sum())
            plain(ids, torch.ones_like(ids)).square().sum().backward()
        norm = float(nn.utils.clip_grad_norm_(plain.parameters(), config.gradient_clip))
        assert norm > config.gradient_clip
        assert engine.measure() == pytest.approx(norm, rel=1e-5)
        engine.apply(1e-3)
        adam.step()
        adam.zero_grad()
    end = nn.utils.parameters_to_vector(plain.parameters()).detach()
    assert (weights(engine) - end).norm() < 1e-4 * (end - start).norm()


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(s * torch.randn(x, generator=generator)).to(dtype) for s, x in zip(SCALES, SHAPES, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_float64s_and_passes_over_no_bad_element(dtype):
    for left_out in ([], [0, 4], [0, 1, 2, 4, 5, 6]):  # the first decides, small ones decide, no element
        tensors = [x for i, x in enumerate(gradients(dtype)) if i not in left_out]
        norm, expected = chunked.gradient_norm(tensors), torch.cat([x.double().flatten() for x in tensors]).norm()
        assert norm.dtype == torch.float32
        assert float(norm) == pytest.approx(float(expected), rel=1e-5)
    assert float(chunked.gradient_norm([torch.zeros(9, dtype=dtype)])) == 0  # a share that is padding
    for value in (torch.nan, -torch.inf, 1e30):  # the square of 1e30 is beyond float32: infinity, which is refused
        for tensor, place in ((0, 0), (0, 20 * CHUNK + 4), (4, CHUNK + 1), (6, 39)):
            tensors = gradients(dtype)
            tensors[tensor].view(-1)[place] = value
            assert not chunked.gradient_norm(tensors).isfinite()


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize(("zero_stage", "dtype"), [(1, "bf16"), (2, "fp32")])
def test_given_the_same_norm_it_is_deepspeeds_step_bit_for_bit(single_process, monkeypatch, zero_stage, dtype, clip):
    """With clipping off, and clipped at every step. Chunks of whole vectors: a rest of one rounds otherwise."""
    monkeypatch.setattr(chunked, "CPU_CHUNK", 64)
    state = {}
    for name in ("ours", "DeepSpeed's"):
        module = tiny_scalar_model().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
        engine = TrainEngine(module, ppo_config(zero_stage=zero_stage, dtype=dtype, gradient_clip=clip), "critic")
        del engine.engine.optimizer.get_grad_norm_direct  # its own norm
        if name != "ours":
            del engine.engine.optimizer.step
        norms = []
        for step in range(3):
            ids = torch.arange(3 + step, 21 + step).view(2, 9)
            engine.backward(engine(ids, torch.ones_like(ids)).square().sum())
            norms.append(engine.measure())
            engine.apply(1e-3)
        assert min(norms) > 0.05
        tensors = {x: y.clone() for x, y in engine.state_tensors().items()} | engine.full_state_dict()
        state[name] = tensors | {"norms": torch.tensor(norms)}
    assert state["ours"].keys() == state["DeepSpeed's"].keys()
    for name, tensor in state["ours"].items():
        assert torch.equal(tensor, state["DeepSpeed's"][name]), name


@pytest.mark.parametrize("flags", STAGES)
def test_many_micro_batches_add_up_without_rounding_in_float32_alone(single_process, flags):
    errors = {}
    for dtype in ("bf16", "fp32"):
        config = config_for(grad_accum_dtype=dtype, **flags)
        engine = TrainEngine(policy(), config, "policy")
        add_up(engine)
        errors[dtype] = error(gradient_of_first_step(engine, config))
    assert errors["fp32"] < 1e-5
    assert errors["bf16"] > 0.005


@pytest.mark.parametrize(
    ("flags", "dtype"), [*((flags, "fp32") for flags in STAGES), (STAGES[2], "bf16"), (STAGE_3_OFFLOADED, "bf16")]
)
def test_dropped_gradients_leave_nothing_behind(single_process, flags, dtype):
    config = config_for(grad_accum_dtype=dtype, **flags)
    engine = TrainEngine(policy(), config, "policy")
    add_up_after_drops(engine)
    assert error(gradient_of_first_step(engine, config)) < {"bf16": 0.1, "fp32": 1e-5}[dtype]
