"""Runs with other estimators than GAE: without a critic, with groups, with greedy baselines, with dropped groups."""

import pytest

from ppo.advantages import ADVANTAGE_ESTIMATORS
from ppo.estimators import needs_of
from tests.helpers.tiny_run import assert_close, read_lines, read_metrics, refusal, run_flags, run_module
from train_ppo import main

CRITIC = {"value_loss", "explained_variance", "value_mean", "return_mean", "grad_norm_critic", "lr_critic"}
GROUPS = {"num_responses_per_prompt": 4, "num_eval_prompts": 0}
OWN = """
def first_of_group(rewards, response_mask, groups, **others):
    assert set(others) == {"values", "gamma", "lam", "critic_lam", "length_alpha", "baselines"}, others
    return rewards.sum(1, keepdim=True) * response_mask, None

def with_values(rewards, values, response_mask):
    return (rewards - values) * response_mask, rewards * response_mask

def fails(rewards, response_mask):
    return rewards["all"], None

def of_rows(rewards):
    return rewards.sum(1), None

def infinite(rewards):
    return rewards / 0, None

def unknown(rewards, temperature):
    return rewards, None
"""


FAST = ("length_adaptive_gae", "remax", "rloo")  # one of each kind; the others are slow tests
EACH = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in sorted(ADVANTAGE_ESTIMATORS)]


@pytest.mark.parametrize("estimator", EACH)
def test_every_estimator_trains(inputs, tmp_path, estimator):
    """Those without a critic load none and write no metric of one; their reward model is not taken for one."""
    out = tmp_path / "run"
    critic = "values" in needs_of(estimator)
    paths = {} if critic else {"critic_model_path": None, "reward_model_path": inputs.reward}
    main(run_flags(inputs, out, advantage_estimator=estimator, **GROUPS, **paths, checkpoint_per_step=1))
    rows = read_metrics(out)
    assert len(rows) == 2
    assert (rows[1].keys() & CRITIC) == (CRITIC if critic else set())
    assert rows[1]["grad_norm_policy"] > 0
    assert rows[1]["kl_ref"] != 0
    states = [file.name for file in (out / "checkpoints" / "step_2").rglob("*critic*")]
    assert bool(states) == critic
    samples = read_lines(out / "samples.jsonl")
    assert len({row["prompt"] for row in samples if row["step"] == 1}) == 1  # the first four are one group
    assert len({row["answer"] for row in samples if row["step"] == 1}) > 1


def test_without_critic_the_flag_names_the_reward_model(inputs, tmp_path, capfd):
    """--critic_model_path serves as the reward model; with neither, or with critic pre-training, the run is refused."""
    flags = {"advantage_estimator": "rloo", **GROUPS}
    main(run_flags(inputs, tmp_path / "a", **flags))
    main(run_flags(inputs, tmp_path / "b", **flags, critic_model_path=None, reward_model_path=inputs.reward))
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b")
    line = refusal(main, run_flags(inputs, tmp_path / "c", **flags, critic_model_path=None), capfd)
    assert "--critic_model_path is missing" in line
    line = refusal(main, run_flags(inputs, tmp_path / "c", **flags | {"critic_pretrain_steps": 2}), capfd)
    assert "has no critic" in line


def test_a_stopped_run_goes_on_inside_its_prompts(inputs, tmp_path):
    """A run of two steps, resumed to three, has the numbers of one of three: groups keep their random streams."""
    flags = {"advantage_estimator": "rloo", **GROUPS, "lr_schedule": "constant", "checkpoint_per_step": 1}
    main(run_flags(inputs, tmp_path / "whole", **flags, train_steps=3))
    main(run_flags(inputs, tmp_path / "parts", **flags))
    main(run_flags(inputs, tmp_path / "parts", **flags, train_steps=3, resume_with_changes=True))
    assert_close(tmp_path / "parts", tmp_path / "whole")


def test_the_stream_of_a_response_does_not_depend_on_the_size_of_its_group(inputs, tmp_path):
    """The first two responses to a prompt are the same among two and among four."""
    samples = {}
    for size in (2, 4):
        out = tmp_path / str(size)
        main(run_flags(inputs, out, num_responses_per_prompt=size, num_samples=8, num_eval_prompts=0))
        rows = [row for row in read_lines(out / "samples.jsonl") if row["step"] == 1]
        samples[size] = [row["answer"] for row in rows if row["prompt"] == rows[0]["prompt"]]
    assert samples[4][:2] == samples[2]
    assert len(set(samples[4])) > 1


