"""On two ranks: one run per folder, also while the ranks have no launcher; and no history is lost."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.scenarios import finished, run_cases, run_forked
from tests.helpers.tiny_run import REPOSITORY, assert_same_run, clean_environment, read_metrics, run_flags
from train_ppo import main
from utils.launcher import free_port
from utils.run.lock import LOCK
from utils.run.own_files import files_in

FLAGS = {"train_steps": 3, "checkpoint_per_step": 1, "keep_checkpoints": 1, "num_eval_prompts": 2, "zero_stage": 2}


@pytest.fixture(scope="module")
def stopped(inputs, tmp_path_factory) -> Path:
    """A run that has stopped after its first step."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(SystemExit):
        main(run_flags(inputs, out, **FLAGS, max_hours=1e-9))
    return out


def test_links_and_moved_checkpoints(inputs, stopped, tmp_path):
    """A run whose checkpoints are elsewhere goes on where a link leads there, and else is refused, on both ranks."""
    cases = {"plain": FLAGS, "linked": FLAGS, "moved": FLAGS, "moved and named": FLAGS}
    for name in cases:
        out = shutil.copytree(stopped, tmp_path / name.replace(" ", "_"))
        if name != "plain":
            moved = shutil.move(out / "checkpoints", tmp_path / f"disk of {name}")
    (tmp_path / "linked" / "checkpoints").symlink_to(tmp_path / "disk of linked")
    cases["moved and named"] = FLAGS | {"resume": Path(moved) / "step_1"}
    before = {name: (stopped / name).read_bytes() for name in files_in(str(stopped)) if "checkpoints" not in name}
    results = run_cases(tmp_path, inputs, cases)
    for name in ("moved", "moved and named"):
        assert results[name].codes == [2, 2]
        out, log = results[name].out, results[name].log
        assert len(re.findall(r"error .rank 0.: .* has none of its checkpoints: move them back", log)) == 1, log
        assert {name: (out / name).read_bytes() for name in files_in(str(out))} == before
    done = finished({name: results[name] for name in ("plain", "linked")})
    assert_same_run(done["linked"], done["plain"], "best")
    assert [row["step"] for row in read_metrics(done["linked"])] == [1, 2, 3]
    assert (tmp_path / "linked" / "checkpoints").is_symlink()
    assert os.listdir(tmp_path / "disk of linked") == ["step_3"]


def test_ranks_without_a_launcher_keep_the_folder(inputs, tmp_path):
    """Two ranks have begun; starts in their folder end at once, on all ranks, until rank 0 is killed."""
    out, group = tmp_path / "run", {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "train_ppo.py", *run_flags(inputs, out, train_steps=100000, num_eval_prompts=0)]
    environment, ranks = clean_environment() | {"DS_ACCELERATOR": "cpu"} | group, []
    with open(tmp_path / "ranks.log", "w") as log:
        for rank in ("0", "1"):
            own = environment | {"RANK": rank, "LOCAL_RANK": rank}
            ranks.append(subprocess.Popen(command, cwd=REPOSITORY, env=own, stdout=log, stderr=log))
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        for rank in ranks:
            rank.send_signal(signal.SIGSTOP)  # leaves the processors to the others
        cases = {"one": {"ranks": 1}, "two": {}, "overwrite": {"overwrite": True}}
        results = run_cases(tmp_path, inputs, {name: case | {"out": "run"} for name, case in cases.items()})
        for name, result in results.items():
            assert result.codes == [2] * (1 if name == "one" else 2)
            words = rf"--model_save_path {out} is in use by process {ranks[0].pid} on .*?: kill {ranks[0].pid}"
            assert len(re.findall(words, result.log)) == 1, result.log
        assert [rank.poll() for rank in ranks] == [None, None]
        os.kill(ranks[0].pid, signal.SIGKILL)
        ranks[0].wait()
        main(run_flags(inputs, out, num_eval_prompts=0, overwrite=True))
        assert [row["step"] for row in read_metrics(out)] == [1, 2]
        assert not (out / LOCK).exists()
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_ranks_that_do_not_share_the_folder_are_refused(inputs, tmp_path):
    """One path, which names another folder on the second rank; in the last case it leads to the first's a bit later."""
    rows = {}
    for case in ("never shared", "shared late"):
        folders = [tmp_path / case / name for name in ("first", "second")]
        for folder in folders:
            folder.mkdir(parents=True)
        argv = run_flags(inputs, Path("/proc/self/cwd/run"), num_eval_prompts=0, train_steps=1)
        rows[case] = {"argv": argv, "fault": case, "folders": [str(folder) for folder in folders]}
    results = run_forked(tmp_path, rows)
    alone, late = (results[case] for case in rows)
    problem = "--model_save_path /proc/self/cwd/run is not the folder of rank 0, whose run.lock is not there; use a"
    assert alone.codes == [2, 2]
    assert sorted(re.findall("error.*there; use a", alone.log)) == [
        f"error [rank 0]: rank 1: {problem}",
        f"error [rank 1]: {problem}",
    ]
    assert [list((tmp_path / "never shared" / name).iterdir()) for name in ("first", "second")] == [[], []]
    assert late.codes == [0, 0] and "rank 1: waiting up to 90 s" in late.log, late.log[-3000:]
    assert (tmp_path / "shared late" / "first" / "run" / "final" / "config.json").exists()
