"""The gap between another engine's samples and the policy: metrics and weights by hand, the loss, and the hard stop."""

import math
from dataclasses import replace

import pytest
import torch

from data.prompts import Prompt
from ppo.decoding.sampling import Sampling
from ppo.evaluate import evaluate
from ppo.experience import experience_metrics, make_experience, rollout_metrics
from ppo.rollout import PolicySampler
from ppo.sampler_gap import gap_metrics, importance_weights, sampler_problem
from ppo.score import score
from ppo.types import MeasuredRollout, Rollout, SampledRollout, Scores
from ppo.update import critic_backward, policy_backward, policy_objective, update
from tests.helpers.parts import (
    PROMPTS,
    ppo_config,
    prompts_of,
    rollout_by_hand,
    rollout_of,
    scored,
    scores_of,
    tiny_models,
    tiny_policy,
    token_ids,
)
from utils.engine.engine import InferenceEngine
from utils.errors import UserError
from utils.moments import RunningMoments
from utils.sums import means

NAN, INF = math.nan, math.inf
MASK = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1]]).bool()
RATIOS = [[1.0, 4.0], [0.25, 1.5, 1.0]]  # policy / sampler of the five response tokens
OLD = [[9.0, -1.0, -2.0, NAN], [9.0, -3.0, -1.0, -0.5]]


def logprobs(ratios: list[list[float]] = RATIOS) -> tuple[torch.Tensor, torch.Tensor]:
    """(sampler's, policy's) log-probabilities of tokens with these ratios; numbers that must not count elsewhere."""
    old, sampler = torch.tensor(OLD), torch.full((2, 4), INF)
    sampler[MASK] = old[MASK] - torch.tensor([r for row in ratios for r in row]).log()
    return sampler, old


def sampled(rollout: Rollout, sampler_logprobs: torch.Tensor) -> SampledRollout:
    return SampledRollout(**{name: getattr(rollout, name) for name in vars(rollout)}, sampler_logprobs=sampler_logprobs)


def test_gap_by_hand():
    metrics = {name: float(x) for name, x in gap_metrics(*logprobs(), MASK).items()}
    # k3 of a ratio r is r - 1 - ln r; over 4, 0.25 and 1.5 the logarithms leave ln 1.5.
    expected = ((4 - 1) + (0.25 - 1) + (1.5 - 1) - math.log(1.5)) / 5
    gaps = [math.log(4), math.log(4), math.log(1.5)]
    assert metrics == pytest.approx(
        {"sampler_kl": expected, "sampler_gap_mean": sum(gaps) / 5, "sampler_gap_max": math.log(4)}
    )
    nothing = gap_metrics(*logprobs(), torch.zeros_like(MASK))
    assert [float(x) for x in nothing.values()] == [0.0, 0.0, 0.0]


def test_gap_estimates_the_kl_of_the_sampler_to_the_policy():
    """The mean of k3 over samples drawn from p is KL(p ‖ q), not KL(q ‖ p), which is 0.51."""
    p, q = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    tokens = torch.multinomial(p, 100_000, True, generator=torch.Generator().manual_seed(0))[None]
    found = gap_metrics(p.log()[tokens], q.log()[tokens], torch.ones_like(tokens).bool())
    exact = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert float(found["sampler_kl"]) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "cap", "expected"),
    [
        ("truncate", 2.0, [[0, 1, 2, 0], [0, 0.25, 1.5, 1]]),
        ("truncate", 1.25, [[0, 1, 1.25, 0], [0, 0.25, 1.25, 1]]),
        ("mask_token", 2.0, [[0, 1, 0, 0], [0, 0, 1.5, 1]]),
        ("mask_token", 5.0, [[0, 1, 4, 0], [0, 0.25, 1.5, 1]]),
        # Geometric means: (1 · 4)^½ = 2 and (0.25 · 1.5 · 1)^⅓ = 0.72 = 1 / 1.39
        ("mask_sequence", 1.9, [[0, 0, 0, 0], [0, 1, 1, 1]]),
        ("mask_sequence", 1.3, [[0, 0, 0, 0], [0, 0, 0, 0]]),
        ("mask_sequence", 2.1, [[0, 1, 1, 0], [0, 1, 1, 1]]),
    ],
)
def test_weights_by_hand(kind, cap, expected):
    weights = importance_weights(*logprobs(), MASK, kind, cap)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))


