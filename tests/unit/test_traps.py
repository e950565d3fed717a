"""The places where PPO implementations break, one test each: traps 1 to 9, from sampling to advantages."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import utils.models.padding_free
from ppo.advantages import gae
from ppo.decoding.sampling import EVALUATION, Sampling
from ppo.experience import make_experience, negative_kl_warning
from ppo.models import PolicyModel
from ppo.rewards import token_rewards
from ppo.rollout import generate, response_ids
from ppo.score import score
from ppo.update import policy_backward, update
from tests.helpers.parts import (
    PROMPTS,
    RESPONSES,
    GradientEngine,
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
from tests.helpers.tiny import tiny_llama_folder
from utils.engine.engine import InferenceEngine
from utils.models.load import load_causal_lm
from utils.moments import RunningMoments
from utils.tensors import whiten


def test_trap_01_special_ids_inside_a_response_do_not_shorten_it():
    prompts, config = prompts_of(*PROMPTS * 8), ppo_config(maxlen_res=12, rollout_batch_size=32)
    policy = InferenceEngine(tiny_policy())
    for tokenizer in (token_ids(eos=2, pad=2), token_ids(eos=2, pad=0), token_ids(eos=2, pad=7)):
        rollout = generate(policy, prompts, Sampling(), 0, tokenizer, config)
        responses = response_ids(rollout)
        assert all(ids.index(2) == len(ids) - 1 if 2 in ids else len(ids) == 12 for ids in responses)
        assert any(0 in ids[:-1] for ids in responses) and any(7 in ids[:-1] for ids in responses)
        assert any(2 in ids for ids in responses)
        masked = rollout.attention_mask & ~rollout.response_mask
        assert [row[mask].tolist() for row, mask in zip(rollout.sequences, masked)] == prompts.ids


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_trap_02_left_padding_changes_no_logits(positions):
    # Rotary positions are relative, so that only learned ones show a wrong offset.
    learned = GPT2Config(vocab_size=24, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    policy = tiny_policy() if positions == "rotary" else PolicyModel(GPT2LMHeadModel(learned).eval())
    seen = []
    policy.register_forward_hook(lambda module, inputs, output: seen.append(output))
    engine, prompts = InferenceEngine(policy), prompts_of(*PROMPTS)
    rollout = generate(engine, prompts, Sampling(), 0, token_ids(eos=-1), ppo_config())
    by_length = sorted(range(4), key=lambda i: -len(PROMPTS[i]))
    for row, i in enumerate(by_length):
        whole = rollout.sequences[i][rollout.attention_mask[i]]
        alone = policy.lm(whole[None]).logits[0, len(PROMPTS[i]) - 1 : -1]
        torch.testing.assert_close(torch.stack([logits[row] for logits in seen]), alone, atol=1e-4, rtol=1e-4)


def test_trap_03_eos_counts_nothing_after_it_and_short_responses_work():
    rollout = rollout_by_hand()
    assert rollout.response_mask.sum(1).tolist() == [3, 1, 0, 8]
    assert response_ids(rollout) == RESPONSES
    assert rollout.ended.tolist() == [True, True, False, False]
    models = tiny_models()
    experience, config = scored(rollout, models)
    assert not experience.rewards[2].any() and experience.rewards[1].count_nonzero() == 1
    metrics = update(models.policy, models.critic, experience, config, 0, 1e-3, 1e-3)
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("padding", [0, 5])
def test_trap_04_ratio_is_one_before_the_first_step(padding, tmp_path):
    folder = tiny_llama_folder(tmp_path, 24, tokenizer=False, attention_dropout=0.5)
    models = tiny_models()
    models.policy = GradientEngine(PolicyModel(load_causal_lm(str(folder), torch.float32, torch.device("cpu"))))
    rollout = rollout_by_hand()
    widen = torch.nn.functional.pad
    rollout = rollout.map(lambda x: widen(x, (0, padding)) if x.dim() > 1 else x)
    experience, config = scored(rollout, models, micro_batch_tokens=1000)
    models.policy.module.train()  # as the update does: now dropout would bite
    for micro_batch_tokens in (1, 20, 1000):
        config = replace(config, micro_batch_tokens=micro_batch_tokens)
        sums, problem = policy_backward(models.policy, experience, config, None)
        assert problem is None
        assert sums["ratio_mean"] / sums["policy_tokens"] == pytest.approx(1.0, abs=1e-6)
        assert sums["clip_fraction"] == 0.0 and sums["approx_kl"] == pytest.approx(0.0, abs=1e-9)


def test_trap_05_float32_from_bf16_logits_and_no_logits_for_prompts(monkeypatch):
    monkeypatch.setattr(
        utils.models.padding_free, "FLOAT_TOKENS", 0
    )  # transformers' own attention: what follows it is looked at
    rollout, policy = rollout_by_hand(), tiny_policy(vocab=300).bfloat16()
    made = []
    policy.lm.lm_head.register_forward_hook(lambda module, inputs, output: made.append(output))
    logprobs, entropy = policy(rollout.sequences, rollout.response_mask)
    logits, mask = torch.cat(made), rollout.response_mask
    assert len(logits) == int(mask.sum()) == 12
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    exact = torch.log_softmax(logits.double(), -1).gather(-1, rollout.sequences[mask][:, None]).squeeze(-1).float()
    torch.testing.assert_close(logprobs[mask], exact, atol=1e-5, rtol=0)  # bf16 would be off by 1e-2
    assert not logprobs[~mask].any()
    whole = policy.lm(rollout.sequences).logits[:, :-1][mask[:, 1:]].float()
    torch.testing.assert_close(logits.float(), whole, atol=2e-2, rtol=2e-2)  # another shape: some CPUs round otherwise
    made.clear()
    generate(InferenceEngine(policy), prompts_of(*PROMPTS), Sampling(), 0, token_ids(eos=-1), ppo_config(maxlen_res=3))
    assert [output[..., 0].numel() for output in made] == [4, 4, 4]


def test_trap_06_what_is_sampled_is_what_is_trained_on():
    rollout, models, config = rollout_by_hand(), tiny_models(), ppo_config(temperature=0.5)
    scores = score(rollout, prompts_of(*PROMPTS), models, None, token_ids(), 0.5, config)
    mask = rollout.response_mask
    for found, model in ((scores.old_logprobs, models.policy), (scores.ref_logprobs, models.reference.model)):
        lm = model.lm if isinstance(model, PolicyModel) else model.module.lm
        logprobs = torch.log_softmax(2.0 * lm(rollout.sequences).logits[:, :-1], -1)
        expected = logprobs.gather(-1, rollout.sequences[:, 1:, None]).squeeze(-1)
        torch.testing.assert_close(found[mask], expected[mask[:, 1:]], atol=1e-5, rtol=1e-5)
    experience = make_experience(rollout, scores, RunningMoments(), config)
    sums, _ = policy_backward(models.policy, experience, config, None)  # the update knows of the temperature too
    assert sums["approx_kl"] == pytest.approx(0.0, abs=1e-9)
    defaults = ppo_config()
    assert Sampling(defaults.temperature, defaults.topp, defaults.repetition_penalty) == Sampling(1.0, 1.0, 1.0)
    assert "ratio" in Sampling(topp=0.9).caveat and Sampling(temperature=0.5).caveat is None
    assert Sampling(temperature=0.8, topp=0.9, repetition_penalty=1.1) == EVALUATION


def test_trap_07_score_on_the_last_token_kl_on_every_one_and_its_sign():
    rollout = rollout_by_hand()
    kl = torch.full(rollout.sequences.shape, 2.0)  # the policy likes these tokens more than the reference does
    rewards = token_rewards(torch.tensor([1.0, 1.0, 1.0, 1.0]), kl, rollout.response_mask, 0.1)
    found = [row[mask].tolist() for row, mask in zip(rewards, rollout.response_mask)]
    expected = [[-0.2, -0.2, 0.8], [0.8], [], [-0.2] * 7 + [0.8]]
    assert found == [pytest.approx(row) for row in expected]
    many = rollout_of([[0, 1, 1]] * 40)
    assert "below 0" in negative_kl_warning(many, scores_of(many, [0.0] * 40, logprobs=-3.0))
    assert negative_kl_warning(many, scores_of(many, [0.0] * 40, logprobs=-0.5)) is None


def test_trap_08_scores_are_shaped_before_kl_is_added():
    rollout = rollout_of([[0, 1, 1]] * 4)
    scores = scores_of(rollout, [100.0, -100.0, 90.0, -90.0], logprobs=-1.0, ref_logprobs=-11.0)
    config = ppo_config(kl_penalty_weight=0.2, reward_clip=0.3)
    rewards = make_experience(rollout, scores, RunningMoments(), config).rewards
    expected = [[0.0, -2.0, sign * 0.3 - 2.0] for sign in (1, -1, 1, -1)]  # clipping last would leave ± 0.3
    torch.testing.assert_close(rewards, torch.tensor(expected))


def test_trap_09_gae_and_whitening_read_nothing_outside_the_response():
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]).bool()
    inside = torch.arange(15.0).reshape(3, 5)
    results = []
    for outside in (0.0, 999.0, math.nan):
        x = torch.where(mask, inside, outside)
        advantages, returns = gae(x, x, mask, 0.9, 0.95)
        results.append(torch.stack([advantages, returns, whiten(torch.where(mask, advantages, outside), mask)]))
        assert not results[-1][:, ~mask].any()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert whiten(torch.tensor([[3.0, 7.0]]), torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]
