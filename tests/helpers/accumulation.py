"""The gradient that an engine with bf16 weights sums over many micro-batches, and the exact sum of their gradients."""

import torch
from safetensors.torch import save_file

from ppo.config import PPOConfig
from ppo.models import PolicyModel
from tests.helpers.parts import ppo_config, tiny_policy
from utils.distributed import rank, world_size
from utils.engine.engine import TrainEngine, init_distributed, shutdown_distributed

MICRO_BATCHES, KINDS = 40, 4


def config_for(zero_stage: int, grad_accum_dtype: str, **changes) -> PPOConfig:
    """Flags of an engine that does not clip."""
    flags = {"dtype": "bf16", "gradient_clip": 0.0} | changes
    return ppo_config(zero_stage=zero_stage, grad_accum_dtype=grad_accum_dtype, **flags)


def policy() -> PolicyModel:
    """Weights in bf16, one layer."""
    return tiny_policy(seed=3, num_hidden_layers=1).bfloat16()


def loss_of(model, kind: int) -> torch.Tensor:
    """Of one of KINDS micro-batches; they come again and again, so their gradients add up rather than cancel."""
    ids = torch.randint(3, 24, (2, 8), generator=torch.Generator().manual_seed(kind))
    return -model(ids, torch.arange(8).expand(2, 8) > 3)[0].sum() / MICRO_BATCHES


def exact() -> dict[str, torch.Tensor]:
    """Parameter -> the sum, made in float64 of gradients in bf16."""
    model, total = policy(), {}
    for kind in range(KINDS):
        model.zero_grad()
        loss_of(model, kind).backward()
        for name, parameter in model.named_parameters():
            total[name] = total.get(name, 0) + parameter.grad.double() * (MICRO_BATCHES // KINDS)
    return total


def add_up(engine: TrainEngine) -> None:
    """This rank's share of the micro-batches, as many on every rank."""
    for i in range(rank(), MICRO_BATCHES, world_size()):
        engine.backward(loss_of(engine, i % KINDS))


def add_up_after_drops(engine: TrainEngine) -> None:
    """The same, after two sums that were dropped: one measured, one not."""
    add_up(engine)
    engine.measure()
    engine.drop_gradients()
    add_up(engine)
    engine.drop_gradients()
    add_up(engine)


def gradient_of_first_step(engine: TrainEngine, config: PPOConfig) -> dict[str, torch.Tensor]:
    """NAME/START -> this rank's stretch of the gradient: Adam's first moment is 1 - β1 times that after one step."""
    engine.measure()
    engine.apply(1e-3)
    found = {key.removeprefix("exp_avg/"): x for key, x in engine.state_tensors().items() if key.startswith("exp_avg/")}
    return {key: x / (1 - config.adam_beta1) for key, x in found.items()}


def error(stretches: dict[str, torch.Tensor]) -> float:
    """The norm of what these differ by from the exact gradient, over the norm of that."""
    expected, difference, covered = exact(), 0.0, 0
    for key, stretch in stretches.items():
        name, begin = key.rsplit("/", 1)
        wanted = expected[name].flatten()[int(begin) : int(begin) + len(stretch)]
        difference, covered = difference + float((stretch - wanted).square().sum()), covered + len(stretch)
    assert covered == sum(x.numel() for x in expected.values())
    return (difference / sum(float(x.square().sum()) for x in expected.values())) ** 0.5


def one_rank(folder: str, zero_stage: int, grad_accum_dtype: str) -> None:
    """What each process of a group does; its gradients go to FOLDER/RANK.safetensors."""
    init_distributed(60)
    config = config_for(zero_stage, grad_accum_dtype)
    engine = TrainEngine(policy(), config, "policy")
    add_up_after_drops(engine)
    found = gradient_of_first_step(engine, config)
    save_file({key: x.clone() for key, x in found.items()}, f"{folder}/{rank()}.safetensors")
    shutdown_distributed()