def test_truncation_bounds_a_ratio_that_overflows():
    sampler, old = logprobs([[1.0, 1.0], [1.0, 1.0, 1.0]])
    sampler[0, 1] = -200.0
    weights = importance_weights(sampler, old, MASK, "truncate", 2.0)
    assert weights[0].tolist() == [0.0, 2.0, 1.0, 0.0]


def buffer() -> tuple[SampledRollout, Scores]:
    rollout = rollout_of(MASK.long().tolist())
    return sampled(rollout, logprobs()[0]), scores_of(rollout, [2.0, -1.0], torch.tensor(OLD))


def test_metrics_of_the_gap_and_of_the_weights():
    rollout, scores = buffer()
    assert rollout_metrics(rollout, scores)["sampler_gap_max"] == pytest.approx(math.log(4))
    assert "sampler_kl" not in rollout_metrics(rollout_of(MASK.long().tolist()), scores)
    expected = {
        "none": None, "truncate": (1 + 2 + 0.25 + 1.5 + 1, 1), "mask_token": (1 + 1.5 + 1, 2), "mask_sequence": (0, 5)
    }  # fmt: skip
    for kind, sums in expected.items():
        config = ppo_config(rollout_engine="vllm", sampler_correction=kind)
        metrics = experience_metrics(make_experience(rollout, scores, RunningMoments(), config), config)
        found = [metrics.get(name) for name in ("sampler_weight_mean", "sampler_truncated_fraction")]
        assert found == ([None, None] if sums is None else pytest.approx([x / 5 for x in sums]))


def test_weighted_surrogate_is_the_weight_times_the_surrogate():
    """Token by token, on all sides of both clips, with advantages of both signs."""
    ratios = torch.tensor([0.5, 0.9, 1.1, 1.5]).repeat(2)
    advantages = torch.tensor([1.5] * 4 + [-0.5] * 4)
    weights = torch.tensor([0.0, 0.3, 1.0, 2.0, 2.0, 1.0, 0.3, 0.0])
    zeros, mask = torch.zeros(8, 1), torch.ones(8, 1).bool()
    old = torch.full((8, 1), -1.0)
    experience, config = scored(rollout_by_hand(), tiny_models())
    part = replace(
        experience, sequences=zeros.long(), attention_mask=mask, response_mask=mask, old_logprobs=old,
        ref_logprobs=old - 1.0, advantages=advantages[:, None],
    )  # fmt: skip
    found = []
    for given in (None, weights[:, None]):
        new = (old + ratios.log()[:, None]).requires_grad_()
        loss, sums = policy_objective(replace(part, weights=given), new, None, config, 8.0)
        loss.backward()
        found.append((new.grad[:, 0] * 8.0, means(sums)))
    (plain, metrics), (weighted, weighted_metrics) = found
    torch.testing.assert_close(weighted, weights * plain)
    surrogates = torch.minimum(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages)
    assert metrics["policy_loss"] == pytest.approx(float(-surrogates.mean()))
    assert weighted_metrics["policy_loss"] == pytest.approx(float(-(weights * surrogates).mean()))
    # Clipped: 1.5 with A > 0 and 0.5 with A < 0, both of weight 2.
    assert metrics["clip_fraction"] == weighted_metrics["clip_fraction"] == 0.25


def test_weights_leave_kl_penalty_entropy_bonus_and_critic_alone():
    flags = {"kl_in": "loss", "kl_estimator": "k2", "kl_penalty_weight": 0.5, "use_entropy_loss": True}
    models = tiny_models()
    experience, config = scored(rollout_by_hand(), models, **flags, entropy_loss_weight=0.1)
    masked = replace(experience, weights=torch.zeros_like(experience.advantages))
    without = replace(experience, advantages=torch.zeros_like(experience.advantages))
    gradients = []
    for batch in (masked, without):
        policy_backward(models.policy, batch, config, None)
        critic_backward(models.critic, batch, config)
        gradients.append((models.policy.gradients(), models.critic.gradients()))
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected) and expected.abs().max() > 1e-4


def test_a_minibatch_without_any_weight_changes_nothing_of_the_policy():
    models = tiny_models()
    experience, config = scored(rollout_by_hand(), models)
    before = models.policy.module.state_dict()
    before = {name: x.clone() for name, x in before.items()}
    masked = replace(experience, weights=torch.zeros_like(experience.advantages))
    metrics = update(models.policy, models.critic, masked, config, 0, 1e-3, 1e-3)
    assert metrics["policy_loss"] == metrics["grad_norm_policy"] == metrics["clip_fraction"] == 0.0
    assert all(torch.equal(x, before[name]) for name, x in models.policy.module.state_dict().items())
    assert all(math.isfinite(x) for x in metrics.values()) and metrics["value_loss"] > 0


