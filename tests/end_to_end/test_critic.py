"""python -m ppo.critic: a critic that predicts returns, which train_ppo.py starts from; value normalisation resumed."""

import json
import shutil

import pytest

import ppo.critic
import train_ppo
from tests.helpers.tiny_run import assert_same_run, read_lines, read_metrics, refusal, run_flags, write_json


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A folder of 64 prompts, and 64 held out."""
    folder = tmp_path_factory.mktemp("many_prompts")
    for name, first in (("train", 0), ("valid", 64)):
        write_json(folder / f"{name}.json", [[f"Tell me about number {first + i}."] for i in range(64)])
    return folder


def test_a_critic_that_is_pretrained_offline_starts_a_run(inputs, prompts, tmp_path, capfd):
    flags = {"data_path": prompts, "num_rollouts": 64, "batch_size": 16, "num_eval_prompts": 64, "maxlen_res": 8}
    flags |= {"micro_batch_tokens": 4000, "rollout_batch_size": 32}
    alone = {"critic_pretrain_steps": 12, "save_per_step": 4, "critic_lr": 3e-3, "critic_epochs": 3}
    ppo.critic.main(run_flags(inputs, tmp_path / "critic", **flags | alone, pretrain=True))
    said = capfd.readouterr().out
    rows = read_lines(tmp_path / "critic" / "metrics.jsonl")
    measured = {row["step"]: row["eval_explained_variance"] for row in rows if "eval_explained_variance" in row}
    assert list(measured) == [0, 4, 8, 12]
    for step, value in measured.items():
        assert f"step {step}: held-out explained variance {value:.4f}" in said
    assert measured[12] > 0.2 > measured[0]
    assert all(row["kl_ref"] == 0.0 and "policy_loss" not in row for row in rows[1:])  # the policy never changes
    final = tmp_path / "critic" / "final"
    assert json.loads((final / "config.json").read_text())["value_pretrained"] is True
    assert not (tmp_path / "critic" / "best").exists()

    run = {"critic_model_path": final, "lam": 1.0, "train_steps": 1, "num_eval_prompts": 0}
    reward = {"reward_model_path": inputs.reward}
    for steps in (0, 1):  # --critic_init_scale leaves such a critic alone
        out = tmp_path / f"run_{steps}"
        train_ppo.main(run_flags(inputs, out, **flags | run | reward, critic_pretrain_steps=steps))
        assert read_metrics(out)[0]["explained_variance"] == pytest.approx(measured[12], abs=0.2)
    line = refusal(train_ppo.main, run_flags(inputs, tmp_path / "other", **flags | run), capfd)
    assert "is a critic" in line and "--reward_model_path" in line


def test_the_target_ends_the_training(inputs, tmp_path):
    flags = {"critic_pretrain_steps": 50, "critic_lr": 1e-2, "target_explained_variance": 1e-6, "pretrain": True}
    ppo.critic.main(run_flags(inputs, tmp_path / "a", **flags, critic_epochs=4))
    rows = read_metrics(tmp_path / "a")
    measured = [row["eval_explained_variance"] for row in rows]
    assert len(rows) < 51 and all(value < 1e-6 for value in measured[:-1]) and measured[-1] >= 1e-6
    assert (tmp_path / "a" / "final" / "config.json").exists()


def test_flags_that_do_not_fit(inputs, tmp_path, capfd):
    for changes, expected in (
        ({"pretrain": None}, "--pretrain is missing"),
        ({"num_eval_prompts": 0}, "--num_eval_prompts 0"),
        ({"advantage_estimator": "reinforce_pp"}, "reinforce_pp has no critic"),
        ({"critic_pretrain_steps": 0}, "--critic_pretrain_steps 0: pass a number at least 1"),
    ):
        flags = {"pretrain": True, "critic_pretrain_steps": 2} | changes
        assert expected in refusal(ppo.critic.main, run_flags(inputs, tmp_path / "x", **flags), capfd)


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (ppo.critic.main, {"pretrain": True, "critic_pretrain_steps": 4, "value_norm": "popart"}),
        (train_ppo.main, {"train_steps": 3, "critic_pretrain_steps": 1, "value_norm": "popart"}),
        (train_ppo.main, {"train_steps": 4, "value_norm": "running", "critic_updates_per_policy_update": 2}),
    ],
)
def test_a_resumed_run_has_the_same_numbers(inputs, tmp_path, capfd, main, flags):
    flags |= {"checkpoint_per_step": 2, "keep_checkpoints": 3}
    main(run_flags(inputs, tmp_path / "whole", **flags))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_4")
    shutil.rmtree(tmp_path / "resumed" / "final")
    capfd.readouterr()
    main(run_flags(inputs, tmp_path / "resumed", **flags))
    assert "step_2" in capfd.readouterr().out  # the checkpoint that it resumes from
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    state = json.loads((tmp_path / "whole" / "checkpoints" / "step_2" / "state.json").read_text())
    assert state["value_moments"]["count"] > 0
    assert len(read_metrics(tmp_path / "whole")) == 4 + (main is ppo.critic.main)