def test_dropped_groups_are_refilled(inputs, tmp_path):
    """Groups with one score are left out and others are sampled, up to the limit; all are counted."""
    (tmp_path / "scores.py").write_text(
        "def moon(prompts, answers):\n"
        "    return [len(a) if turns[-1]['content'][0] in 'WH' else 1.0 for turns, a in zip(prompts, answers)]\n"
        "def same(prompts, answers):\n    return [1.0] * len(answers)\n"
    )
    flags = {"advantage_estimator": "grpo", **GROUPS, "drop_uniform_groups": True, "num_samples": 100}
    flags |= {"critic_model_path": None, "train_steps": 3}
    main(run_flags(inputs, tmp_path / "a", **flags, reward_fn=f"{tmp_path}/scores.py:moon", max_refills=5))
    rows, samples = read_metrics(tmp_path / "a"), read_lines(tmp_path / "a" / "samples.jsonl")
    sampled = [sum(row["step"] == step for row in samples) for step in (1, 2, 3)]
    assert max(sampled) > 8 <= min(sampled)
    assert all(row["advantage_std"] > 0.5 for row in rows)  # two mixed groups: deviation about 1
    for row, count in zip(rows, sampled, strict=True):
        assert (row["uniform_group_fraction"] > 0) == (count > 8)
    main(run_flags(inputs, tmp_path / "b", **flags, reward_fn=f"{tmp_path}/scores.py:same", max_refills=2))
    rows, samples = read_metrics(tmp_path / "b"), read_lines(tmp_path / "b" / "samples.jsonl")
    assert [sum(row["step"] == step for row in samples) for step in (1, 2, 3)] == [24, 24, 24]  # and two refills
    assert all(row["uniform_group_fraction"] == 1 for row in rows)


def test_an_estimator_from_outside(inputs, tmp_path, capfd):
    """A function of the user's gets what it names; one that names values has a critic; others are refused."""
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    main(run_flags(inputs, tmp_path / "a", advantage_estimator=f"{file}:first_of_group", **GROUPS))
    assert "value_loss" not in read_metrics(tmp_path / "a")[0]
    main(run_flags(inputs, tmp_path / "b", advantage_estimator=f"{file}:with_values"))
    assert "value_loss" in read_metrics(tmp_path / "b")[0]
    line = refusal(main, run_flags(inputs, tmp_path / "c", advantage_estimator=f"{file}:unknown"), capfd)
    assert "has the parameter temperature" in line
    faults = {"fails": "mine.py:10", "of_rows": "of the shape (8, ", "infinite": "not finite"}
    for name, text in faults.items():
        line = refusal(main, run_flags(inputs, tmp_path / name, advantage_estimator=f"{file}:{name}"), capfd)
        assert f"{name}: " in line and text in line, line
    line = refusal(main, run_flags(inputs, tmp_path / "c", advantage_estimator="glo"), capfd)
    assert "use one of gae, decoupled_gae" in line


def test_the_plan_has_no_critic(inputs, capfd):
    """--plan of a critic-free run names none, and needs less memory."""
    totals = {}
    for estimator in ("gae", "rloo"):
        flags = {"advantage_estimator": estimator, **GROUPS, "plan": True, "reward_model_path": inputs.reward}
        capfd.readouterr()
        main(run_flags(inputs, "unused", **flags))
        out = capfd.readouterr().out
        assert ("weights of the critic" in out) == (estimator == "gae")
        totals[estimator] = next(line.split()[-1] for line in out.splitlines() if line.startswith("optimizer of"))
    assert float(totals["rloo"]) <= float(totals["gae"])


@pytest.mark.parametrize("flags", ["--num_rollouts 6", "--advantage_estimator rloo", "--drop_uniform_groups"])
def test_groups_that_do_not_fit(flags):
    """An error names the flag and what to pass."""
    words = "--policy_model_path a --critic_model_path b --data_path c --num_responses_per_prompt"
    size = "4" if "6" in flags else "1"
    done = run_module("train_ppo", *words.split(), size, "--batch_size", "2", *flags.split())
    assert done.returncode == 2
    assert "--num_responses_per_prompt" in done.stderr
    assert "pass" in done.stderr


@pytest.mark.parametrize("flags", [{}, {"drop_uniform_groups": True, "max_refills": 1}])
def test_groups_without_some_scores(inputs, tmp_path, flags):
    """--reward_fn has no score for some responses: their groups are smaller, and the run goes on."""
    reward = f"{inputs.reward_file}:in_parts"
    flags = flags | {"advantage_estimator": "rloo", **GROUPS, "reward_fn": reward, "critic_model_path": None}
    main(run_flags(inputs, tmp_path / "run", **flags, num_samples=100))
    rows = read_metrics(tmp_path / "run")
    assert 0 < max(row["reward_failed_fraction"] for row in rows) < 1
    assert all(row["advantage_std"] > 0 for row in rows)
    scores = [row["score"] for row in read_lines(tmp_path / "run" / "samples.jsonl") if row["step"] == 1]
    assert None in scores
