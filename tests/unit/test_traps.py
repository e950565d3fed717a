"""The traps of PPO implementations that no other file tests. By number, with the tests of the others:

1 special ids: here. 2 left padding: test_decoding.py. 3 short responses: here. 4 ratio of 1: here. 5 float32: here.
6 temperature: test_fast_paths.py. 7 score and KL per token: test_numerics.py. 8 shaping before KL: test_experience.py.
9 masks of GAE and whitening: test_numerics.py, test_masked.py. 10 gradients whatever the micro-batches and ranks:
test_update.py. 11 truncated responses: test_experience.py. 12 entropy clip: tests/bad_inputs/ppo.yaml. 13 perplexity:
test_experience.py. 14 separate steps: test_update.py, test_engine.py. 15 random streams: test_sampling.py,
test_decoding.py. 16 equally many forwards: test_reward_models.py, test_batching.py. 17 the rule for best/: here.
20 a sampler with other weights: test_sampler_gap.py.
"""

import math
from dataclasses import replace

import pytest
import torch

import utils.models.padding_free
from ppo.alarms import is_best
from ppo.decoding.sampling import Sampling
from ppo.models import PolicyModel
from ppo.rollout import PolicySampler, response_ids
from ppo.update import policy_backward, update
from tests.helpers.parts import (
    PROMPTS,
    RESPONSES,
    GradientEngine,
    ppo_config,
    prompts_of,
    rollout_by_hand,
    scored,
    tiny_models,
    tiny_policy,
    token_ids,
)
from tests.helpers.tiny import tiny_llama_folder
from utils.engine.engine import InferenceEngine
from utils.models.load import load_causal_lm
from utils.sums import means


def test_trap_01_special_ids_inside_a_response_do_not_shorten_it():
    prompts, config = prompts_of(*PROMPTS * 8), ppo_config(maxlen_res=12, rollout_batch_size=32)
    policy = InferenceEngine(tiny_policy())
    for pad in (2, 0, 7):
        rollout = PolicySampler(policy, token_ids(eos=2, pad=pad), config)(prompts, Sampling(), 0)
        responses = response_ids(rollout)
        assert all(ids.index(2) == len(ids) - 1 if 2 in ids else len(ids) == 12 for ids in responses)
        assert all(any(token in ids[:-1] for ids in responses) for token in (0, 7))
        assert any(2 in ids for ids in responses)
        masked = rollout.attention_mask & ~rollout.response_mask
        assert [row[mask].tolist() for row, mask in zip(rollout.sequences, masked)] == prompts.ids


def test_trap_03_eos_counts_nothing_after_it_and_short_responses_work():
    rollout, models = rollout_by_hand(), tiny_models()
    assert rollout.response_mask.sum(1).tolist() == [3, 1, 0, 8]
    assert response_ids(rollout) == RESPONSES
    assert rollout.ended.tolist() == [True, True, False, False]
    experience, config = scored(rollout, models)
    assert not experience.rewards[2].any() and experience.rewards[1].count_nonzero() == 1
    metrics = update(models.policy, models.critic, experience, config, 0, 1e-3, 1e-3)
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("padding", [0, 5])
def test_trap_04_ratio_is_one_before_the_first_step(padding, tmp_path):
    folder = tiny_llama_folder(tmp_path, 24, tokenizer=False, attention_dropout=0.5)
    models = tiny_models()
    models.policy = GradientEngine(PolicyModel(load_causal_lm(str(folder), torch.float32, torch.device("cpu"))))
    rollout = rollout_by_hand().map(lambda x: torch.nn.functional.pad(x, (0, padding)) if x.dim() > 1 else x)
    experience, config = scored(rollout, models, micro_batch_tokens=1000)
    models.policy.module.train()  # as in the update: dropout would have an effect
    for micro_batch_tokens in (1, 20, 1000):
        config = replace(config, micro_batch_tokens=micro_batch_tokens)
        _, sums = policy_backward(models.policy, experience, config, None)
        assert means(sums)["ratio_mean"] == pytest.approx(1.0, abs=1e-6)
        assert sums["clip_fraction"][0] == 0.0 and sums["approx_kl"][0] == pytest.approx(0.0, abs=1e-9)


def test_trap_05_float32_from_bf16_logits_and_no_logits_for_prompts(monkeypatch):
    monkeypatch.setattr(utils.models.padding_free, "FLOAT_TOKENS", 0)  # transformers' own attention
    rollout, policy = rollout_by_hand(), tiny_policy(vocab=300).bfloat16()
    made = []
    policy.lm.lm_head.register_forward_hook(lambda module, inputs, output: made.append(output))
    logprobs, entropy = policy(rollout.sequences, rollout.response_mask)
    logits, mask = torch.cat(made), rollout.response_mask
    assert len(logits) == int(mask.sum()) == 12
    assert logprobs.dtype == entropy.dtype == torch.float32 and logits.dtype == torch.bfloat16
    exact = torch.log_softmax(logits.double(), -1).gather(-1, rollout.sequences[mask][:, None]).squeeze(-1).float()
    torch.testing.assert_close(logprobs[mask], exact, atol=1e-5, rtol=0)  # bf16 would be off by 1e-2
    assert not logprobs[~mask].any()
    whole = policy.lm(rollout.sequences).logits[:, :-1][mask[:, 1:]].float()
    torch.testing.assert_close(logits.float(), whole, atol=2e-2, rtol=2e-2)  # some CPUs round other shapes differently
    made.clear()
    sampler = PolicySampler(InferenceEngine(policy), token_ids(eos=-1), ppo_config(maxlen_res=3))
    sampler(prompts_of(*PROMPTS), Sampling(), 0)
    assert [output[..., 0].numel() for output in made] == [4, 4, 4]


def test_trap_17_best_needs_a_higher_score_and_a_small_kl():
    assert is_best({"score_mean": 1.0, "kl_ref": 10.0}, 0.9, 10.0)
    assert not is_best({"score_mean": 5.0, "kl_ref": 10.1}, 0.9, 10.0)
    assert not is_best({"score_mean": 1.0, "kl_ref": 1.0}, 1.0, 10.0)