class OtherEngine:
    """A sampler with a policy of its own, whose weights may be older; explain() names what differs."""

    def __init__(self, module):
        self.module, self.asked = module, 0
        self.sampler = PolicySampler(InferenceEngine(module), token_ids(), ppo_config(), measure=True)

    def __call__(self, prompts, sampling, seed):
        rollout = self.sampler(prompts, Sampling(sampling.temperature), seed)
        assert isinstance(rollout, MeasuredRollout)
        columns = {name: x for name, x in vars(rollout).items() if name not in ("old_logprobs", "entropy")}
        return SampledRollout(**columns, sampler_logprobs=rollout.old_logprobs)

    def explain(self):
        self.asked += 1
        theirs, ours = self.module.state_dict(), tiny_policy().state_dict()
        stale = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        return f"the first tensor that differs is {stale[0]}" if stale else None


@pytest.mark.parametrize("stale", [None, "lm.model.layers.1.mlp.up_proj.weight", "lm.lm_head.weight"])
def test_trap_20_a_sampler_with_other_weights_than_the_policy_is_stopped(stale):
    models, prompts, config = tiny_models(), prompts_of(*PROMPTS), ppo_config()
    other = OtherEngine(tiny_policy())
    if stale:
        weight = other.module.state_dict()[stale]
        weight += 3.0 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    rollout = other(prompts, Sampling(), 0)
    scores = score(rollout, prompts, models, None, token_ids(), 1.0, config)
    problem = sampler_problem(rollout, scores, other, config, 1.0)
    assert bool(problem) is bool(stale) and other.asked == bool(stale)
    if stale:
        assert f"the first tensor that differs is {stale}. " in problem
        assert "--sampler_kl_limit 5e-05" in problem and "--rollout_engine own" in problem
        assert sampler_problem(rollout, scores, other, ppo_config(sampler_kl_limit=10.0), 1.0) is None


@pytest.mark.parametrize("bad", [-INF, NAN])
@pytest.mark.parametrize("side", ["sampler", "policy"])
def test_a_logprob_that_is_not_finite_is_no_weight(bad, side):
    rollout, scores = buffer()
    rollout.sampler_logprobs[MASK] = scores.old_logprobs[MASK]
    sampler, config = OtherEngine(tiny_policy()), ppo_config()
    assert sampler_problem(rollout, scores, sampler, config, 1.0) is None
    (rollout.sampler_logprobs if side == "sampler" else scores.old_logprobs)[1, 2] = bad
    problem = sampler_problem(rollout, scores, sampler, ppo_config(sampler_kl_limit=1e30), 1.0)
    assert "sampler_kl is nan nats" in problem or "sampler_kl is inf nats" in problem
    assert "all weights were equal" in problem


@pytest.mark.parametrize(
    ("flags", "temperature", "limit"),
    [
        ({}, 1.0, 5e-5),
        ({}, 2.0, 5e-5),
        ({"dtype": "bf16", "zero_stage": 1}, 0.5, 0.04),
        ({"sampler_kl_limit": 0.5}, 0.5, 0.5),
    ],
)
def test_limit_by_dtype_and_temperature(flags, temperature, limit):
    rollout, scores = buffer()
    for factor in (0.99, 1.01):  # k3 of a small gap x is x² / 2
        gap = math.sqrt(2 * factor * limit)
        rollout.sampler_logprobs[MASK] = scores.old_logprobs[MASK] + gap
        exact = math.expm1(-gap) + gap
        problem = sampler_problem(rollout, scores, OtherEngine(tiny_policy()), ppo_config(**flags), temperature)
        assert bool(problem) is (exact > limit)


def test_own_rollouts_are_not_checked():
    assert sampler_problem(rollout_of([[0, 1]]), None, None, ppo_config(), 1.0) is None


def test_evaluation_stops_too():
    models, config = tiny_models(), ppo_config()
    prompts = [Prompt(ids, [{"role": "user", "content": "x"}], "") for ids in PROMPTS]
    other = OtherEngine(tiny_policy())
    other.module.lm.lm_head.weight.data.mul_(1.1)
    with pytest.raises(UserError, match=r"^evaluation: vLLM samples from another distribution .* lm.lm_head.weight"):
        evaluate(prompts, other, models, None, token_ids(), config)
