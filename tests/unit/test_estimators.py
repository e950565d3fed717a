"""Advantage estimators: numbers worked by hand, loops in Python on random input, empty responses."""

import pytest
import torch

from tests.helpers.estimators import ALL, NAN, OF_GROUPS, WITHOUT_CRITIC, batch_of, close, estimate, random_batch
from tests.helpers.plain_estimators import plain, rows_of

# Numbers worked by hand


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rloo", [-3.0, -1.5, 4.5]),
        ("grpo", [-0.7559, -0.3780, 1.1339]),  # the sample deviation of 1, 2, 6 is sqrt(7)
        ("grpo_no_std", [-2.0, -1.0, 3.0]),
        ("reinforce_pp_baseline", [-2.0, -1.0, 3.0]),
    ],
)
def test_a_group_with_scores_1_2_and_6(name, expected):
    batch = batch_of([[0.0, 1.0, NAN], [2.0, NAN, NAN], [3.0, 1.0, 2.0]], [[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    advantages, returns = estimate(name, batch)
    a, b, c = expected
    close(advantages, [[a, a, 0.0], [b, 0.0, 0.0], [c, c, c]], 1e-4)
    assert returns is None and advantages.dtype == torch.float32


def test_opo_weighs_the_scores_of_a_group_by_length():
    batch = batch_of([[0.0, 1.0, NAN], [2.0, NAN, NAN], [0.0, 0.0, 6.0]], [[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    b = (2 * 1 + 1 * 2 + 3 * 6) / 6  # 22 / 6
    advantages = estimate("opo", batch)[0]
    close(advantages, [[1 - b, 1 - b, 0.0], [2 - b, 0.0, 0.0], [6 - b, 6 - b, 6 - b]])


def test_reinforce_pp_sums_the_discounted_rewards_to_go():
    batch = batch_of([[-1.0, 0.0, 4.0]], gamma=0.5)
    close(estimate("reinforce_pp", batch)[0], [[0.0, 2.0, 4.0]])


def test_remax_subtracts_the_greedy_score():
    batch = batch_of([[-1.0, 0.0, 4.0], [1.0, 1.0, 0.0]], gamma=1.0, baselines=torch.tensor([2.5, -1.0]))
    close(estimate("remax", batch)[0], [[0.5, 1.5, 1.5], [3.0, 2.0, 1.0]])


def test_gae_of_four_tokens():
    batch = batch_of([[0.0, 0.0, 1.0, 0.0]], gamma=0.5, lam=0.0)
    batch["values"] = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    advantages, returns = estimate("gae", batch)
    close(advantages, [[0.5, 0.0, 0.5, -3.0]])
    close(returns, [[0.5, 1.0, 2.5, 0.0]])


def test_decoupled_gae_learns_the_whole_return_while_the_policy_sees_one_step():
    batch = batch_of([[0.0, 0.0, 4.0]], gamma=1.0, lam=0.0, critic_lam=1.0)
    batch["values"] = torch.tensor([[1.0, 2.0, 3.0]])
    advantages, returns = estimate("decoupled_gae", batch)
    close(advantages, [[1.0, 1.0, 1.0]])  # one-step errors: 2 - 1, 3 - 2, 4 - 3
    close(returns, [[4.0, 4.0, 4.0]])


@pytest.mark.parametrize(("length", "lam"), [(40, 0.5), (400, 0.95), (20, 0.0), (5, 0.0)])
def test_lambda_of_length_adaptive_gae(length, lam):
    """A score of 1 on the last token and V = 0: the token before it has the advantage λ, the one before that λ²."""
    rewards = [0.0] * (length - 1) + [1.0]
    advantages, returns = estimate("length_adaptive_gae", batch_of([rewards]))
    close(advantages[0, -3:], [lam**2, lam, 1.0])
    close(returns, [[1.0] * length])


# Against loops in Python


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ALL)
def test_against_loops_in_python(name, seed):
    batch = random_batch(seed)
    mask = batch["response_mask"]
    advantages, returns = estimate(name, batch)
    rows = rows_of(batch["rewards"], batch["values"], mask)
    others = {key: batch[key] for key in ("gamma", "lam", "critic_lam", "length_alpha")}
    expected = plain(name, rows, batch["groups"].tolist(), baselines=batch["baselines"].tolist(), **others)
    for found, rows in zip((advantages, returns), expected, strict=True):
        if rows is None:
            assert found is None
            continue
        assert found.shape == mask.shape and found.dtype == torch.float32
        assert not found[~mask].any()
        close(found[mask], torch.tensor([x for row in rows for x in row]))


# Edges


@pytest.mark.parametrize("name", OF_GROUPS)
@pytest.mark.parametrize("score", [0.0, 0.1, -7.3])
def test_uniform_groups_have_advantages_of_0(name, score):
    batch = batch_of([[0.0, score]] * 3 + [[score, 0.0]] * 2 + [[0.5, 3.0]], groups=[0, 0, 0, 0, 0, 1])
    close(estimate(name, batch)[0], torch.zeros(6, 2), 1e-6)


@pytest.mark.parametrize("name", ALL)
def test_empty_responses_have_advantages_of_0(name):
    batch = batch_of([[NAN, 1.0]] * 4, [[0, 0]] * 4, [0, 0, 0, 1], baselines=torch.ones(4))
    found = estimate(name, batch)
    assert all(x is None or torch.equal(x, torch.zeros(4, 2)) for x in found)
    assert (found[1] is None) == (name in WITHOUT_CRITIC)


def test_an_empty_response_counts_with_score_0_in_its_group():
    batch = batch_of([[NAN, 9.0], [0.0, 2.0]], [[0, 0], [1, 1]])
    close(estimate("grpo_no_std", batch)[0], [[0.0, 0.0], [1.0, 1.0]])


@pytest.mark.parametrize("name", ALL)
def test_arguments_stay_as_they_were(name):
    batch = random_batch(13)
    before = {key: x.clone() for key, x in batch.items() if torch.is_tensor(x)}
    estimate(name, batch)
    for key, x in before.items():
        torch.testing.assert_close(batch[key], x, rtol=0, atol=0, equal_nan=True)
