"""Ranks that start with unlike flags, code, data or models end before the first step; other paths are no difference."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest

from tests.faults.scenarios import Result, run_forked
from tests.helpers.tiny_run import REPOSITORY, clean_environment, read_metrics, run_flags
from utils.launcher import free_port


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory) -> dict[str, Result]:
    """Results by what the second rank has of its own, or in the last ones by what both have that went on."""
    folder = tmp_path_factory.mktemp("runs")
    first, second, copy = (shutil.copytree(inputs.policy.parent, folder / name) for name in ("first", "second", "copy"))
    data = second / "prompts" / "train.json"
    data.write_text(data.read_text().replace("bread", "cakes"))
    seconds = {
        "seed": ["--seed", "8"],
        "flag": ["--num_eval_prompts", "128"],  # the default, which the other rank alone would lower
        "reward model": ["--reward_model_path", f"{first}/reward", f"{first}/other_policy"],
        "copies": ["--data_path", f"{copy}/prompts", "--policy_model_path", f"{copy}/policy"],
        "free flags": ["--report_to", "none", "--ignore_hangup", "true", "--lr_schedule", "inverse_sqrt"],
    }
    flags = {"train_steps": 2, "data_path": "prompts", "reward_model_path": [first / "reward"], "zero_stage": 2}
    flags |= {"num_eval_prompts": None, "checkpoint_per_step": 1}
    rows = {name: {"second": words, "folders": [first, first]} for name, words in seconds.items()}
    rows["data"] = {"folders": [first, second]}
    rows["one fails"] = {"folders": [first, first], "fault": "damaged model"}
    rows["stopped"] = {"folders": [first, first]}
    rows["other content"] = {"folders": [second, second], "out": "stopped"}
    rows["other path"] = {"folders": [copy, copy], "out": "stopped"}
    for name, row in rows.items():
        limit = {"max_hours": 1e-9} if name == "stopped" else {}
        row["argv"] = run_flags(inputs, folder / row.pop("out", name), **flags | limit)
        row |= {"folders": [str(path) for path in row["folders"]], "patience": 20}
    words = [str(inputs.policy), str(inputs.prompts)]
    rows["hashing"] = {"module": "tests.distributed.jobs", "function": "fingerprint_inputs", "argv": words}
    words = [str(folder / "read.json"), 5.0]
    rows["reading"] = {"module": "tests.distributed.jobs", "function": "read_apart", "argv": words}
    return run_forked(folder, rows)


NAMED = {
    "seed": r"--seed 8, not 7\.",
    "flag": r"--num_eval_prompts 128, not 128 \(not given\)\.",
    "reward model": r"--reward_model_path: 2/config.json is new, .*2/tokenizer.model is new\.",
    "data": r"--data_path: train.json has other content\.",
}


@pytest.mark.parametrize("case", NAMED)
def test_both_ranks_end_and_one_says_which_one_differs_in_what(runs, case):
    result = runs[case]
    assert result.codes == [2, 2] and "Traceback" not in result.log
    assert re.findall("error.*?:", result.log) == ["error [rank 0]:"]
    assert re.search(rf"error \[rank 0\]: rank 1 differs from rank 0: {NAMED[case]}", result.log), result.log
    assert not (result.out / "config.json").exists()


def test_an_error_on_one_rank_ends_the_other_that_waits_in_a_collective(runs):
    """Rank 0 says whose error it is, and leaves no lock."""
    result, error = runs["one fails"], "--critic_model_path is damaged"
    assert result.codes == [2, 2] and "Traceback" not in result.log
    assert re.search(rf"error \[rank 0\]: rank 1: {error}", result.log), result.log
    assert re.search(rf"error \[rank 1\]: {error}", result.log), result.log
    assert not result.out.exists()


@pytest.mark.parametrize("case", ["copies", "free flags"])
def test_ranks_may_have_copies_and_some_flags_of_their_own(runs, case):
    assert runs[case].codes == [0, 0], runs[case].log
    assert len(read_metrics(runs[case].out)) == 2


def test_code_that_was_edited_on_one_rank_is_noticed(inputs, tmp_path):
    """Rank 1 runs a copy of the repository; git has the same commit there."""
    copy = tmp_path / "copy"
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".*", "outputs", "experiments", "docs", "tests"))
    loss = copy / "ppo" / "loss.py"
    loss.write_text(loss.read_text() + "\n# edited\n")
    argv, port, ranks = run_flags(inputs, tmp_path / "run"), str(free_port()), []
    for rank, tree in enumerate((REPOSITORY, copy)):
        group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(tree)}
        command = [sys.executable, "train_ppo.py", *argv]
        environment = clean_environment() | group
        ranks.append(subprocess.Popen(command, cwd=tree, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    assert "rank 1 differs from rank 0: code: ppo/loss.py has other content. Start" in errors[0]


def test_a_resume_refuses_other_content_on_both_ranks(runs):
    """And takes the same content from another folder."""
    assert (runs["stopped"].codes, runs["other content"].codes, runs["other path"].codes) == (
        [75] * 2,
        [2] * 2,
        [0] * 2,
    )
    assert re.search(r"\[rank 0\]: --data_path .*train.json has other content\);", runs["other content"].log)
    assert re.search("resuming from .*/stopped/checkpoints/step_1", runs["other path"].log)
    assert [row["step"] for row in read_metrics(runs["other path"].out)] == [1, 2]


def test_ranks_of_a_node_share_the_hashing(runs, inputs):
    """Each file is hashed once, although the ranks name it by different paths; both get all hashes."""
    result = runs["hashing"]
    assert result.codes == [0, 0], result.log
    hashed = Counter(re.findall("^hashed (.*)$", result.log, re.MULTILINE))
    assert hashed == {str(path): 1 for folder in (inputs.policy, inputs.prompts) for path in folder.iterdir()}
    first, second = re.findall("^found (.*)$", result.log, re.MULTILINE)
    assert first == second and set(json.loads(first)) == {"policy_model_path", "data_path", "advantage_estimator"}


def test_one_rank_of_a_node_reads_and_the_other_waits_as_long_as_it_takes(runs):
    """Twice as long as the watchdog waits for progress."""
    assert runs["reading"].codes == [0, 0], runs["reading"].log
    found = json.loads((runs["reading"].out / "read.json").read_text())
    assert found == [[["read by 0"], [0]], [["read by 0"], []]]
