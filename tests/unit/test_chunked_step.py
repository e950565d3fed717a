"""The optimizer step in chunks is DeepSpeed's own, bit for bit, and its norm that of float64."""

import pytest
import torch

import utils.engine.chunked_adamw as chunked
from tests.helpers.parts import ppo_config, tiny_scalar_model
from utils.engine.engine import TrainEngine

CHUNK = chunked.NORM_CHUNK
SHAPES = [(20 * CHUNK + 5,), (), (7, 11), (0,), (2, CHUNK), (1,), (40,)]  # over chunks, within one, and nothing


def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
    """Of very different sizes, as the layers of a model have them."""
    generator = torch.Generator().manual_seed(0)
    scales = [1.0, 3.0, 0.1, 1.0, 1e-3, 20.0, 1e-2]
    return [(s * torch.randn(x, generator=generator)).to(dtype) for s, x in zip(scales, SHAPES, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("left_out", [[], [0, 4], [0, 1, 2, 4, 5, 6]])  # the first decides, small ones do, no element
def test_the_norm_is_float64s(dtype, left_out):
    tensors = [x for i, x in enumerate(gradients(dtype)) if i not in left_out]
    expected = torch.cat([x.double().flatten() for x in tensors]).square().sum().sqrt()
    norm = chunked.gradient_norm(tensors)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(expected), rel=1e-5)


def test_the_norm_of_a_share_that_is_padding():
    assert float(chunked.gradient_norm([torch.zeros(9, dtype=torch.bfloat16)])) == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bad_element_is_passed_over(dtype, value):
    """The squares of 1e30 are beyond float32: infinity, which is refused, and never a number that looks sound."""
    for tensor, place in ((0, 0), (0, 20 * CHUNK + 4), (4, CHUNK + 1), (6, 39)):
        tensors = gradients(dtype)
        tensors[tensor].view(-1)[place] = value
        assert not chunked.gradient_norm(tensors).isfinite()


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e6])
@pytest.mark.parametrize(("zero_stage", "dtype"), [(1, "bf16"), (2, "bf16"), (2, "fp32")])
def test_given_the_same_norm_it_is_deepspeeds_step_bit_for_bit(single_process, monkeypatch, zero_stage, dtype, clip):
    """Clipped at every step, with clipping off, and never. Chunks of whole vectors: a rest of one rounds otherwise."""
    monkeypatch.setattr(chunked, "CPU_CHUNK", 64)
    state = {}
    for name in ("ours", "DeepSpeed's"):
        module = tiny_scalar_model().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
        config = ppo_config(zero_stage=zero_stage, dtype=dtype, gradient_clip=clip)
        engine = TrainEngine(module, config, "critic")
        del engine.engine.optimizer.get_grad_norm_direct  # its own norm
        if name != "ours":
            del engine.engine.optimizer.step
        norms = []
        for step in range(3):
            ids = torch.arange(3 + step, 21 + step).view(2, 9)
            engine.backward(engine(ids, torch.ones_like(ids)).square().sum())
            norms.append(engine.step(1e-3))
        assert min(norms) > 0.05
        tensors = {x: y.clone() for x, y in engine.state_tensors().items()} | engine.full_state_dict()
        state[name] = tensors | {"norms": torch.tensor(norms)}
    assert state["ours"].keys() == state["DeepSpeed's"].keys()
    for name, tensor in state["ours"].items():
        assert torch.equal(tensor, state["DeepSpeed's"][name]), name
