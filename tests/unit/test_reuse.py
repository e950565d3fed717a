"""--reuse_sampler_logprobs: what the sampler keeps is what scoring computes, and the policy makes no forward."""

import pytest
import torch

from ppo.decoding.sampling import EVALUATION, Sampling
from ppo.decoding.scheduler import Decoder, DecodingOptions
from ppo.rollout import PolicySampler, assemble, with_measured
from ppo.score import score
from ppo.types import MeasuredRollout, PromptBatch, Rollout
from tests.helpers.parts import EOS, PAD, ppo_config, tiny_models, token_ids

A, B, C = [1, 7, 8], [1, 3, 4, 5, 6, 7, 8, 9], [1, 9]
PROMPTS = [A, B, A, C, B, A, C]
LIMITS = [8, 1, 5, 8, 8, 2, 8]
BATCH = PromptBatch(PROMPTS, [[] for _ in PROMPTS], list(range(len(PROMPTS))))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "options", [DecodingOptions(8, 64, steps_per_check=3), DecodingOptions(2, 64, llama_step=True)], ids=str
)
def test_sampler_and_scoring_agree(options, temperature):
    models, sampling, forwards = tiny_models(), Sampling(temperature), []
    work = (models.policy, PROMPTS, BATCH.places, LIMITS, sampling, 7, token_ids(), options, torch.device("cpu"))
    decoder = Decoder(*work, measure=True)
    tokens, (logprobs, entropy) = decoder.run(), decoder.measurements()
    assert [row.tolist() for row in tokens] == [row.tolist() for row in Decoder(*work).run()]
    lengths = [len(row) for row in tokens]
    assert min(lengths) == 1 and max(lengths) > 4
    tokens[3], logprobs[3], entropy[3] = tokens[3][:0], logprobs[3][:0], entropy[3][:0]
    measured = with_measured(assemble(PROMPTS, tokens, EOS, PAD), logprobs, entropy)
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
