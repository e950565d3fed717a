"""ppo.overoptimisation: fit, parting point and choice, on made data whose answers are worked out by hand."""

import json
import math

import pytest
import torch

from ppo.compare import main
from ppo.kept_policies import Kept
from ppo.overoptimisation import finite, overoptimisation, render
from ppo.overoptimisation_fit import (
    distance,
    fit,
    interval,
    parting,
    peak,
    resampled_mean,
    simultaneous,
    standardised,
    to_take,
)  # fmt: skip
from ppo.overoptimisation_flags import CheckpointsConfig, read_flags
from ppo.overoptimisation_plot import draw_overoptimisation
from tests.helpers.tiny_run import refusal
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


def test_flat_held_out_scores_part_in_few_runs():
    """Each of 12 policies is compared with the best by chance: by plain 95 % intervals half of such runs part."""
    proxy, parted = standardised(rows(*range(12)), 0), 0
    for seed in range(40):
        heldout = torch.randn(12, 64, generator=torch.Generator().manual_seed(seed))
        parted += parting(proxy, standardised(heldout, seed), [*range(12)]) is not None
    assert parted <= 3  # at most 2.5 % expected: 1


def test_intervals_of_all_pairs_together():
    """Six values: z = 2.638, the normal quantile of 1 - 0.025 / 6. Deviation of -1, 0 and 1: 1."""
    assert simultaneous(torch.tensor([5.0, -1.0, 0.0, 1.0]), 6) == pytest.approx([5.0, 5 - 2.638, 5 + 2.638], abs=1e-3)


def test_a_peak_at_infinity_in_part_of_the_resamples():
    """3 % of the resamples are still rising: the upper limit is infinity, which JSON has as null."""
    peaks = torch.full((2001,), 2.0)
    peaks[-60:] = math.inf
    assert interval(peaks) == [2.0, 2.0, math.inf]
    report = {"fit": [interval(peaks), math.nan], "name": "nan", "count": 3, "parting": None}
    assert finite(report) == {"fit": [[2.0, 2.0, None], None], "name": "nan", "count": 3, "parting": None}


def test_the_smallest_kl_of_those_that_are_not_measurably_worse_is_taken():
    heldout = standardised(torch.stack([*rows(0, 1, 2), 2.01 + NOISE.roll(1), 1 + NOISE]), 0)
    d = constant(0, 1, 2, 3, 4)
    assert to_take(heldout, d) == (2, 3)  # 3 is highest, by 0.01; 2 has the smaller KL


def test_held_out_scores_have_names_of_their_own():
    config = CheckpointsConfig(checkpoints="run", heldout_reward_model_path=["proxy", "kl", "r"])
    assert config.heldout_reward_model_path == ["./proxy", "./kl", "r"]
    for flags in ({"heldout_reward_model_path": ["r", "x/../r/"]}, {"heldout_reward_fn": ["f.py:f", "./f.py:f"]}):
        with pytest.raises(UserError, match=f"--{min(flags)} contains .* twice"):
            CheckpointsConfig(checkpoints="run", **flags)
    same = {"heldout_reward_fn": ["./f.py:f"], "reward_fn": ["x/../f.py:f"]}
    with pytest.raises(UserError, match=r"--heldout_reward_fn ./f\.py:f: the run was trained on it"):
        CheckpointsConfig(checkpoints="run", **same)
    assert CheckpointsConfig(checkpoints="run", **same | {"reward_fn": ["f.py:g"]})


@pytest.fixture
def run(tmp_path):
    """Makes a folder with the config.json of a run; returns its flags, as read with more words."""

    def read(saved: dict, *words: str) -> CheckpointsConfig:
        (tmp_path / "config.json").write_text(json.dumps({"policy_model_path": "p"} | saved))
        return read_flags(["--checkpoints", str(tmp_path), "--heldout_reward_fn", "h.py:h", *words])[0]

    return read


def test_flags_are_checked_with_those_of_the_run(run, tmp_path):
    """Each is wrong without the run's: maxlen_prompt has a default of 2048, and there is no reward model."""
    saved = {"reward_model_path": ["a", "b"], "maxlen_prompt": 8192, "temperature": 0.5}
    words = ["--maxlen_res", "3000", "--reward_ensemble", "min", "--reward_template", "moss_en", "moss_zh"]
    config = run(saved, *words)
    assert (config.maxlen_prompt, config.maxlen_res, config.temperature) == (8192, 3000, 0.5)
    assert config.reward_ensemble == "min" and len(config.reward_template) == 2
    (tmp_path / "flags.yaml").write_text("temperature: 0.7\nnum_prompts: 9")
    config = run(saved, "--config", str(tmp_path / "flags.yaml"))
    assert (config.temperature, config.num_prompts, config.reward_paths) == (0.7, 9, ["a", "b"])
    for words, error in {"--maxlen_res 9000": "maxlen_res", "--num_prompts 1": "--num_prompts 1"}.items():
        with pytest.raises(UserError, match=error):
            run(saved, *words.split())
    with pytest.raises(UserError, match=r"x\.PNG is for the JSON file"):
        run(saved, "--output", "x.PNG")


def test_weights_of_the_runs_functions(run):
    saved = {"reward_fn": ["f.py:f", "f.py:g"], "reward_fn_weights": [0.5, 2.0]}
    with pytest.raises(UserError, match=r"--reward_fn f\.py:f f\.py:g --reward_fn_weights 0\.5 2\.0; pass it"):
        run(saved)
    assert run(saved, "--reward_fn", "./f.py:f", "f.py:g").reward_fn_weights == [0.5, 2.0]
    words = ["--reward_fn", "f.py:f", "moved.py:g"]
    with pytest.raises(UserError, match="pass --reward_fn_weights as well"):
        run(saved, *words)
    assert run(saved, *words, "--reward_fn_weights", "1", "3").reward_fn_weights == [1.0, 3.0]
    assert run(saved, "--reward_model_path", "r").reward_fn_weights == []


def test_checkpoints_in_a_file_of_flags(tmp_path, capfd):
    file = tmp_path / "flags.yaml"
    file.write_text(f"checkpoints: {tmp_path}\nheldout_reward_fn: h.py:h")
    assert f"--checkpoints {tmp_path}: no config.json there" in refusal(main, ["--config", str(file)], capfd)
    with pytest.raises(SystemExit):
        main(["--config", str(file), "--debug"])
    assert "Traceback" in capfd.readouterr().err
    file.write_text("data_path: x")
    assert "--policies" in refusal(main, [f"--config={file}"], capfd)


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
