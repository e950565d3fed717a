"""The folder of a run after SIGKILL at every call that changes it, and its lock between processes."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.parts import ppo_config
from utils.errors import UserError
from utils.files import atomic_folder
from utils.run import lock
from utils.run.checkpoint import CheckpointWriter
from utils.run.export import export_model
from utils.run.folder import check_owned, prepare_run_folder
from utils.run.index import INDEX, read_index, record
from utils.run.lock import LOCK, held, hold_folder
from utils.run.own_files import files_in
from utils.run.restore import newest
from utils.run.resume import begin_folder, check_folder

CALLS = ("replace", "rename", "remove", "unlink", "rmdir", "mkdir", "link", "fsync")
FILES = ("config.json", "model.safetensors", "deep/a")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without git, which config.json's description asks, and without waiting for the disk, which a SIGKILL spares."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def forked(act: Callable[[], None]) -> int:
    """Runs `act` in a process of its own. Returns its id."""
    child = os.fork()
    if not child:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def killed_at(number: int, act: Callable[[], None]) -> bool:
    """Whether `act`, in a process of its own, made so many of CALLS, where it was killed."""

    def counted(call: Callable) -> Callable:
        def counting(*args, **kwargs):
            nonlocal number
            number -= 1
            if not number:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counting

    def watched() -> None:
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        act()

    code = os.waitstatus_to_exitcode(os.waitpid(forked(watched), 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def config_of(run: Path, checkpoint_per_step: int = 50):
    config = ppo_config(model_save_path=str(run), checkpoint_per_step=checkpoint_per_step)
    config.given = frozenset()
    return config


def export(run: Path, text: str) -> None:
    """best/ with files of this content."""

    def save(folder: str) -> None:
        with atomic_folder(folder) as partial:
            for name in FILES:
                (path := Path(partial, name)).parent.mkdir(exist_ok=True)
                path.write_text(text)

    assert export_model(str(run), "best", save) is None


def contents(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in files_in(str(folder))}


def begun(run: Path) -> Path:
    """A run that has not come to its first checkpoint."""
    prepare_run_folder(str(run), config_of(run))
    record(str(run), "tensorboard", "events.1")
    (run / "tensorboard").mkdir()
    for name in ("tensorboard/events.1", "metrics.jsonl", "samples.jsonl"):
        (run / name).write_text('{"step": 1}\n')
    export(run, "old")
    return run


def test_a_kill_at_any_call_of_an_export_leaves_a_whole_model(tmp_path):
    """The old one or the new one is there when the run goes on; the user's files in the folder are, too."""
    seen, number = [], 0
    while number == 0 or seen[-1] != "not killed":
        number += 1
        run = begun(tmp_path / str(number))
        (run / "best" / "notes.txt").write_text("mine")
        killed = killed_at(number, lambda run=run: export(run, "new"))
        prepare_run_folder(str(run), config_of(run), step=1)
        found = contents(run / "best")
        assert found.pop("notes.txt") == "mine"
        assert found.keys() == set(FILES) and len(set(found.values())) == 1, found
        seen.append(*set(found.values()) if killed else ("not killed",))
        export(run, "newer")
        assert contents(run / "best") == dict.fromkeys(FILES, "newer") | {"notes.txt": "mine"}
        assert not [name for name in files_in(str(run)) if ".partial" in name]
    assert seen[:-1] == sorted(seen[:-1], reverse=True) and {"old", "new"} < set(seen)  # once new, never old again
    assert number > 20


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_beginning_that_is_killed_at_any_call_begins_again(tmp_path, has_begun):
    """Twice at the same call, each time by the same command; what the user put there stays."""
    killed, number = [True], 0
    while any(killed):
        number += 1
        run = tmp_path / str(number)
        if has_begun:
            (begun(run) / "best" / "notes.txt").write_text("mine")
        killed = []
        for _ in range(2):
            check_folder(config_of(run))
            killed.append(killed_at(number, lambda run=run: prepare_run_folder(str(run), config_of(run))))
        check_folder(config_of(run))
        prepare_run_folder(str(run), config_of(run))
        expected = {"config.json", INDEX} | ({"best/notes.txt"} if has_begun else set())
        assert set(files_in(str(run))) - {"best/deep"} == expected  # it may stay behind, empty
        assert (run / "tensorboard").exists() is False
    assert number > (20 if has_begun else 7)


@pytest.mark.parametrize("every", [0, 1, 50])
def test_steps_without_a_checkpoint_are_not_removed_silently(tmp_path, capsys, every):
    """Those of a run that should have a checkpoint are not removed at all while best/ is there."""
    run, config = begun(tmp_path), config_of(tmp_path, every)
    lost = "3 steps and best/"
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    if every == 1:
        with pytest.raises(UserError, match=r"holds best/ of a run without a checkpoint.*move best/ away.*--overwrite"):
            check_folder(config)
        (run / "best").rename(tmp_path / "mine")
        lost = "3 steps"
    check_folder(config)
    for warned in (True, False):
        begin_folder(config, None)
        words = f"warning: {run} holds {lost} without a checkpoint; they are removed and the run starts at step 0\n"
        assert (words in (said := capsys.readouterr().out)) == warned == ("warning" in said)
    assert not (run / "best").exists() and not (run / "metrics.jsonl").exists()


