"""The policy's loss by flags: clips, ratios and means over a minibatch."""

import math
from dataclasses import replace

import pytest
import torch

import ppo.update
from ppo.config import PPOConfig
from ppo.loss import policy_clipped, policy_loss, policy_ratio, row_weights, value_clipped
from ppo.types import Experience
from ppo.update import policy_backward
from tests.helpers.parts import rollout_by_hand, scored, tiny_models
from utils.sums import add, means

MASK = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
GROUPS = torch.tensor([7, 7, 3, 3])


def randoms(seed: int) -> torch.Tensor:
    return torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed))


OLD, NEW, ADVANTAGES = randoms(0) - 2.0, randoms(1) - 2.0, randoms(2)


def loss_of_ratios(ratios: list[float], advantages: list[float], **clips) -> tuple[float, list[float], list[bool]]:
    """(loss, derivative by each log-probability, what counts as clipped) of one response with these ratios."""
    logprobs, mask = torch.tensor([ratios]).log().requires_grad_(), torch.ones(1, len(ratios)).bool()
    old, advantages = torch.zeros(1, len(ratios)), torch.tensor([advantages])
    loss = policy_loss(logprobs, old, advantages, mask, 0.2, float(len(ratios)), **clips)
    loss.backward()
    ratio = policy_ratio(logprobs.detach(), old, mask)
    return loss.item(), logprobs.grad[0].tolist(), policy_clipped(ratio, advantages, 0.2, **clips)[0].tolist()


@pytest.mark.parametrize(
    ("ratios", "advantages", "clips", "loss", "clipped"),
    [
        # DESIGN.md: min(.5, .8) = .5, min(-1, -1) = -1, min(3, 2.4) = 2.4
        ([0.5, 1.0, 1.5], [1.0, -1.0, 2.0], {}, -(0.5 - 1.0 + 2.4) / 3, [False, False, True]),
        # Clip-higher 0.4: 1.3 is inside, 1.5 becomes 1.4; below 1 nothing changes.
        ([1.3, 1.5, 0.7], [1.0, 1.0, -1.0], {"clip_high": 0.4}, -(1.3 + 1.4 - 0.8) / 3, [False, True, True]),
        # clip_high below clip: 1.15 becomes 1.1
        ([1.15], [1.0], {"clip_high": 0.1}, -1.1, [True]),
        # A = -1: without dual clip the loss follows the ratio; with it, at most 3. A = 1 is clipped at 1.2 as before.
        ([10.0], [-1.0], {}, 10.0, [False]),
        ([10.0], [-1.0], {"dual_clip": 3.0}, 3.0, [True]),
        ([10.0, 2.0, 10.0], [-2.0, -1.0, 1.0], {"dual_clip": 3.0}, (6.0 + 2.0 - 1.2) / 3, [True, False, True]),
    ],
)
def test_clips_by_hand(ratios, advantages, clips, loss, clipped):
    """A token counts as clipped exactly where its gradient is 0; elsewhere the gradient is -ρ A / number of tokens."""
    found, gradient, counted = loss_of_ratios(ratios, advantages, **clips)
    assert found == pytest.approx(loss, rel=1e-5)
    assert counted == clipped
    wanted = [0.0 if c else -r * a / len(ratios) for r, a, c in zip(ratios, advantages, clipped, strict=True)]
    assert gradient == pytest.approx(wanted, rel=1e-5)


def test_sequence_ratio_against_gspo_equation_7():
    """Every token of a row has exp(mean log ratio), and the gradient goes through all of them."""
    ours, theirs = NEW.clone().requires_grad_(), NEW.clone().requires_grad_()
    policy_loss(ours, OLD, ADVANTAGES, MASK, 0.2, 6.0, kind="sequence").backward()
    total = 0.0
    for new, old, advantages, mask in zip(theirs, OLD, ADVANTAGES, MASK, strict=True):
        if mask.any():
            s = (new[mask].sum() / mask.sum()).exp() / (old[mask].sum() / mask.sum()).exp()
            for advantage in advantages[mask]:
                total = total - torch.min(s * advantage, s.clamp(0.8, 1.2) * advantage) / 6.0
    total.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert theirs.grad.abs().max() > 0.01
    ratio = policy_ratio(NEW, OLD, MASK, "sequence")
    assert float(ratio[2, 2]) == pytest.approx(math.exp(float((NEW - OLD)[2, 2:4].mean())), rel=1e-5)
    assert torch.equal(ratio[2, 2], ratio[2, 3]) and bool((ratio[~MASK] == 1).all())


