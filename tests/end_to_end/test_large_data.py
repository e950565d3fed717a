"""Data beyond 16 MB: two ranks map one file, a killed run leaves nothing in the way, data.prepare makes it ahead."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.tiny_run import clean_environment, read_metrics, run_module

pytestmark = pytest.mark.slow
FLAGS = ["--train_steps", "2", "--batch_size", "4", "--warmup_steps", "0", "--num_valid", "8", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """17 MB of pairs, one of them broken."""
    file = tmp_path_factory.mktemp("large") / "pairs.jsonl"
    with file.open("w") as out:
        for i in range(60_000):
            pair = {"prompt": f"Question {i}? " + "why " * (i % 20), "chosen": "yes " * 30, "rejected": "no " * 30}
            out.write(json.dumps(pair if i != 777 else {"prompt": "no answers"}) + "\n")
    assert file.stat().st_size > 16 << 20
    return file


def words(model: Path, data: Path, out: Path, cache: Path) -> list[str]:
    paths = {"hf_model_name_or_path": model, "data_path": data, "model_save_path": out, "data_cache": cache}
    return [*(str(word) for name, path in paths.items() for word in (f"--{name}", path)), *FLAGS]


def workers() -> set[int]:
    """Process ids of workers that encode."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if "--multiprocessing-fork" in (folder / "cmdline").read_text():
                found.add(int(folder.name))
        except OSError:
            continue
    return found


def test_ranks_and_resumed_runs_share_one_file(inputs, data, tmp_path):
    cache = tmp_path / "cache"
    ready = run_module("data.prepare", "reward.train", *words(inputs.policy, data, tmp_path / "one", cache))
    assert ready.returncode == 0, ready.stderr
    assert "1 dropped: not an object" in ready.stdout and "pairs.jsonl:778" in ready.stdout
    (made,) = cache.iterdir()
    stamp = (made / "rows.arrow").stat().st_mtime_ns
    alone = run_module("reward.train", *words(inputs.policy, data, tmp_path / "one", cache))
    assert alone.returncode == 0 and "encoded earlier" in alone.stdout, alone.stderr
    launcher = ("torch.distributed.run", "--nproc_per_node=2", "-m", "reward.train")
    both = run_module(*launcher, *words(inputs.policy, data, tmp_path / "two", cache))
    assert both.returncode == 0 and both.stdout.count("encoded earlier") == 1, both.stderr
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [path.name for path in cache.iterdir()] == [made.name] and (made / "rows.arrow").stat().st_mtime_ns == stamp


def test_a_run_that_is_killed_while_it_encodes_leaves_no_process_and_the_next_one_starts(inputs, data, tmp_path):
    cache, before = tmp_path / "cache", workers()
    command = [sys.executable, "-m", "reward.train", *words(inputs.policy, data, tmp_path / "run", cache)]
    run = subprocess.Popen(command, env=clean_environment() | {"DS_ACCELERATOR": "cpu"}, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not any(file.stat().st_size for file in cache.glob("*.partial/rows.arrow")):
        assert run.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    own = workers() - before
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    while own & workers():
        assert time.monotonic() < until
        time.sleep(0.1)
    again = run_module("reward.train", *words(inputs.policy, data, tmp_path / "run", cache))
    assert again.returncode == 0, again.stderr
    assert "59991 to train on, 8 to validate on" in again.stdout
    assert len(list(cache.iterdir())) == 1
