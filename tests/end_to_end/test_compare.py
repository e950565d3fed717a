"""ppo.compare on two tiny policies, and PPO with several reward models: numbers worked again from the answers."""

import json
from statistics import mean

import pytest
import torch

from ppo.compare import main
from reward.model import load_scalar_model
from reward.scoring.ensemble import Encoding, score_dialogues
from tests.helpers.tiny_run import (
    HELD_OUT,
    as_argv,
    read_lines,
    read_metrics,
    refusal,
    run_flags,
    tiny_reward_model,
)  # fmt: skip
from train_ppo import main as train_ppo
from utils.tokenizer import load_tokenizer


@pytest.fixture
def compare(inputs, tmp_path):
    """Compares the policy with another one; returns what the JSON file holds."""

    def run(after, **changes) -> dict:
        flags = {
            "policies": [inputs.policy, after], "data_path": inputs.prompts, "reward_model_path": inputs.reward,
            "reward_fn": f"{inputs.reward_file}:vowels", "output": tmp_path / "table.json", "dtype": "fp32",
            "maxlen_prompt": 80, "maxlen_res": 12,
        } | changes  # fmt: skip
        main(as_argv(flags))
        return json.loads((tmp_path / "table.json").read_text("utf-8"))

    return run


def vowels(answer: str) -> float:
    return sum(letter in "aeiou" for letter in answer) / (1 + len(answer))


def test_two_policies(inputs, compare, capsys):
    result = compare(inputs.other_policy)
    table, answers = result["table"], result["answers"]
    assert [row["prompt"] for row in answers] == [question for (question,) in HELD_OUT]
    before, after = (mean(vowels(row[key]) for row in answers) for key in ("answer", "answer_after"))
    found = {name: cells[0] for name, cells in table["reward_fn score"].items()}
    assert found == pytest.approx({"before": before, "after": after, "difference": after - before})
    assert table["kl"]["after"][0] > 1.0  # two policies that have nothing in common
    assert all(low <= estimate <= high for cells in table.values() for estimate, low, high in cells.values())
    shown = capsys.readouterr().out
    assert "compared on the held-out data" in shown and "3 prompts" in shown
    assert all(f"prompt: {question}" in shown for (question,) in HELD_OUT)


def test_a_policy_and_itself(inputs, compare):
    result = compare(inputs.policy, rollout_batch_size=2)
    for name, cells in result["table"].items():
        assert cells.get("difference", [0.0] * 3) == [0.0] * 3, name
    assert result["table"]["kl"]["after"] == [0.0] * 3
    assert all(row["answer"] == row["answer_after"] for row in result["answers"])


def test_a_reward_model_is_no_policy(inputs, capfd):
    flags = {
        "policies": [inputs.policy, inputs.reward],
        "data_path": inputs.prompts,
        "reward_model_path": inputs.reward,
    }
    assert f"--policies {inputs.reward} is a reward model or critic" in refusal(main, as_argv(flags), capfd)


def test_cut_responses_and_data_without_a_valid_file(inputs, compare, capsys):
    """Of responses of at most one token: the empty ones are an end token alone, the others were cut behind it."""
    train = inputs.prompts / "train.json"
    result = compare(inputs.policy, maxlen_res=1, data_path=train)
    ended = mean(row["answer"] == "" for row in result["answers"])
    assert 0 < ended < 1 and result["table"]["ended by itself"]["after"][0] == pytest.approx(ended)
    assert "held-out" not in capsys.readouterr().out.split("compared on")[1].splitlines()[0]
    assert len(result["answers"]) == len(json.loads(train.read_text("utf-8")))


def test_three_reward_models_one_with_another_tokenizer(inputs, tmp_path, capsys):
    same, other = (tiny_reward_model(tmp_path / f"reward{vocab}", vocab) for vocab in (400, 370))
    flags = {"reward_ensemble": "mean_minus_std", "ensemble_std_coef": 0.5, "offload_frozen": True}
    train_ppo(run_flags(inputs, tmp_path / "run", reward_model_path=[inputs.reward, same, other], **flags))
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 2
    for row, prefix in [(row, prefix) for row in rows for prefix in ("", "eval_")]:
        means = [row[f"{prefix}score_mean_{i}"] for i in (1, 2, 3)]
        assert len(set(means)) == 3 and row[f"{prefix}score_disagreement"] > 0.01
        expected = sum(means) / 3 - 0.5 * row[f"{prefix}score_disagreement"]
        assert row[f"{prefix}score_mean"] == pytest.approx(expected, abs=1e-5)
        assert row[f"{prefix}reward_truncated_fraction"] == 0.0  # of the one that encodes answers anew

    train_ppo(run_flags(inputs, tmp_path / "alone", reward_model_path=other))
    assert f"{other} has another tokenizer or template (moss_en) than the policy" in capsys.readouterr().out
    model = load_scalar_model(str(other), torch.float32, torch.device("cpu"))
    rows = [row for row in read_lines(tmp_path / "alone" / "samples.jsonl") if row.get("held_out")]
    pairs = [(row["prompt"].removeprefix("<s>Human:").removesuffix("</s>Assistant:"), row["answer"]) for row in rows]
    texts = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    scores, _ = score_dialogues(model, Encoding(load_tokenizer(str(other)), "moss_en", None), texts, 1000)
    assert len(rows) == 6 and [row["score"] for row in rows] == pytest.approx(scores, abs=1e-5)