def test_without_ratio_the_gradient_is_that_of_reinforce():
    """The value is -A log π, the gradient that of the ratio at the old policy, wherever the policy is."""
    ours, at_old = NEW.clone().requires_grad_(), OLD.clone().requires_grad_()
    loss = policy_loss(ours, OLD, ADVANTAGES, MASK, 0.2, 6.0, kind="none")
    loss.backward()
    policy_loss(at_old, OLD, ADVANTAGES, MASK, 0.0, 6.0).backward()
    torch.testing.assert_close(ours.grad, at_old.grad)
    assert loss.item() == pytest.approx(float(-(ADVANTAGES * NEW)[MASK].sum() / 6), rel=1e-5)


@pytest.mark.parametrize("kind", ["token", "sequence", "none"])
def test_padding_and_order_do_not_change_the_loss(kind):
    """NaN outside the response reaches neither loss nor gradient."""

    def loss_and_gradient(order, outside, extra):
        def wide(x):
            return torch.nn.functional.pad(x, (extra, extra), value=outside)[order]

        mask = torch.nn.functional.pad(MASK, (extra, extra))[order]
        new = torch.where(mask, wide(NEW), outside).requires_grad_()
        old, advantages = torch.where(mask, wide(OLD), outside), torch.where(mask, wide(ADVANTAGES), 0.0)
        loss = policy_loss(new, old, advantages, mask, 0.2, 6.0, 0.3, 3.0 if kind != "none" else 0.0, kind)
        loss.backward()
        return loss.detach(), new.grad[mask], new.grad[~mask]

    plain, gradient, _ = loss_and_gradient([0, 1, 2, 3], 0.0, 0)
    padded, padded_gradient, outside = loss_and_gradient([0, 1, 2, 3], float("nan"), 3)
    torch.testing.assert_close(padded, plain)
    torch.testing.assert_close(padded_gradient, gradient)
    assert not outside.any() and gradient.any()
    torch.testing.assert_close(loss_and_gradient([3, 1, 0, 2], 0.0, 0)[0], plain)


@pytest.mark.parametrize(
    ("average", "expected"),
    [
        ("token", [1, 1, 1, 1]),  # also of the empty row, which has no token
        ("sequence", [6 / (3 * 3), 6 / (3 * 1), 6 / (3 * 2), 0]),  # 3 responses that are not empty
        ("group", [6 / (2 * 4), 6 / (2 * 4), 6 / (2 * 2), 0]),  # group 7 has 3 + 1 tokens, group 3 has 2
        ("constant", [6 / (3 * 10)] * 3 + [0]),  # --maxlen_res 10
    ],
)
def test_weights_of_rows_by_hand(average, expected):
    weights = row_weights(MASK, GROUPS, average, 10)
    torch.testing.assert_close(weights, torch.tensor(expected).float())
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(row_weights(MASK[order], GROUPS[order], average, 10), weights[order])
    empty = row_weights(torch.zeros(2, 3).bool(), GROUPS[:2], average, 10)
    assert bool(empty.isfinite().all())


AVERAGES = {  # of a token's loss, in a way of its own: list of rows, each a list of tokens -> mean
    "sequence": lambda rows, groups: mean([mean(row) for row in rows if row]),
    "group": lambda rows, groups: mean(
        [mean([x for r, g in zip(rows, groups, strict=True) if g == name for x in r]) for name in set(groups)]
    ),
    "constant": lambda rows, groups: mean([sum(row) / 8 for row in rows if row]),  # --maxlen_res 8
}
ALL_TERMS = {
    "kl_in": "loss", "kl_estimator": "k2", "kl_penalty_weight": 0.3, "use_entropy_loss": True,
    "entropy_loss_weight": 0.1, "pg_clip_high": 0.3, "dual_clip": 3.0,
}  # fmt: skip


def mean(numbers: list) -> torch.Tensor:
    return sum(numbers) / len(numbers)


def experience_of(models, **flags) -> tuple[Experience, PPOConfig]:
    """Four responses of 3, 1, 0 and 8 tokens to prompts 7, 3, 3 and 3, with old log-probabilities that differ."""
    experience, config = scored(rollout_by_hand(), models, **flags)
    noise = 0.3 * torch.randn(experience.old_logprobs.shape, generator=torch.Generator().manual_seed(4))
    old = torch.where(experience.response_mask, experience.old_logprobs + noise, 0.0)
    return replace(experience, old_logprobs=old, groups=torch.tensor([7, 3, 3, 3])), config


