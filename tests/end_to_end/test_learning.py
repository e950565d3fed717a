"""PPO learns: with a score that counts a letter, a tiny policy writes more of it, under either preset."""

from itertools import pairwise

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
    """Runs 40 steps and gives the means of (score, KL) over four windows of ten."""
    folder = tmp_path_factory.mktemp("learning")
    (folder / "reward.py").write_text(REWARD_FILE)
    flags = {
        "reward_fn": f"{folder / 'reward.py'}:count_e", "data_path": write_json(folder / "prompts.json", PROMPTS * 4),
        "train_steps": WINDOWS * STEPS, "num_rollouts": 44, "batch_size": 22, "rollout_batch_size": 44,
        "micro_batch_tokens": 4000, "maxlen_res": 8, "lr": 2e-3, "critic_lr": 3e-3, "warmup_steps": 2,
        "lr_schedule": "constant", "num_eval_prompts": 0,
    }  # fmt: skip

    def run(preset: str, seed: int) -> tuple[list[float], list[float]]:
        penalty = 0.01 if preset == "ppo_max" else None
        out = folder / f"{preset}-{seed}"
        main(run_flags(inputs, out, preset=preset, kl_penalty_weight=penalty, seed=seed, **flags))
        rows = read_metrics(out)
        parts = [rows[k * STEPS : (k + 1) * STEPS] for k in range(WINDOWS)]
        return tuple([sum(row[name] for row in part) / STEPS for part in parts] for name in ("score_mean", "kl_ref"))

    return run


@pytest.mark.parametrize("seed", [1, 2])
def test_the_score_rises_and_the_penalty_holds_the_kl(learn, seed):
    """Over four seeds the smallest rise between two windows was 0.12, and the score went from 0.1 to at least 0.9.

    Vanilla PPO, without a KL penalty, ended with 2.5 to 3.5 times the KL of PPO-max.
    """
    (scores, kept), (others, free) = learn("ppo_max", seed), learn("vanilla", seed)
    for found in (scores, others):
        assert min(after - before for before, after in pairwise(found)) > 0.05, found
        assert found[-1] > 4 * found[0]
    assert free[-1] > 1.5 * kept[-1] > 0.0
