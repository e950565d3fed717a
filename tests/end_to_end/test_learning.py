"""PPO learns: with a score that counts a letter, a tiny policy writes more of it, under either preset."""

from itertools import pairwise
from pathlib import Path

import pytest

from tests.helpers.tiny_run import PROMPTS, read_metrics, run_flags, write_json
from train_ppo import main

WINDOWS, STEPS = 4, 10
REWARD_FILE = """
def count_e(prompts, answers):
    return [answer.count("e") / 4 for answer in answers]
"""


@pytest.fixture(scope="module")
def learn(inputs, tmp_path_factory):
    """Runs 40 steps and gives the means of (score, KL) over four windows of ten; each setting runs once."""
    folder = tmp_path_factory.mktemp("learning")
    data = write_json(folder / "prompts.json", PROMPTS * 4)
    (folder / "reward.py").write_text(REWARD_FILE)
    known = {}

    def run(preset: str, seed: int) -> tuple[list[float], list[float]]:
        if (preset, seed) not in known:
            known[preset, seed] = windows(folder / f"{preset}-{seed}", preset, seed)
        return known[preset, seed]

    def windows(out: Path, preset: str, seed: int) -> tuple[list[float], list[float]]:
        flags = {
            "preset": preset, "kl_penalty_weight": 0.01 if preset == "ppo_max" else None, "seed": seed,
            "reward_fn": f"{folder / 'reward.py'}:count_e", "data_path": data, "num_eval_prompts": 0,
            "train_steps": WINDOWS * STEPS, "num_rollouts": 44, "batch_size": 22, "rollout_batch_size": 44,
            "micro_batch_tokens": 4000, "maxlen_res": 8, "lr": 2e-3, "critic_lr": 3e-3, "warmup_steps": 2,
            "lr_schedule": "constant",
        }  # fmt: skip
        main(run_flags(inputs, out, **flags))
        rows = read_metrics(out)
        parts = [rows[k * STEPS : (k + 1) * STEPS] for k in range(WINDOWS)]
        return tuple([sum(row[name] for row in part) / STEPS for part in parts] for name in ("score_mean", "kl_ref"))

    return run


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("preset", ["ppo_max", "vanilla"])
def test_the_score_rises_from_window_to_window(learn, preset, seed):
    """Over four seeds the smallest rise between two windows was 0.12, and the score went from 0.1 to at least 0.9."""
    scores, _ = learn(preset, seed)
    rises = [after - before for before, after in pairwise(scores)]
    assert min(rises) > 0.05, scores
    assert scores[-1] > 4 * scores[0]


@pytest.mark.parametrize("seed", [1, 2])
def test_without_its_penalty_the_kl_runs_further_away(learn, seed):
    """Over four seeds vanilla's last window had 2.5 to 3.5 times the KL of PPO-max."""
    (_, kept), (_, free) = learn("ppo_max", seed), learn("vanilla", seed)
    assert free[-1] > 1.5 * kept[-1] > 0.0
