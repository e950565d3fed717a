"""--grad_accum_dtype: in which dtype the gradients of micro-batches add up."""

import pytest

from tests.helpers.accumulation import add_up, config_for, error, gradient_of_first_step, policy
from utils.engine.engine import TrainEngine

ENGINES = [{"zero_stage": 2}, {"zero_stage": 3}, {"zero_stage": 2, "offload_optimizer": True}]


@pytest.mark.parametrize("flags", ENGINES)
def test_many_micro_batches_add_up_without_rounding_in_float32_alone(single_process, flags):
    errors = {}
    for dtype in ("bf16", "fp32"):
        config = config_for(grad_accum_dtype=dtype, **flags)
        engine = TrainEngine(policy(), config, "policy")
        add_up(engine)
        errors[dtype] = error(gradient_of_first_step(engine, config))
    assert errors["fp32"] < 1e-5
    assert errors["bf16"] > 0.005


@pytest.mark.parametrize("flags", ENGINES)
def test_dropped_gradients_leave_nothing_in_the_float32_sum(single_process, flags):
    config = config_for(grad_accum_dtype="fp32", **flags)
    engine = TrainEngine(policy(), config, "policy")
    add_up(engine)
    engine.drop_gradients()
    add_up(engine)
    assert error(gradient_of_first_step(engine, config)) < 1e-5
