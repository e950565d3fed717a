"""ppo.overoptimisation: fit, parting point and choice, on made data whose answers are worked out by hand."""

import math

import pytest
import torch

from ppo.kept_policies import Kept
from ppo.overoptimisation import overoptimisation, render
from ppo.overoptimisation_fit import distance, fit, interval, parting, peak, resampled_mean, standardised, to_take
from ppo.overoptimisation_flags import CheckpointsConfig
from ppo.overoptimisation_plot import draw_overoptimisation
from utils.errors import UserError

PROMPTS = 40
NOISE = torch.tensor([1.0, -1.0] * (PROMPTS // 2))  # mean 0, so that means are exact


def rows(*means: float) -> torch.Tensor:
    """Scores with these means, [policies, prompts]; the noise is that of the prompt, and cancels in differences."""
    return torch.stack([mean + NOISE for mean in means])


def constant(*values: float) -> torch.Tensor:
    """A value per policy in each of three resamples."""
    return torch.tensor(values, dtype=torch.float64)[:, None].expand(-1, 3)


def test_fit_recovers_the_coefficients_of_made_data():
    """alpha 2, beta 0.5: R(d) = d (2 - 0.5 log d), largest at exp(2 / 0.5 - 1) = e^3, where it is 0.5 e^3."""
    distances = [0.0, 0.5, 1.0, 4.0, 20.0]
    gain = [0.0, *(d * (2 - 0.5 * math.log(d)) for d in distances[1:])]
    alpha, beta = fit(constant(*distances), constant(*gain))
    assert alpha.tolist() == pytest.approx([2.0] * 3) and beta.tolist() == pytest.approx([0.5] * 3)
    assert peak(alpha, beta)[0] == pytest.approx(math.e**3)
    assert peak(alpha, -beta)[0] == math.inf  # still rising
    assert fit(constant(0.0, 1.0), constant(0.0, 1.0))[0].isnan().all()  # one distance: two unknowns


def test_fit_is_least_squares():
    """R = 1 and 3 at d = 1, where R(1) = alpha: the mean, 2. R = 2 e at d = e, where R(e) = e (alpha - beta)."""
    alpha, beta = fit(constant(1.0, math.e, 1.0), constant(1.0, 2 * math.e, 3.0))
    assert (float(alpha[0]), float(beta[0])) == pytest.approx((2.0, 0.0), abs=1e-9)


def test_gains_are_in_the_first_policys_standard_deviations():
    gains = standardised(torch.tensor([[1.0, 3.0, 5.0], [7.0, 9.0, 5.0]]), seed=0)  # means 3 and 7, deviation 2
    assert gains[:, 0].tolist() == [0.0, 2.0]
    assert distance(torch.tensor([[0.0, 0.0], [8.0, 10.0], [-2.0, 1.0]]), 0)[:, 0].tolist() == [0.0, 3.0, 0.0]


def test_resamples_are_of_prompts_and_the_same_for_all_policies():
    x = torch.stack([torch.arange(10.0), torch.arange(10.0) + 5])
    means = resampled_mean(x, seed=1)
    assert means[:, 0].tolist() == [4.5, 9.5] and means[0].std() > 0.5  # 2.87 / sqrt(10) = 0.91
    assert torch.allclose(means[1] - means[0], torch.full_like(means[0], 5.0))
    estimate, low, high = interval(means[0])
    assert estimate == 4.5 and low == pytest.approx(4.5 - 1.96 * 0.908, abs=0.15)
    assert high == pytest.approx(4.5 + 1.96 * 0.908, abs=0.15)


def test_they_part_where_the_held_out_score_falls_below_its_highest():
    proxy, heldout = (standardised(rows(*x), 0) for x in ((0, 1, 2, 3, 4), (0, 2, 3, 1, -5)))
    found = parting(proxy, heldout, [0, 1, 2, 3, 4])
    deviation = float(NOISE.std())
    assert (found["policy"], found["since"]) == (3, 2)
    assert found["proxy"] == pytest.approx([1 / deviation] * 3) and found["heldout"] == pytest.approx(
        [-2 / deviation] * 3
    )
    assert parting(proxy, heldout, [0, 1, 2]) is None  # both rise
    assert parting(-proxy, heldout, [0, 1, 2, 3, 4]) is None  # both fall: the run failed, it is not over-optimised


def test_a_fall_within_the_noise_is_no_parting():
    own = torch.randn(2, PROMPTS, generator=torch.Generator().manual_seed(3))  # noise of each answer
    heldout = standardised(torch.stack([own[0], own[1] - own[1].mean() + own[0].mean() - 0.01]), 0)
    assert parting(standardised(rows(0, 1), 0), heldout, [0, 1]) is None


def test_the_smallest_kl_of_those_that_are_not_measurably_worse_is_taken():
    heldout = standardised(torch.stack([*rows(0, 1, 2), 2.01 + NOISE.roll(1), 1 + NOISE]), 0)
    d = constant(0, 1, 2, 3, 4)
    assert to_take(heldout, d) == (2, 3)  # 3 is highest, by 0.01; 2 has the smaller KL


def test_held_out_scores_have_names_of_their_own():
    config = CheckpointsConfig(checkpoints="run", heldout_reward_model_path=["proxy", "kl", "r"])
    assert config.heldout_reward_model_path == ["./proxy", "./kl", "r"]
    for flags in ({"heldout_reward_model_path": ["r", "r"]}, {"heldout_reward_fn": ["f.py:f", "f.py:f"]}):
        with pytest.raises(UserError, match=f"--{min(flags)} contains .* twice"):
            CheckpointsConfig(checkpoints="run", **flags)


def test_report_and_picture():
    """Names are text in the picture and on the terminal; best/, which has no step, is no place to part at."""
    kept = [Kept(f"step {i}", i, "") for i in range(4)] + [Kept("best", None, "")]
    kl = torch.tensor([0.0, 1.0, 4.0, 16.0, 4.0])[:, None].expand(-1, PROMPTS)
    scores = {"proxy": rows(0, 1, 2, 3, 2), "$<b>": rows(0, 1, 2, -1, 2), "other": rows(0, 1, 2, -1, 2)}
    config = CheckpointsConfig(checkpoints="run", heldout_reward_model_path=["$<b>", "other"])
    report = overoptimisation(kept, {"kl": kl, "length": kl}, scores, config)
    assert [one["sqrt_kl"][0] for one in report["policies"]] == [0, 1, 2, 4, 2]
    assert report["parting"]["policy"] == "step 3" and report["parting"]["since"] == "step 2"
    assert report["take"] == "step 2" and report["policies"][4]["step"] is None
    text = render(report)
    assert "they part at step 3: since step 2" in text and "take: step 2" in text and "held out 1: $<b>" in text
    assert draw_overoptimisation(report).startswith(b"\x89PNG")
