"""Scoring: which number comes from which position; --reuse_sampler_logprobs keeps what scoring would compute."""

import pytest
import torch

from ppo.decoding.sampling import EVALUATION, Sampling
from ppo.decoding.scheduler import Decoder, DecodingOptions
from ppo.rollout import PolicySampler, assemble, with_measured
from ppo.score import score
from ppo.types import MeasuredRollout, Rollout
from ppo.user_reward import RewardFunction, UserReward
from tests.helpers.parts import (
    EOS,
    PAD,
    PROMPTS,
    RESPONSES,
    ppo_config,
    prompts_of,
    rollout_by_hand,
    tiny_models,
    token_ids,
)

ROLLOUT = rollout_by_hand()


class Letters:
    """A tokenizer whose token i is the letter number i."""

    eos_token_id = EOS
    chat_template = None

    def __len__(self) -> int:
        return 24

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(chr(ord("a") + i) for i in ids if i > 2)


def test_value_of_a_token_is_read_before_it_and_the_score_after_the_last():
    models = tiny_models()
    scores = score(ROLLOUT, prompts_of(*PROMPTS), models, None, token_ids(), 1.0, ppo_config())
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES)):
        alone = torch.tensor([prompt + response])
        inside = torch.ones_like(alone).bool()
        values = models.critic.module(alone, inside)[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(scores.old_values[i][ROLLOUT.response_mask[i]], values, atol=1e-5, rtol=1e-4)
        # The reward model sees whole answers: what was cut off, the empty answer too, gets its EOS first.
        closed = torch.tensor([prompt + response + ([] if response[-1:] == [EOS] else [EOS])])
        last = models.reward.members[0].model.model(closed, torch.ones_like(closed).bool())[0, -1]
        torch.testing.assert_close(scores.scores[i], last, atol=1e-5, rtol=1e-4)
    assert not scores.old_values[~ROLLOUT.response_mask].any()


def test_reward_function_is_added_to_the_reward_model_or_stands_alone():
    lengths = UserReward([RewardFunction(lambda prompts, answers: [len(answer) for answer in answers])])
    models, prompts, config = tiny_models(), prompts_of(*PROMPTS), ppo_config()
    by_model = score(ROLLOUT, prompts, models, None, token_ids(), 1.0, config).scores
    both = score(ROLLOUT, prompts, models, lengths, Letters(), 1.0, config).scores
    torch.testing.assert_close(both - by_model, torch.tensor([2.0, 0.0, 0.0, 8.0]), atol=1e-5, rtol=0)
    models.reward = None
    assert score(ROLLOUT, prompts, models, lengths, Letters(), 1.0, config).scores.tolist() == [2.0, 0.0, 0.0, 8.0]


def test_parts_that_only_another_rank_has_are_unknown_here(monkeypatch):
    """So that all ranks gather the same columns."""

    def gather(own) -> list:
        return [["reward_b", *own], own] if isinstance(own, list) else [own]

    monkeypatch.setattr("ppo.score.gather_objects", gather)
    reward = UserReward([RewardFunction(lambda prompts, answers: [None, 1, 2, 3], metric="reward_a")])
    found = score(ROLLOUT, prompts_of(*PROMPTS), tiny_models(), reward, Letters(), 1.0, ppo_config())
    assert found.part_names == ("reward_b", "reward_a") and found.failed.tolist() == [True, False, False, False]
    assert found.parts.isnan().tolist() == [[True, True], [True, False], [True, False], [True, False]]
    assert found.rows(slice(1, 2)).rows_of_scores()[0] | {"score": 0} == {"score": 0, "reward_b": None, "reward_a": 1.0}


def test_reference_is_asked_as_soon_as_the_policy_has_moved():
    models, prompts, config = tiny_models(), prompts_of(*PROMPTS), ppo_config()
    models.reference.model.load_state_dict(models.policy.module.state_dict())
    forwards = []
    models.reference.model.register_forward_hook(lambda *_: forwards.append(1))

    def scored():
        return score(ROLLOUT, prompts, models, None, token_ids(), 1.0, config)

    same = scored()
    assert torch.equal(same.ref_logprobs, same.old_logprobs) and not forwards
    with torch.no_grad():
        models.policy.module.lm.model.norm.weight[-1] += 0.1
    moved = scored()
    assert not torch.equal(moved.ref_logprobs, moved.old_logprobs) and forwards
    assert torch.equal(moved.ref_logprobs, same.ref_logprobs)


def test_without_a_critic_there_are_no_values():
    models, prompts, config = tiny_models(), prompts_of(*PROMPTS), ppo_config()
    whole = score(ROLLOUT, prompts, models, None, token_ids(), 1.0, config)
    assert list(models.engines()) == ["policy", "critic"]
    models.critic = None
    assert list(models.engines()) == ["policy"]
    found = score(ROLLOUT, prompts, models, None, token_ids(), 1.0, config)
    assert found.old_values is None
    row = found.rows([1]).map(lambda x: x + 0)
    assert row.old_values is None and torch.equal(row.old_logprobs, whole.old_logprobs[1:2])


A, B, C = [1, 7, 8], [1, 3, 4, 5, 6, 7, 8, 9], [1, 9]
BATCH, LIMITS = prompts_of(A, B, A, C, B, A, C), [8, 1, 5, 8, 8, 2, 8]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "options", [DecodingOptions(8, 64, steps_per_check=3), DecodingOptions(2, 64, llama_step=True)], ids=str
)
def test_sampler_and_scoring_agree(options, temperature):
    models, sampling, forwards = tiny_models(), Sampling(temperature), []
    work = (models.policy, BATCH.ids, BATCH.places, LIMITS, sampling, 7, token_ids(), options, torch.device("cpu"))
    decoder = Decoder(*work, measure=True)
    tokens, (logprobs, entropy) = decoder.run(), decoder.measurements()
    assert [row.tolist() for row in tokens] == [row.tolist() for row in Decoder(*work).run()]
    lengths = [len(row) for row in tokens]
    assert min(lengths) == 1 and max(lengths) > 4
    tokens[3], logprobs[3], entropy[3] = tokens[3][:0], logprobs[3][:0], entropy[3][:0]
    measured = with_measured(assemble(BATCH.ids, tokens, EOS, PAD), logprobs, entropy)
    plain = Rollout(*(getattr(measured, name) for name in Rollout.__dataclass_fields__))
    models.policy.module.register_forward_hook(lambda *_: forwards.append(1))
    arguments = BATCH, models, None, token_ids(), temperature, ppo_config(micro_batch_tokens=20)
    reused = score(measured, *arguments)
    assert not forwards
    scored = score(plain, *arguments)
    assert len(forwards) > 1 and not torch.equal(scored.old_logprobs, scored.ref_logprobs)
    for name in vars(scored):
        torch.testing.assert_close(getattr(reused, name), getattr(scored, name), atol=1e-5, rtol=1e-5)


def test_evaluation_is_not_measured():
    """Its log-probabilities are not the policy's, which has to compute them."""
    sampler = PolicySampler(tiny_models().policy, token_ids(), ppo_config(), measure=True)
    assert type(sampler(BATCH, Sampling(), 7)) is MeasuredRollout and type(sampler(BATCH, EVALUATION, 7)) is Rollout
