"""Runs with other losses: each flag changes what it names, and the adapted weight of the KL survives a resume."""

import pytest

from tests.helpers.tiny_run import assert_close, read_metrics, remembered, run_flags
from train_ppo import main

ADAPT = {"kl_target": 0.05, "kl_horizon": 20, "kl_penalty_weight": 0.5, "lr": 1e-3, "lr_schedule": "constant"}


@pytest.fixture(scope="module")
def run_with(inputs, tmp_path_factory):
    """Runs with changed flags and gives the metrics of its steps; the same flags run once."""
    return remembered(inputs, tmp_path_factory.mktemp, num_eval_prompts=0, ppo_epochs=2, lr=1e-3)


@pytest.mark.parametrize(
    ("flags", "moved"),
    [
        ({"pg_clip_high": 0.01}, "clip_fraction"),
        ({"dual_clip": 1.01}, "clip_fraction"),
        ({"policy_ratio": "sequence"}, "ratio_mean"),
        ({"policy_ratio": "none"}, "policy_loss"),
        ({"loss_average": "sequence"}, "policy_loss"),
        ({"loss_average": "constant"}, "policy_loss"),
        ({"use_length_norm": True}, "return_mean"),
        ({"overlong_buffer": 12, "overlong_penalty": 2.0}, "return_mean"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_each_flag_moves_its_number(run_with, flags, moved):
    rows, baseline = run_with(**flags), run_with()
    assert rows[0][moved] != pytest.approx(baseline[0][moved], rel=1e-3)
    assert rows[0]["score_mean"] == baseline[0]["score_mean"]  # the metric is of raw scores, of the same responses
    assert "kl_coef" not in rows[0]


def test_without_ratio_nothing_is_clipped(run_with):
    assert all(row["clip_fraction"] == 0 for row in run_with(policy_ratio="none"))
    assert any(row["clip_fraction"] > 0 for row in run_with())


def test_the_weight_of_the_kl_adapts_and_survives_a_resume(inputs, tmp_path):
    """It stays while only the critic trains; then each step changes it by the KL of its responses. 8 per step."""
    flags = ADAPT | {"critic_pretrain_steps": 1, "checkpoint_per_step": 1}
    main(run_flags(inputs, tmp_path / "whole", **flags, train_steps=4))
    rows = read_metrics(tmp_path / "whole")
    coef = 0.5
    for row in rows:
        assert row["kl_coef"] == pytest.approx(coef, rel=1e-6)
        if row["lr_policy"]:
            coef *= 1 + max(-0.2, min(0.2, row["kl_ref"] / 0.05 - 1)) * 8 / 20
    assert [row["kl_coef"] for row in rows[:2]] == [0.5, 0.5]
    assert rows[2]["kl_coef"] == pytest.approx(0.46)  # the KL is 0 before the policy's first step
    assert rows[-1]["kl_coef"] > rows[-2]["kl_coef"]  # and above its target later
    main(run_flags(inputs, tmp_path / "parts", **flags, train_steps=2))
    main(run_flags(inputs, tmp_path / "parts", **flags, train_steps=4, resume_with_changes=True))
    assert_close(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("place", [{}, {"kl_in": "loss", "kl_estimator": "k2"}], ids=["reward", "loss"])
def test_the_adapted_weight_is_the_one_that_counts(run_with, place):
    """The second step is that of a run with the first weight, but for its weight."""
    name = "grad_norm_policy" if place else "return_mean"
    flags = {"kl_penalty_weight": 0.5, **place}
    fixed, adapting = run_with(**flags), run_with(**flags, kl_target=1e-4, kl_horizon=8)
    assert adapting[0] == fixed[0] | {"kl_coef": 0.5}
    assert adapting[1]["kl_coef"] == pytest.approx(0.4)
    assert adapting[1]["kl_ref"] == fixed[1]["kl_ref"]
    assert adapting[1][name] != pytest.approx(fixed[1][name], rel=1e-4)
