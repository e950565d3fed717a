"""--reuse_sampler_logprobs: what the sampler keeps is what scoring would say, and the policy is not asked."""

import pytest
import torch

from ppo.decoding.sampling import Sampling
from ppo.decoding.scheduler import Room, decode_all, decode_measured
from ppo.rollout import assemble, generate, with_measured
from ppo.score import score
from ppo.types import MeasuredRollout, PromptBatch, Rollout
from tests.helpers.parts import EOS, PAD, ppo_config, tiny_models, token_ids

A, B, C = [1, 7, 8], [1, 3, 4, 5, 6, 7, 8, 9], [1, 9]
PROMPTS = [A, B, A, C, B, A, C]
LIMITS = [8, 1, 5, 8, 8, 2, 8]
BATCH = PromptBatch(PROMPTS, [[] for _ in PROMPTS], list(range(len(PROMPTS))))


def without_measures(rollout: MeasuredRollout) -> Rollout:
    return Rollout(*(getattr(rollout, name) for name in Rollout.__dataclass_fields__))


def both_ways(models, rollout: MeasuredRollout, temperature: float):
    config = ppo_config(micro_batch_tokens=20)
    arguments = BATCH, models, None, token_ids(), temperature, config
    return score(rollout, *arguments), score(without_measures(rollout), *arguments)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "room",
    [Room(2, 64), Room(8, 64, steps_per_look=3), Room(2, 64, straight=True)],
    ids=["two slots", "looks seldom", "straight"],
)
def test_sampler_and_scoring_agree(room, temperature):
    models, sampling = tiny_models(), Sampling(temperature)
    work = (models.policy, PROMPTS, BATCH.places, LIMITS, sampling, 7, token_ids(), room, torch.device("cpu"))
    tokens, logprobs, entropy = decode_measured(*work)
    assert [row.tolist() for row in tokens] == [row.tolist() for row in decode_all(*work)]
    lengths = [len(row) for row in tokens]
    assert min(lengths) == 1 and max(lengths) > 4
    tokens[3], logprobs[3], entropy[3] = tokens[3][:0], logprobs[3][:0], entropy[3][:0]
    rollout = with_measured(assemble(PROMPTS, tokens, EOS, PAD), logprobs, entropy)
    reused, scored = both_ways(models, rollout, temperature)
    assert not torch.equal(scored.old_logprobs, scored.ref_logprobs)
    for name in vars(scored):
        torch.testing.assert_close(getattr(reused, name), getattr(scored, name), atol=1e-5, rtol=1e-5)


def test_the_policy_makes_no_scoring_forward():
    models, config = tiny_models(), ppo_config()
    rollout = generate(models.policy, BATCH, Sampling(), 7, token_ids(), config, measure=True)
    plain = generate(models.policy, BATCH, Sampling(), 7, token_ids(), config)
    assert type(plain) is Rollout and torch.equal(plain.sequences, rollout.sequences)
    forwards = []
    models.policy.module.register_forward_hook(lambda *_: forwards.append(1))
    reused, scored = both_ways(models, rollout, 1.0)
    assert len(forwards) > 1
    forwards.clear()
    score(rollout, BATCH, models, None, token_ids(), 1.0, config)
    assert not forwards
    torch.testing.assert_close(reused.old_logprobs, scored.old_logprobs, atol=1e-5, rtol=1e-5)
