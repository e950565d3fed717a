"""Our functions against the inputs and outputs that the released PPO-max code gave on random tensors."""

import json
from pathlib import Path

import pytest
import torch

from ppo.advantages import gae
from ppo.decoding.sampling import keep_nucleus
from ppo.kl import k3
from ppo.loss import masked_sum, policy_clipped, policy_loss, policy_ratio, value_clipped, value_loss
from utils.moments import RunningMoments
from utils.tensors import masked_mean, token_logprobs, whiten

RELEASED = json.loads((Path(__file__).parent / "ppo_released.json").read_text("utf-8"))
DEFAULT_CLIP = 0.2  # the released code reports how often clipping would bind even when it is off, at its default


def cases(name: str) -> pytest.MarkDecorator:
    """One test a recorded case."""
    return pytest.mark.parametrize("case", RELEASED[name], ids=range(len(RELEASED[name])))


def close(ours: torch.Tensor, recorded: list | float) -> None:
    torch.testing.assert_close(ours, torch.tensor(recorded), rtol=1e-5, atol=1e-5)


def test_every_function_was_recorded():
    assert {name: len(found) for name, found in RELEASED.items() if name != "note"} == dict.fromkeys(
        ("gae", "moments", "whiten", "loss", "top_p", "logprobs"), 8
    )


@cases("gae")
def test_gae(case):
    rewards, values = torch.tensor([case["rewards"]]), torch.tensor([case["values"]])
    advantages, returns = gae(rewards, values, torch.ones_like(values).bool(), case["gamma"], case["lam"])
    close(advantages[0], case["advantages"])
    close(returns[0], case["returns"])


@cases("moments")
def test_running_moments(case):
    moments = RunningMoments()
    for seen in case:
        moments.update(torch.tensor(seen["batch"]))
        close(torch.tensor([moments.mean, moments.std]), [seen["mean"], seen["std"]])


@cases("whiten")
def test_whiten(case):
    close(whiten(torch.tensor(case["x"]), torch.tensor(case["mask"])), case["whitened"])


@cases("loss")
def test_losses_and_their_metrics(case):
    names = ("mask", "logprobs", "old_logprobs", "advantages", "returns", "values", "old_values")
    mask, logprobs, old_logprobs, advantages, returns, values, old_values = (torch.tensor(case[name]) for name in names)
    if case["advantage_norm"]:
        advantages = whiten(advantages, mask)
    if case["advantage_clip"]:
        advantages = advantages.clamp(-case["advantage_clip"], case["advantage_clip"])
    num_tokens = float(mask.sum())
    close(policy_loss(logprobs, old_logprobs, advantages, mask, case["policy_clip"], num_tokens), case["policy_loss"])
    close(value_loss(values, old_values, returns, mask, case["value_clip"], num_tokens), case["value_loss"])
    close(masked_sum(k3(old_logprobs, logprobs), mask) / num_tokens, case["approx_kl"])
    ratio = policy_ratio(logprobs, old_logprobs, mask)
    clipped = policy_clipped(ratio, advantages, case["policy_clip"] or DEFAULT_CLIP)
    close(masked_mean(clipped, mask), case["clip_fraction"])
    clipped = value_clipped(values, old_values, returns, case["value_clip"] or DEFAULT_CLIP)
    close(masked_mean(clipped, mask), case["value_clip_fraction"])


@cases("top_p")
def test_top_p(case):
    close(keep_nucleus(torch.tensor(case["probs"]), case["top_p"]), case["kept"])


@cases("logprobs")
def test_token_logprobs(case):
    ours = token_logprobs(torch.tensor(case["logits"]), torch.tensor(case["ids"]))
    close(ours[:, 1:], case["logprobs_of_tokens_1_on"])
    assert not ours[:, 0].any()
