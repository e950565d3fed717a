"""Bad numbers make no step, in any ZeRO stage, and the next batch counts again. And signs of collapse."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ppo.alarms import alarms
from ppo.experience import score_problem
from ppo.update import update
from tests.helpers.parts import ppo_config, rollout_by_hand, scored, tiny_models, tiny_policy, tiny_scalar_model
from utils.engine.engine import TrainEngine


def weights(engine: TrainEngine) -> torch.Tensor:
    return torch.cat([x.flatten() for x in engine.full_state_dict().values()])


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_bad_batch_is_as_if_it_had_not_been(single_process, zero_stage):
    """Loss of the policy, loss of the critic, and a gradient of either that explodes though the losses are finite."""
    experience, config = scored(rollout_by_hand(), tiny_models(), batch_size=4, zero_stage=zero_stage)
    limit = replace(config, explosion_limit=1e4)

    def engines() -> tuple[TrainEngine, TrainEngine]:
        critic = TrainEngine(tiny_scalar_model(seed=2), limit, "critic")
        return TrainEngine(tiny_policy(), limit, "policy"), critic

    def broken(name: str, value: float):
        column = getattr(experience, name).clone()
        column[experience.response_mask] = value
        return replace(experience, **{name: column})

    policy, critic = engines()
    told: list[str] = []
    bad = {"the loss of the policy is not finite": broken("advantages", math.nan)}
    bad["the loss of the critic is not finite"] = broken("returns", math.inf)
    bad["the loss of the critic is beyond --explosion_limit"] = broken("returns", 1e4)
    bad["the gradient of the policy is not finite, or beyond --explosion_limit"] = broken("advantages", 100.0)
    # The last: the policy's gradient, which is good, would be there in the next step.
    bad["the gradient of the critic is not finite, or beyond --explosion_limit"] = broken("returns", 100.0)
    before = weights(policy), weights(critic)
    for text, batch in bad.items():
        if text.startswith("the gradient"):
            {"critic": critic, "policy": policy}[text.split()[4]].explosion_limit = 10.0
        update(policy, critic, batch, limit, 0, 1e-3, 1e-3, on_bad=lambda problem, _: told.append(problem))
        assert told[-1].startswith(text)
        policy.explosion_limit = critic.explosion_limit = 1e4
        assert torch.equal(weights(policy), before[0])
        assert torch.equal(weights(critic), before[1])
    assert len(told) == len(bad)
    others = engines()
    for pair in ((policy, critic), others):
        update(*pair, experience, limit, 0, 1e-3, 1e-3)
    assert torch.equal(weights(policy), weights(others[0])) and not torch.equal(weights(policy), before[0])
    assert torch.equal(weights(critic), weights(others[1])) and not torch.equal(weights(critic), before[1])


def test_scores_beyond_the_limit_are_named_with_their_rank(monkeypatch):
    monkeypatch.setattr("utils.distributed.gather_objects", lambda own: [own, True])
    fine, bad = torch.tensor([0.0, 1.0]), torch.tensor([-6.0, 2.0])
    assert score_problem(torch.tensor([0.0, 1.0, -2.0, 3.0]), 5.0, fine) is None
    assert score_problem(torch.tensor([0.0, 1.0, math.nan, 3.0]), 5.0, fine).startswith(
        "the score of response 2 of this step is not finite (rank 1); look"
    )
    assert "response 0 of this step is -6, beyond --explosion_limit (rank 0, 1)" in score_problem(
        torch.tensor([-6.0, 1.0, 2.0, 3.0]), 5.0, bad
    )


def test_alarms_by_threshold():
    metrics = {"kl_ref": 101.0, "perplexity": 1.01, "eos_fraction": 0.1, "response_length": 3.0, "score_std": 0.0}
    long, short = (ppo_config(maxlen_res=tokens, maxlen_prompt=tokens + 1) for tokens in (512, 24))
    assert alarms({**metrics, "kl_ref": 25.0, "perplexity": 2.0}, long) == []
    assert alarms({**metrics, "kl_ref": 25.0, "perplexity": 2.0}, short) == ["kl_ref 25 is past --alarm_kl 24"]
    assert alarms(metrics, long) == [
        "kl_ref 101 is past --alarm_kl 100",
        "perplexity 1.01 is past --alarm_perplexity 1.05",
    ]
    flags = {"alarm_kl": 0, "alarm_perplexity": 0, "alarm_eos": 0.2, "alarm_length": 4, "alarm_score_std": 1e-3}
    assert [text.split()[0] for text in alarms(metrics, ppo_config(**flags))] == [
        "eos_fraction", "response_length", "score_std",
    ]  # fmt: skip
    assert not alarms(metrics, ppo_config(alarm_kl=0, alarm_perplexity=0))


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
        assert engine.step(1e-3) == pytest.approx(norm, rel=1e-5)
        adam.step()
        adam.zero_grad()
    end = nn.utils.parameters_to_vector(plain.parameters()).detach()
    assert (weights(engine) - end).norm() < 1e-4 * (end - start).norm()
