"""Every trick has a switch, and every switch does what it says in a run."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ppo.run
from tests.helpers.tiny_run import final_weights, read_lines, read_metrics, remembered, run_flags, write_json
from train_ppo import main


@pytest.fixture(scope="module")
def run_with(inputs, tmp_path_factory):
    """Runs with changed flags and gives the metrics of its steps; the same flags run once."""
    return remembered(inputs, tmp_path_factory.mktemp, num_eval_prompts=0)


def all_of(rows: list[dict], name: str) -> list[float]:
    return [row[name] for row in rows]


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({"kl_in": "loss", "kl_estimator": "k2", "kl_penalty_weight": 1}, "grad_norm_policy"),
        ({"kl_in": "loss", "kl_estimator": "k3", "kl_penalty_weight": 1}, "grad_norm_policy"),
        ({"use_entropy_loss": True, "entropy_loss_weight": 1, "entropy_clip": 5.0}, "grad_norm_policy"),
        ({"use_policy_loss_clip": "false", "ppo_epochs": 4, "lr": 1e-3}, "approx_kl"),
        ({"use_advantage_norm": "false"}, "advantage_std"),
        ({"use_advantage_clip": True, "advantage_clip": 0.12}, "advantage_std"),
        ({"use_reward_norm": "false"}, "return_mean"),
        ({"use_reward_scaling": "false", "use_reward_norm": "false"}, "return_mean"),
        ({"use_reward_clip": "false"}, "return_mean"),
        ({"use_critic_loss_clip": "false", "ppo_epochs": 4}, "value_loss"),
        ({"gradient_clip": 0}, "grad_norm_policy"),
        ({"gamma": 0.5}, "return_mean"),
        ({"lam": 0.0}, "return_mean"),
        ({"kl_penalty_weight": 5.0}, "return_mean"),
        ({"vf_loss_weight": 0.1}, "grad_norm_critic"),
        ({"preset": "vanilla"}, "return_mean"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_each_switch_moves_its_number(run_with, changes, moved):
    same = {name: changes[name] for name in ("ppo_epochs", "lr") if name in changes}
    rows, baseline = run_with(**changes), run_with(**same)
    assert all_of(rows, moved) != pytest.approx(all_of(baseline, moved), rel=1e-4)
    assert rows[0]["score_mean"] == baseline[0]["score_mean"]  # the first responses are the same


def test_vanilla_is_all_switches_off(run_with):
    flags = ("use_reward_scaling", "use_reward_norm", "use_reward_clip", "use_critic_loss_clip", "use_advantage_norm")
    by_hand = run_with(**dict.fromkeys(flags, "false"), kl_penalty_weight=0, gradient_clip=0)
    assert run_with(preset="vanilla") == by_hand


def test_evaluation_samples_as_the_paper_does_whatever_training_does(inputs, tmp_path):
    """Trap 6: other sampling flags give other answers in training, and the same ones in the evaluation."""
    evaluated, answers = [], []
    for flags in ({}, {"temperature": 0.5, "topp": 0.5, "repetition_penalty": 1.5}):
        out = tmp_path / f"run{len(answers)}"
        main(run_flags(inputs, out, critic_pretrain_steps=1, train_steps=1, **flags))
        evaluated.append({name: x for name, x in read_metrics(out)[0].items() if name.startswith("eval_")})
        samples = [row for row in read_lines(out / "samples.jsonl") if row["step"] == 1]
        answers.append([[row["answer"] for row in samples if bool(row.get("held_out")) is x] for x in (False, True)])
    assert evaluated[0] == evaluated[1]
    assert answers[0][0] != answers[1][0] and answers[0][1] == answers[1][1]


def test_critic_pretraining_leaves_the_policy_alone(inputs, tmp_path):
    main(run_flags(inputs, tmp_path / "run", critic_pretrain_steps=2, train_steps=1, best_max_kl=0))
    rows = read_metrics(tmp_path / "run")
    assert all_of(rows, "lr_policy") == [0.0, 0.0, 1e-4]
    assert "policy_loss" not in rows[0]
    assert min(all_of(rows, "grad_norm_critic")) > 0
    assert all_of(rows, "kl_ref") == [0.0] * 3  # those of the third were sampled before the policy's first step
    assert all_of(rows[:2], "eval_kl_ref") == [0.0] * 2 and rows[2]["eval_kl_ref"] != 0.0


def test_reward_function_alone_and_with_a_reward_model(inputs, run_with):
    function = f"{inputs.reward_file}:vowels"
    alone, model = run_with(reward_fn=function)[0], run_with()[0]
    both = run_with(reward_fn=function, reward_model_path=inputs.reward)[0]
    assert 0.0 < alone["score_mean"] < 1.0  # a share of letters
    assert both["score_mean"] == pytest.approx(alone["score_mean"] + model["score_mean"], abs=1e-5)
    assert both["reward_vowels"] == pytest.approx(alone["score_mean"]) and both["reward_failed_fraction"] == 0.0


def test_chinese_tags_resize_the_embedding(inputs, tmp_path, capsys):
    out = tmp_path / "run"
    prompts = write_json(tmp_path / "prompts.json", [["你好"], ["今天天气怎么样?"], ["讲一个故事"], ["再见"]] * 3)
    main(run_flags(inputs, out, lang="zh", data_path=prompts))
    assert "resized from 400 to 402" in capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out / "final"), AutoTokenizer.from_pretrained(out / "final")
    assert model.get_input_embeddings().weight.shape == (402, 32)
    assert tokenizer.convert_tokens_to_ids(["<|Human|>", "<|MOSS|>"]) == [400, 401]


def test_best_is_the_policy_that_the_rule_names(inputs, tmp_path, capsys, monkeypatch):
    """Trap 17: the rule is printed, and best/ holds the weights of the step that it picks, not those of a later one.

    Scores and KL of the evaluations are given: the first has the highest score, the third the highest within the limit.
    """
    judged = iter([(4.0, 6.0), (1.0, 1.0), (3.0, 5.0), (2.0, 1.0)])
    measure = ppo.run.evaluate

    def evaluate(*args):
        metrics, rows = measure(*args)
        return metrics | dict(zip(("score_mean", "kl_ref"), next(judged), strict=True)), rows

    def weights(run: str, name: str) -> torch.Tensor:
        return torch.cat([x.flatten() for x in final_weights(tmp_path / run, name).values()])

    flags = {"alarm_kl": 0, "alarm_perplexity": 0}
    main(run_flags(inputs, tmp_path / "three", train_steps=3, **flags))
    monkeypatch.setattr(ppo.run, "evaluate", evaluate)
    main(run_flags(inputs, tmp_path / "four", train_steps=4, best_max_kl=5.8, **flags))
    assert "best/ = highest eval_score_mean with eval_kl_ref up to 5.8 nats" in capsys.readouterr().out
    assert torch.equal(weights("four", "best"), weights("three", "final"))
    assert not torch.equal(weights("four", "best"), weights("four", "final"))
