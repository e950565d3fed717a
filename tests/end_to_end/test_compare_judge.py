"""ppo.compare with a judge, as a user types it: tables, ratings, a server that fails, a run that is killed."""

import json
import subprocess
import sys
import time

import pytest

from ppo.compare import main
from tests.helpers.judging import judging, send
from tests.helpers.tiny_run import HELD_OUT, REPOSITORY, as_argv, clean_environment, policy_folder, refusal


@pytest.fixture
def flags(inputs, tmp_path):
    return {
        "policies": [inputs.policy, inputs.other_policy], "data_path": inputs.prompts, "dtype": "fp32",
        "maxlen_prompt": 80, "maxlen_res": 12, "output": tmp_path / "table.json", "judge_model": "m",
    }  # fmt: skip


def vowels(answer: str) -> float:
    return sum(letter in "aeiou" for letter in answer) / (1 + len(answer))


@pytest.fixture
def server():
    with judging(vowels) as server:
        yield server


def read(flags: dict) -> dict:
    return json.loads(flags["output"].read_text("utf-8"))


def test_three_policies_with_a_judge_and_a_function_that_agree(inputs, flags, server, tmp_path, capsys):
    third = policy_folder(tmp_path / "third", 5)
    flags |= {"policies": [*flags["policies"], third], "reward_fn": f"{inputs.reward_file}:vowels"}
    main(as_argv(flags | {"judge_url": server.url}))
    result, shown = read(flags), capsys.readouterr().out
    answers, judge = result["answers"], result["judge"]
    keys = ("answer", "answer_after", "answer_3")
    assert len(answers) == 3 and all({"prompt", *keys} == row.keys() for row in answers)
    assert [pair["policies"] for pair in judge["pairs"]] == [[0, 1], [0, 2], [1, 2]]
    for pair in judge["pairs"]:
        i, j = pair["policies"]
        first, second = ([vowels(row[keys[k]]) for row in answers] for k in (i, j))
        wins, ties = sum(b > a for a, b in zip(first, second)), sum(b == a for a, b in zip(first, second))
        assert pair["counts"] == {"win": wins, "tie": ties, "lose": 3 - wins - ties}
        assert pair["win_rate"][0] == pytest.approx((wins + ties / 2) / 3)
        assert pair["agreement"]["reward_fn score"] == {
            "prompts": 3 - ties,
            "share": pair["agreement"]["reward_fn score"]["share"],
        }
        assert pair["agreement"]["reward_fn score"]["share"][0] == 1.0
    assert result["ratings"]["judge"] == result["ratings"]["reward_fn score"]
    assert len(result["tables"]) == 2 and result["tables"][0] == result["table"]
    means = [sum(vowels(row[key]) for row in answers) / 3 for key in keys]
    for table, mean in zip(result["tables"], means[1:], strict=True):
        cells = {name: cell[0] for name, cell in table["reward_fn score"].items()}
        assert cells == pytest.approx({"before": means[0], "after": mean, "difference": mean - means[0]})
    assert all(question in row["prompt"] for (question,), row in zip(HELD_OUT, answers, strict=True))
    assert "by judge: win rate" in shown and "by reward_fn score: win rate" in shown and str(third) in shown
    assert flags["output"].with_name("table.judge.jsonl").read_text().count("\n") == len(server.seen)


def test_a_judge_alone_and_a_server_that_fails(flags, server, capfd):
    """The table is there, the error is one line, and the second run asks only what is missing."""
    server.faults += [send(500, '{"error": "<script> \x1b[2J"}')] * 100
    argv = as_argv(flags | {"judge_url": server.url, "judge_retries": 0, "judge_parallel": 1})
    error = refusal(main, argv, capfd)
    assert error.startswith(f"error: --judge_url {server.url}: answered with an error (Error code: 500")
    assert "\x1b" not in error and "judge" not in read(flags) and read(flags)["table"].keys() >= {"kl", "length"}
    server.faults.clear()
    main(argv)
    shown = capfd.readouterr().out
    asked = len(server.seen)
    assert "written to" in shown and "judge m: " in shown and read(flags)["judge"]["pairs"][0]["prompts"] == 3
    main(argv)
    assert len(server.seen) == asked and read(flags)["judge"]["requests"] == 0


def test_a_run_that_is_killed_has_lost_nothing(flags, server, tmp_path):
    """SIGKILL while the fourth request waits."""
    server.faults += [None] * 3 + [lambda handler: time.sleep(60)]
    argv = as_argv(flags | {"judge_url": server.url, "judge_parallel": 1})
    command = [sys.executable, "-m", "ppo.compare", *map(str, argv)]
    environment = clean_environment() | {"DS_ACCELERATOR": "cpu"}
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log) as process,
    ):
        end = time.monotonic() + 240
        while len(server.seen) < 4 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.kill()
    assert len(server.seen) == 4, (tmp_path / "log").read_text()
    assert "table" in read(flags)
    assert (tmp_path / "table.judge.jsonl").read_text().count("\n") == 3
    server.faults.clear()
    server.seen.clear()
    main(argv)
    assert len(server.seen) == 3 and read(flags)["judge"]["cached"] == 3
