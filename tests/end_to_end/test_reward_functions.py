"""train_ppo.py and ppo.compare with reward functions that read columns of the data, in parts, with failures."""

import json
import subprocess
import sys
import time

import pytest

from ppo.compare import main as compare
from tests.helpers.tiny_run import (
    PROMPTS,
    REPOSITORY,
    as_argv,
    assert_same_run,
    clean_environment,
    read_lines,
    read_metrics,
    refusal,
    run_flags,
    write_json,
)
from train_ppo import main

# The number of a record is in its prompt as well, so that a function sees whether it got the right record's column.
FUNCTIONS = """
import asyncio, os, signal, time
from concurrent.futures import ThreadPoolExecutor

def own(prompts, answers, number, note=None):
    assert note is not None and len(number) == len(prompts)
    assert [turns[-1]["content"].split()[1] for turns in prompts] == [str(x) for x in number]
    assert all((text is None) == (x % 2 == 1) for text, x in zip(note, number))
    return {"number": [None if x % 5 == 3 else x for x in number], "half": [x / 2 for x in number]}

async def short(prompts, answers, **columns):
    assert set(columns) == {"number", "note"}
    return [-len(answer) for answer in answers]

def never(prompts, answers):
    return [None for _ in answers]

def pool(prompts, answers):
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda answer: time.sleep(99), answers))

async def threads(prompts, answers):
    return await asyncio.to_thread(time.sleep, 99)

async def stopped_once(prompts, answers, number):
    if number[0] >= 20 and not os.path.exists(__file__ + ".stopped"):  # in the evaluation
        open(__file__ + ".stopped", "w").close()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)
    return {"number": [None if x % 5 == 3 else x for x in number]}
"""


@pytest.fixture
def flags(tmp_path) -> dict:
    """Data with columns, and two functions."""
    (tmp_path / "f.py").write_text(FUNCTIONS)
    for name, numbers in (("train", range(11)), ("valid", range(20, 24))):
        rows = [{"prompt": f"Question {i} {PROMPTS[i % 3][0]}", "number": i} for i in numbers]
        for row in rows[::2]:
            row["note"] = "even"
        (tmp_path / "data").mkdir(exist_ok=True)
        write_json(tmp_path / "data" / f"{name}.json", rows)
    functions = [f"{tmp_path}/f.py:own", f"{tmp_path}/f.py:short"]
    return {"data_path": tmp_path / "data", "reward_fn": functions, "reward_fn_weights": [1, 0.5]}


def test_columns_parts_and_failures_in_a_run(inputs, tmp_path, flags):
    out = tmp_path / "run"
    main(run_flags(inputs, out, train_steps=1, num_samples=8, num_eval_prompts=4, **flags))
    (metrics,), samples = read_metrics(out), read_lines(out / "samples.jsonl")
    for prefix, held_out, count in (("", False, 8), ("eval_", True, 4)):
        rows = [row for row in samples if bool(row.get("held_out")) is held_out]
        assert len(rows) == count
        scored = [row for row in rows if row["score"] is not None]
        assert [row for row in rows if int(row["prompt"].split()[1]) % 5 != 3] == scored != rows
        for row in scored:
            number = int(row["prompt"].split()[1])
            expected = [number, number / 2, 1.5 * number, -len(row["answer"])]
            names = ["reward_own_number", "reward_own_half", "reward_own", "reward_short"]
            assert [row[name] for name in names] == expected
            assert row["score"] == pytest.approx(1.5 * number - 0.5 * len(row["answer"]))
        assert metrics[f"{prefix}reward_failed_fraction"] == pytest.approx(1 - len(scored) / count)
        for name in ("score_mean", "reward_own", "reward_own_half", "reward_own_number", "reward_short"):
            mean = sum(row[name.replace("score_mean", "score")] for row in scored) / len(scored)
            assert metrics[prefix + name] == pytest.approx(mean, rel=1e-5), name


def test_columns_parts_and_failures_in_a_comparison(inputs, tmp_path, flags):
    more = {"policies": [inputs.policy, inputs.other_policy], "output": tmp_path / "table.json", "dtype": "fp32"}
    compare(as_argv(flags | more | {"maxlen_prompt": 80, "maxlen_res": 12}))
    result = json.loads((tmp_path / "table.json").read_text("utf-8"))
    answers, table = result["answers"], result["table"]
    scored = [row for row in answers if int(row["prompt"].split()[1]) % 5 != 3]
    assert len(answers) == 4 and len(scored) == 3
    for when, key in (("before", "answer"), ("after", "answer_after")):
        mean = sum(1.5 * int(row["prompt"].split()[1]) - 0.5 * len(row[key]) for row in scored) / len(scored)
        assert table["reward_fn score"][when][0] == pytest.approx(mean)
        assert table["reward_own_half"][when][0] == pytest.approx(sum((20, 21, 22, 23)) / 8)
        assert table["reward_short"][when][0] == pytest.approx(-sum(len(row[key]) for row in answers) / 4)


def test_a_run_that_is_stopped_in_the_functions_of_an_evaluation_resumes(inputs, tmp_path, flags, caplog):
    """Its checkpoint holds the samples of the step, of which some have no score."""
    flags |= {"reward_fn": f"{tmp_path}/f.py:stopped_once", "reward_fn_weights": None, "num_samples": 8}
    flags |= {"train_steps": 1, "num_eval_prompts": 4}
    with pytest.raises(SystemExit, match="143"):
        main(run_flags(inputs, tmp_path / "stopped", **flags))
    assert "never retrieved" not in caplog.text and not (tmp_path / "stopped" / "metrics.jsonl").exists()
    main(run_flags(inputs, tmp_path / "stopped", **flags))
    main(run_flags(inputs, tmp_path / "whole", **flags))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    rows = read_lines(tmp_path / "stopped" / "samples.jsonl")
    assert len(rows) == 12 and 0 < sum(row["score"] is None for row in rows) < 12


def test_a_buffer_without_scores_stops_the_run(inputs, tmp_path, flags, capfd):
    flags |= {"reward_fn": f"{tmp_path}/f.py:never", "reward_fn_weights": None, "num_eval_prompts": 0}
    error = refusal(main, run_flags(inputs, tmp_path / "run", **flags), capfd)
    assert "--reward_fn scored none of 8 answers (reward_never for 8)" in error


@pytest.mark.slow
@pytest.mark.parametrize(("name", "line"), [("pool", 20), ("threads", 23)])
def test_a_function_whose_threads_hang_ends_the_run(inputs, tmp_path, flags, name, line):
    """Also the process, which would otherwise wait for them."""
    flags |= {"reward_fn": f"{tmp_path}/f.py:{name}", "reward_fn_weights": None, "reward_fn_timeout": 1}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "train_ppo.py", *run_flags(inputs, tmp_path / "run", **flags)],
        cwd=REPOSITORY, env=clean_environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and time.monotonic() - started < 40
    assert f"took more than 1 s (--reward_fn_timeout), in {tmp_path}/f.py:{line};" in done.stderr
