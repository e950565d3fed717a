"""Answers to which --reward_fn gives no score: the step is that of a buffer which never held them."""

from dataclasses import replace

import pytest
import torch

from ppo.experience import experience_metrics, make_experience, rollout_metrics
from ppo.rollout import assemble
from ppo.score import score
from ppo.types import Rollout, Scores
from ppo.update import update
from tests.helpers.parts import EOS, PAD, PROMPTS, RESPONSES, ppo_config, prompts_of, tiny_models, token_ids
from utils.errors import UserError
from utils.moments import RunningMoments

PLACES = [0, 1, 2]  # of the answers that have a score
FLAGS = {"use_reward_clip": False, "missing_eos_penalty": 0.5, "use_entropy_loss": True, "entropy_loss_weight": 0.01}


def whole(config) -> tuple[Rollout, Scores]:
    """Four answers, of which a function fails on the last, the longest; its score of 9 is one that no sum may take."""
    rollout, scores = buffer([0, 1, 2, 3], config)
    failed = torch.tensor([False, False, False, True])
    parts = torch.tensor([[0.5, torch.nan], [1.0, 2.0], [3.0, 4.0], [torch.nan, 7.0]])
    return rollout, replace(scores, failed=failed, parts=parts, part_names=("reward_a", "reward_b"))


def buffer(places: list[int], config) -> tuple[Rollout, Scores]:
    """The answers at these places, as if there were no others."""
    responses = [torch.tensor(RESPONSES[i], dtype=torch.int64) for i in places]
    rollout = assemble([PROMPTS[i] for i in places], responses, EOS, PAD)
    prompts = prompts_of(*(PROMPTS[i] for i in places))
    scores = score(rollout, prompts, tiny_models(), None, token_ids(), config.temperature, config)
    numbers = torch.tensor([0.5, -1.0, 3.0, 9.0])[places]
    return rollout, replace(scores, scores=numbers)


def test_statistics_and_metrics_leave_them_out():
    config, moments = ppo_config(**FLAGS), (RunningMoments(), RunningMoments())
    (rollout, scores), (fewer, their) = whole(config), buffer(PLACES, config)
    found, expected = (make_experience(*pair, m, config) for pair, m in zip([whole(config), (fewer, their)], moments))
    assert moments[0].state_dict() == moments[1].state_dict() and moments[0].count == 3
    for name in ("rewards", "advantages", "returns", "old_logprobs"):
        x, y = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(x, torch.nn.functional.pad(y, (0, x.shape[1] - y.shape[1])), rtol=1e-4, atol=1e-5)
    assert experience_metrics(found, config) == pytest.approx(experience_metrics(expected, config), rel=1e-4, abs=1e-5)
    metrics = rollout_metrics(rollout, scores)
    said = {"reward_failed_fraction": 0.25, "reward_a": 1.5, "reward_b": 3.0}  # means over those that have the part
    assert metrics == pytest.approx(rollout_metrics(fewer, their) | said, rel=1e-4, abs=1e-5)
    assert scores.rows_of_scores()[3] == {"score": None, "reward_a": None, "reward_b": 7.0}
    assert scores.rows_of_scores()[0] == {"score": 0.5, "reward_a": 0.5, "reward_b": None}


def test_the_step_is_that_of_the_other_answers():
    """One optimizer step on three answers of four, and on a buffer of three."""
    config, trained = ppo_config(**FLAGS), []
    for rollout, scores in (whole(config), buffer(PLACES, config)):
        models = tiny_models()
        experience = make_experience(rollout, scores, RunningMoments(), config)
        metrics = update(models.policy, models.critic, experience, config, 0, 0.1, 0.1)
        weights = [torch.cat([p.flatten() for p in x.module.parameters()]) for x in (models.policy, models.critic)]
        trained.append((metrics, *weights))
    assert trained[0][0] == pytest.approx(trained[1][0], rel=1e-4, abs=1e-6)
    for found, expected in zip(trained[0][1:], trained[1][1:]):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_minibatches_share_what_is_left(monkeypatch):
    """Seven answers of eight in minibatches of at most three: steps with 3, 2 and 2, none with one alone."""
    config, models = ppo_config(num_rollouts=9, batch_size=3), tiny_models()
    rollout, scores = buffer([0, 1, 2, 3, 0, 1, 2, 3], config)
    scores = replace(scores, failed=torch.arange(8) == 5, parts=torch.zeros(8, 1), part_names=("reward_a",))
    rows, steps = [], []
    models.critic.module.register_forward_hook(lambda module, inputs, output: rows.extend(inputs[0][:, 1].tolist()))
    monkeypatch.setattr(models.critic, "apply", lambda lr: steps.append(len(rows)))
    experience = make_experience(rollout, scores, RunningMoments(), config)
    rows.clear()
    update(models.policy, models.critic, experience, config, 0, 1e-3, 1e-3)
    assert steps == [3, 5, 7]
    assert sorted(rows) == sorted(rollout.sequences[[0, 1, 2, 3, 4, 6, 7], 1].tolist())


def test_a_buffer_without_any_score_is_an_error_that_names_the_function():
    config = ppo_config()
    rollout, scores = whole(config)
    scores = replace(scores, failed=torch.ones(4).bool())
    with pytest.raises(UserError, match=r"--reward_fn scored none of 4 answers \(reward_a for 1, reward_b for 1\)"):
        make_experience(rollout, scores, RunningMoments(), config)