@pytest.mark.parametrize("average", AVERAGES)
def test_the_average_of_all_terms_against_a_plain_loop(average):
    """Surrogate, KL and entropy bonus have one mean; with ratio "sequence" as well."""
    for kind in ("token", "sequence"):
        models = tiny_models()
        experience, config = experience_of(models, **ALL_TERMS, loss_average=average, policy_ratio=kind)
        loss, _ = policy_backward(models.policy, experience, config, None)
        ours = models.policy.gradients()
        mask = experience.response_mask
        logprobs, entropy = models.policy(experience.sequences, mask, 1.0, True)
        logs = torch.where(mask, logprobs - experience.old_logprobs, 0.0)
        ratio = (
            logs.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1) if kind == "sequence" else logs
        ).exp()
        surrogate = torch.minimum(ratio * experience.advantages, ratio.clamp(0.8, 1.3) * experience.advantages)
        terms = -surrogate + 0.3 * 0.5 * (logprobs - experience.ref_logprobs) ** 2 - 0.1 * entropy
        rows = [list(row[chosen]) for row, chosen in zip(terms, mask, strict=True)]
        expected = AVERAGES[average](rows, experience.groups.tolist())
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        torch.testing.assert_close(ours, models.policy.gradients(), atol=1e-6, rtol=1e-3)
        assert ours.abs().max() > 1e-3


@pytest.mark.parametrize("average", ["token", *AVERAGES])
@pytest.mark.parametrize("kind", ["token", "sequence", "none"])
def test_micro_batches_and_ranks_give_the_same_gradient(monkeypatch, average, kind):
    """And so does another order of the rows."""
    models = tiny_models()
    flags = ALL_TERMS | ({"pg_clip_high": None, "dual_clip": 0.0} if kind == "none" else {})
    experience, config = experience_of(models, **flags, loss_average=average, policy_ratio=kind)
    (whole_loss, whole_sums), whole = (
        policy_backward(models.policy, experience, config, None),
        models.policy.gradients(),
    )
    for ranks, micro_batch_tokens, order in ((1, 1, [0, 1, 2, 3]), (2, 13, [3, 1, 0, 2]), (3, 1, [2, 0, 1, 3])):
        monkeypatch.setattr(ppo.update, "world_size", lambda ranks=ranks: ranks)
        loss, sums, cut = 0.0, {}, replace(config, micro_batch_tokens=micro_batch_tokens)
        for rank in range(ranks):
            monkeypatch.setattr(ppo.update, "rank", lambda rank=rank: rank)
            share, part = policy_backward(models.policy, experience.rows(torch.tensor(order)), cut, None)
            loss += share
            add(sums, part)
        torch.testing.assert_close(models.policy.gradients(), whole, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(loss, whole_loss, atol=1e-6, rtol=1e-4)
        assert means(sums) == pytest.approx(means(whole_sums), rel=1e-4, abs=1e-5)
    assert (means(whole_sums)["clip_fraction"] == 0) == (kind == "none")


def test_the_token_average_needs_no_weights_and_rows_of_one_length_have_one_mean():
    """With responses of one length the means over tokens, responses and groups of one size are the same number."""
    mask = torch.tensor([[0, 1, 1], [0, 1, 1], [1, 1, 0], [1, 1, 0]]).bool()
    for average in ("sequence", "group"):
        torch.testing.assert_close(row_weights(mask, GROUPS, average, 8), torch.ones(4))
    models = tiny_models()
    experience, config = experience_of(models)
    assert experience.row_weights is None
    same, _ = policy_backward(models.policy, experience, config, None)
    weighted = replace(experience, row_weights=torch.ones(4))
    assert torch.equal(same, policy_backward(models.policy, weighted, config, None)[0])


def test_an_amount_of_0_clips_nothing():
    """As in the losses; the dual clip stays."""
    ratio, advantages = torch.tensor([[1.5, 0.5, 4.0]]), torch.tensor([[1.0, -1.0, -1.0]])
    assert not policy_clipped(ratio, advantages, 0.0).any()
    assert policy_clipped(ratio, advantages, 0.0, dual_clip=3.0).tolist() == [[False, False, True]]
    values, old, returns = torch.tensor([[0.5, -0.5]]), torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
    assert value_clipped(values, old, returns, 0.2).all() and not value_clipped(values, old, returns, 0.0).any()
