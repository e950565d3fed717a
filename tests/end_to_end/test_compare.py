"""ppo.compare on two tiny policies: the numbers in its JSON, worked again from the answers beside them."""

import json
from statistics import mean

import pytest

from ppo.compare import main
from tests.helpers.tiny_run import HELD_OUT, Inputs


def compare(inputs: Inputs, before, after, output, *more) -> dict:
    flags = ["--dtype", "fp32", "--maxlen_prompt", "80", "--maxlen_res", "12", "--data_path", str(inputs.prompts)]
    flags += ["--reward_fn", f"{inputs.reward_file}:vowels", "--reward_model_path", str(inputs.reward)]
    main(["--policies", str(before), str(after), "--output", str(output), *flags, *more])
    return json.loads(output.read_text("utf-8"))


def vowels(answer: str) -> float:
    return sum(letter in "aeiou" for letter in answer) / (1 + len(answer))


def test_two_policies(inputs, tmp_path, capsys):
    result = compare(inputs, inputs.policy, inputs.other_policy, tmp_path / "table.json")
    table, answers = result["table"], result["answers"]
    assert [row["prompt"] for row in answers] == [question for (question,) in HELD_OUT]
    before, after = (mean(vowels(row[key]) for row in answers) for key in ("answer", "answer_after"))
    score = table["reward_fn score"]
    assert score["before"][0] == pytest.approx(before)
    assert score["after"][0] == pytest.approx(after)
    assert score["difference"][0] == pytest.approx(after - before)
    assert table["kl"]["after"][0] > 1.0  # two policies that have nothing in common
    for cells in table.values():
        for estimate, low, high in cells.values():
            assert low <= estimate <= high
    shown = capsys.readouterr().out
    assert "compared on the held-out data" in shown and "3 prompts" in shown
    assert all(f"prompt: {question}" in shown for (question,) in HELD_OUT)


def test_a_policy_and_itself(inputs, tmp_path):
    result = compare(inputs, inputs.policy, inputs.policy, tmp_path / "table.json", "--rollout_batch_size", "2")
    for name, cells in result["table"].items():
        assert cells.get("difference", [0.0, 0.0, 0.0]) == [0.0, 0.0, 0.0], name
    assert result["table"]["kl"]["after"] == [0.0, 0.0, 0.0]
    assert all(row["answer"] == row["answer_after"] for row in result["answers"])


def test_the_table_has_the_share_of_responses_that_were_cut(inputs, tmp_path):
    """Of responses of at most one token: the empty ones are an end token alone, the others were cut behind it."""
    table = compare(inputs, inputs.policy, inputs.policy, tmp_path / "one.json", "--maxlen_res", "1")
    cut = mean(row["answer"] != "" for row in table["answers"])
    assert 0 < cut < 1 and table["table"]["cut at --maxlen_res"]["after"][0] == pytest.approx(cut)


def test_without_a_valid_file_nothing_is_called_held_out(inputs, tmp_path, capsys):
    train = inputs.prompts / "train.json"
    result = compare(inputs, inputs.policy, inputs.policy, tmp_path / "table.json", "--data_path", str(train))
    assert "compared on the whole data, as there is no *valid* file" in capsys.readouterr().out
    assert len(result["answers"]) == len(json.loads(train.read_text("utf-8")))
