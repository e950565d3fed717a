"""A run removes nothing that it did not write, and nothing of its history while its checkpoints are elsewhere."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.tiny_run import assert_same_run, read_metrics, refusal, run_flags
from train_ppo import main
from utils.run.index import INDEX
from utils.run.own_files import files_in

FLAGS = {"train_steps": 3, "checkpoint_per_step": 1, "keep_checkpoints": 1, "num_eval_prompts": 2, "zero_stage": 0}
THEIRS = (
    "notes.txt", "best/notes.txt", "best/sub/deep.txt", "final/notes.txt", "bad_batches/step_1.json",
    "tensorboard/events.out.tfevents.1.other", "tensorboard/other/events.out.tfevents.2", "checkpoints/notes.txt",
    "checkpoints/step_3_good/state.json", "checkpoints/keep_me/weights", "checkpoints/x.partial/a",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    main(run_flags(inputs, out, **FLAGS))
    return out


@pytest.fixture
def stopped(inputs, tmp_path) -> Path:
    """The same run, stopped after its first step."""
    out = tmp_path / "run"
    with pytest.raises(SystemExit):
        main(run_flags(inputs, out, **FLAGS, max_hours=1e-9))
    assert os.listdir(out / "checkpoints") == ["step_1"]
    return out


def put(run: Path, *names: str) -> None:
    for name in names:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(f"{name} of the user")


def assert_kept(run: Path, *names: str) -> None:
    for name in names:
        assert (run / name).read_text() == f"{name} of the user"


@pytest.mark.parametrize("older", [False, True])
def test_what_the_run_did_not_write_outlives_everything(inputs, whole, stopped, capfd, older):
    """Pruning, a better best/, resuming, going on past final/, --overwrite. older: of a version without an index."""
    index = json.loads((stopped / INDEX).read_text())
    put(stopped, *THEIRS[:1], *THEIRS[7:]) if older else put(stopped, *THEIRS, "checkpoints/step_1/notes.txt")
    if older:
        (stopped / INDEX).unlink()
    else:
        shutil.copytree(stopped / "checkpoints" / "step_1", stopped / "checkpoints" / "step_9")
    main(run_flags(inputs, stopped, **FLAGS))
    assert_same_run(stopped, whole, "best")
    left = {"step_3", "notes.txt", "step_3_good", "keep_me", "x.partial"} | (set() if older else {"step_1", "step_9"})
    assert set(os.listdir(stopped / "checkpoints")) == left
    kept = [*THEIRS[:1], *THEIRS[7:]] if older else [*THEIRS, "checkpoints/step_1/notes.txt"]
    put(stopped, "final/notes.txt")  # beside the model
    assert_kept(stopped, *kept)
    main(run_flags(inputs, stopped, **FLAGS | {"train_steps": 4}, resume_with_changes=True))
    assert f"resuming from {stopped}/checkpoints/step_3" in capfd.readouterr().out
    assert_kept(stopped, *kept)
    main(run_flags(inputs, stopped, **FLAGS, overwrite=True))
    assert_same_run(stopped, whole, "best")
    assert_kept(stopped, *kept, "final/notes.txt")
    again = json.loads((stopped / INDEX).read_text())
    assert again["checkpoints"] == [3] and again["names"].keys() == index["names"].keys()
    own = {name for name in files_in(str(stopped)) if (stopped / name).read_bytes()[-11:] != b"of the user"}
    events = [name for name in own if name.startswith("tensorboard/events")]
    assert len(events) == 1
    expected = {name for name in files_in(str(whole)) if not name.startswith("tensorboard/")}
    assert {name for name in own if "/step_9/" not in name} - set(events) == expected


def test_a_checkpoint_of_the_user_is_resumed_from_by_its_name(inputs, whole, stopped, tmp_path, capfd):
    shutil.copytree(stopped / "checkpoints" / "step_1", tmp_path / "step_1")
    main(run_flags(inputs, stopped, **FLAGS))
    shutil.move(tmp_path / "step_1", stopped / "checkpoints")
    shutil.rmtree(stopped / "final")
    main(run_flags(inputs, stopped, **FLAGS))
    assert f"resuming from {stopped}/checkpoints/step_3" in capfd.readouterr().out
    main(run_flags(inputs, stopped, **FLAGS, resume=stopped / "checkpoints" / "step_1"))
    assert f"resuming from {stopped}/checkpoints/step_1" in capfd.readouterr().out
    assert_same_run(stopped, whole, "best")
    assert set(os.listdir(stopped / "checkpoints")) == {"step_1", "step_3"}


@pytest.mark.parametrize("how", ["auto", "by the link", "by the folder", "the checkpoint is a link"])
def test_checkpoints_on_another_disk(inputs, whole, stopped, tmp_path, how):
    place, elsewhere = stopped / "checkpoints", tmp_path / "disk" / "any name"
    if how == "the checkpoint is a link":
        place, elsewhere = place / "step_1", elsewhere / "step_1"
    elsewhere.parent.mkdir(parents=True)
    shutil.move(place, elsewhere)
    place.symlink_to(elsewhere)
    named = {"by the link": place / "step_1", "by the folder": elsewhere / "step_1"}
    flags = {"resume": named[how]} if how in named else {}
    main(run_flags(inputs, stopped, **FLAGS | flags))
    assert_same_run(stopped, whole, "best")
    if how == "the checkpoint is a link":
        assert (elsewhere / "state.json").exists()
    else:
        assert place.is_symlink() and os.listdir(elsewhere) == ["step_3"]


@pytest.mark.parametrize("older", [False, True])
def test_checkpoints_that_were_moved_cost_no_history(inputs, stopped, tmp_path, capfd, older):
    if older:
        (stopped / INDEX).unlink()
    shutil.move(stopped / "checkpoints", tmp_path / "moved")
    before = {name: (stopped / name).read_bytes() for name in files_in(str(stopped))}
    for resume in ("auto", tmp_path / "moved" / "step_1"):
        for make in (False, True):
            (stopped / "checkpoints").mkdir() if make else shutil.rmtree(stopped / "checkpoints", ignore_errors=True)
            error = refusal(main, run_flags(inputs, stopped, **FLAGS, resume=resume), capfd)
            assert "checkpoints has none of its checkpoints: move them back" in error and "--overwrite" in error
    assert before == {name: (stopped / name).read_bytes() for name in files_in(str(stopped)) if name != "checkpoints"}
    main(run_flags(inputs, stopped, **FLAGS, overwrite=True))
    assert [row["step"] for row in read_metrics(stopped)] == [1, 2, 3]


def test_a_file_of_the_user_where_the_run_writes_is_not_overwritten(inputs, tmp_path, capfd):
    put(tmp_path, "config.json")
    error = refusal(main, run_flags(inputs, tmp_path, overwrite=True), capfd)
    assert "config.json was not written by a run; move it, or use another folder" in error
    assert_kept(tmp_path, "config.json")
    assert os.listdir(tmp_path) == ["config.json"]