def test_a_kill_at_any_call_of_a_save_leaves_a_checkpoint_and_nothing_unlisted(tmp_path):
    killed, number = True, 0
    while killed:
        number += 1
        folder = tmp_path / str(number) / "checkpoints"
        engine = SimpleNamespace(state_tensors=lambda: {"weight/w/0": torch.ones(3)})
        writer, said = CheckpointWriter(str(folder), {"policy": engine}, 1), []
        writer.save({"step": 1}, said.append)
        killed = killed_at(number, lambda writer=writer: writer.save({"step": 2}, str))
        listed = {f"step_{step}" for step in read_index(str(folder.parent)).checkpoints}
        assert {name.removesuffix(".partial") for name in os.listdir(folder)} <= listed
        assert newest(str(folder), said.append).step in (1, 2)
        writer.save({"step": 3}, said.append)
        assert os.listdir(folder) == ["step_3"] and [line[:16] for line in said] == ["checkpoint of st"] * 2
        assert json.loads((folder.parent / INDEX).read_text())["checkpoints"] == [3]
    assert number > 20


def test_models_of_the_user_are_not_replaced(tmp_path):
    """Neither at the start, also with --overwrite, nor where one appears under the name later."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json was not written by a run; move it"):
        check_owned(str(run))
    (run / "config.json").unlink()
    prepare_run_folder(str(run), config_of(run))
    (run / "final").mkdir()
    (run / "final" / "a").write_text("mine")
    problem = export_model(str(run), "final", lambda folder: (os.mkdir(folder), Path(folder, "a").touch()))
    assert "final/a was not written by this run; move it" in problem
    assert contents(run / "final") == {"a": "mine"} and not (run / "final.partial").exists()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"names": {"..": []}}', '{"names": {"/": []}}', '{"checkpoints": ["1/../.."]}', "[" * 9999]
)
def test_an_index_that_is_damaged_or_names_other_places_is_one_line(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(UserError, match=f"{INDEX} is damaged .*; remove it"):
        read_index(str(tmp_path))


def holder(run: Path, ready: Path) -> int:
    """A process that holds the run's lock and waits. Returns its id."""

    def hold() -> None:
        hold_folder(str(run))
        ready.touch()
        time.sleep(60)

    child, deadline = forked(hold), time.monotonic() + 30
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return child


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    run = tmp_path / "new" / "run"
    child = holder(run, tmp_path / "ready")
    text = json.loads((run / LOCK).read_text())
    assert text["pid"] == child
    try:
        for _ in range(2):  # a refusal does not take the lock away
            with pytest.raises(UserError) as refused:
                hold_folder(str(run))
            words = f"{run} is in use by process {child} on {text['host']} since {text['since']}; ", f"kill {child}"
            assert all(word in str(refused.value) for word in words)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with held:
        hold_folder(str(run))
        assert json.loads((run / LOCK).read_text())["pid"] == os.getpid()
    assert list(run.iterdir()) == []
    with pytest.raises(ZeroDivisionError), held:
        hold_folder(str(tmp_path / "a" / "b"))
        assert os.listdir(tmp_path / "a" / "b") == [LOCK]
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()


def test_processes_that_come_and_go_are_never_two(tmp_path):
    """The holder removes run.lock at its end, while others have it open."""
    run, mark, had, end = tmp_path / "run", tmp_path / "mark", tmp_path / "had", time.monotonic() + 2.0

    def come_and_go() -> None:
        while time.monotonic() < end:
            with contextlib.suppress(UserError), held:
                hold_folder(str(run))
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))  # fails where another holds it, too
                mark.unlink()
                with open(had, "a") as file:
                    file.write(".")

    children = [forked(come_and_go) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4 and had.stat().st_size > 4


def test_without_locks_a_file_that_is_touched_does(tmp_path, monkeypatch):
    """As on a network disk without a lock daemon: who is killed holds the folder until the file is old."""

    def no_locks(*_) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "STALE", 2.0)
    child = holder(tmp_path, tmp_path / "ready")
    try:
        time.sleep(2.5)
        for _ in range(2):
            with pytest.raises(UserError, match=f"in use by process {child} "):
                hold_folder(str(tmp_path))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    before = time.monotonic()
    with held:
        hold_folder(str(tmp_path))
    assert not (tmp_path / LOCK).exists() and time.monotonic() - before > 1


def test_the_lock_of_another_host_counts_until_its_file_is_old(tmp_path, monkeypatch):
    """As where locks are local to a node: this node's lock succeeds while a process on another one trains."""
    (path := tmp_path / LOCK).write_text('{"host": "node-7.cluster", "pid": 41, "since": "2026-11-27 20:00:00"}\n')
    threading.Timer(2.5, os.utime, (path,)).start()  # a sign of life
    with held, pytest.raises(UserError, match=r"in use by process 41 on node-7\.cluster "):
        hold_folder(str(tmp_path))
    os.utime(path, (old := time.time() - 301, old))
    monkeypatch.setattr(lock, "BEAT", 0.1)
    with held:
        hold_folder(str(tmp_path))
        assert json.loads(path.read_text())["pid"] == os.getpid()
        os.utime(path, (old, old))
        time.sleep(1.0)
        assert path.stat().st_mtime > old + 200  # touched
    assert not path.exists()
