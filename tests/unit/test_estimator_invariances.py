"""Advantage estimators: changes of the input that change nothing, and estimators that agree."""

import pytest
import torch

from tests.helpers.estimators import ALL, NAN, OF_GROUPS, batch_of, close, estimate, random_batch, same

# Invariances


@pytest.mark.parametrize("name", OF_GROUPS)
def test_a_shift_of_all_scores_of_a_group_changes_nothing(name):
    batch = random_batch(1)
    batch["response_mask"][:, 0] = True
    batch["rewards"][:, 0] = 0.5
    shifted = batch["rewards"].clone()
    shifted[batch["groups"] == 7, 0] += 3.0
    same(estimate(name, batch), estimate(name, batch, rewards=shifted), 1e-4)


@pytest.mark.parametrize("name", ALL)
def test_padding_changes_nothing(name):
    batch = random_batch(2)
    wide = dict(batch)
    for key, fill in (("rewards", NAN), ("values", 999.0), ("response_mask", False)):
        wide[key] = torch.nn.functional.pad(batch[key], (3, 5), value=fill)
    found = estimate(name, wide)
    same(estimate(name, batch), tuple(None if x is None else x[:, 3:-5] for x in found), 1e-6)


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_the_rows_changes_nothing(name):
    batch = random_batch(3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    permuted = {key: x[order] if torch.is_tensor(x) else x for key, x in batch.items()}
    expected = tuple(None if x is None else x[order] for x in estimate(name, batch))
    same(estimate(name, permuted), expected, 1e-6)


@pytest.mark.parametrize("name", ALL)
def test_the_numbers_of_the_groups_change_nothing(name):
    batch = random_batch(4)
    renumbered = torch.where(batch["groups"] == 7, -(10**12), batch["groups"] * 2 + 11)
    same(estimate(name, batch), estimate(name, batch, groups=renumbered), 1e-6)


@pytest.mark.parametrize("name", ALL)
def test_what_is_outside_the_response_changes_nothing(name):
    batch = random_batch(5)
    mask = batch["response_mask"]
    clean = {key: batch[key].where(mask, torch.tensor(0.0)) for key in ("rewards", "values")}
    found, expected = estimate(name, batch), estimate(name, batch, **clean)
    same(found, expected, 0.0)
    assert all(x is None or x.isfinite().all() for x in found)


@pytest.mark.parametrize("name", OF_GROUPS)
def test_a_group_does_not_see_another(name):
    batch = random_batch(6)
    others = batch["groups"] != 7
    rewards = batch["rewards"].clone()
    rewards[others] *= 5.0
    advantages, changed = estimate(name, batch)[0], estimate(name, batch, rewards=rewards)[0]
    close(changed[~others], advantages[~others], 0.0)
    assert not torch.equal(changed[others], advantages[others])


# Equivalences


@pytest.mark.parametrize("gap", [0.25, -3.0])
def test_rloo_of_two_responses_is_plus_and_minus_their_difference(gap):
    advantages = estimate("rloo", batch_of([[0.0, 1.0 + gap], [1.0, 0.0]]))[0]
    close(advantages, [[gap, gap], [-gap, -gap]])


def test_rloo_is_the_centred_score_times_n_over_n_minus_1():
    batch = random_batch(7)
    sizes = (batch["groups"][:, None] == batch["groups"]).sum(1)
    factor = sizes / (sizes - 1).clamp(min=1)
    close(estimate("rloo", batch)[0], estimate("grpo_no_std", batch)[0] * factor[:, None])


def test_reinforce_pp_is_gae_without_discount_lambda_or_value():
    batch = random_batch(8, gamma=1.0)
    values = torch.zeros_like(batch["values"])
    close(estimate("reinforce_pp", batch)[0], estimate("gae", batch, values=values, lam=1.0)[0])


def test_decoupled_gae_with_equal_lambdas_is_gae():
    batch = random_batch(9)
    same(estimate("decoupled_gae", batch, critic_lam=0.8), estimate("gae", batch), 0.0)
    assert not torch.equal(estimate("decoupled_gae", batch)[1], estimate("gae", batch)[1])


def test_length_adaptive_gae_of_responses_of_one_length_is_decoupled_gae():
    batch = random_batch(10)
    batch["response_mask"] = torch.arange(14).expand(12, 14) < 8
    batch |= {key: batch[key].nan_to_num(0.3) for key in ("rewards", "values")}
    lam = 1 - 1 / (0.3 * 8)
    same(estimate("length_adaptive_gae", batch), estimate("decoupled_gae", batch, lam=lam), 1e-6)


def test_opo_of_responses_of_one_length_is_grpo_without_deviation():
    batch = random_batch(11)
    batch["response_mask"] = torch.arange(14).expand(12, 14) < 8
    batch["rewards"] = batch["rewards"].nan_to_num(0.3)
    same(estimate("opo", batch), estimate("grpo_no_std", batch))


def test_remax_with_baselines_of_0_is_reinforce_pp():
    batch = random_batch(12)
    expected = estimate("reinforce_pp", batch)
    same(estimate("remax", batch, baselines=torch.zeros(12)), expected, 0.0)
    same(estimate("remax", batch, baselines=None), expected, 0.0)
