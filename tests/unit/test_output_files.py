"""What a user names by --output is whole or not at all, links and devices stay what they are; and by --logdir."""

import json
import os
import threading
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.files import atomic_folder, check_output_file, write_json
from utils.run.logger import RunLogger, sparkline


def test_a_link_stays_one(tmp_path):
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("old")
    link.symlink_to(target)
    write_json(str(link), {"a": 1}, "--output")
    assert link.is_symlink() and json.loads(target.read_text()) == {"a": 1}
    assert sorted(os.listdir(tmp_path)) == ["link.json", "target.json"]


def test_a_pipe_is_written_to(tmp_path):
    pipe, seen = tmp_path / "pipe", []
    os.mkfifo(pipe)
    check_output_file(str(pipe), "--output")
    reader = threading.Thread(target=lambda: seen.append(pipe.read_text()))
    reader.start()
    write_json(str(pipe), {"a": 1}, "--output")
    reader.join(10)
    assert pipe.is_fifo() and json.loads(seen[0]) == {"a": 1}


def test_a_full_device_is_one_line_and_stays_a_device(tmp_path):
    """Reached by a link, so that a fault here does not cost the machine its /dev/full."""
    link = tmp_path / "full"
    link.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"--output .*full cannot be written: No space left on device"):
        write_json(str(link), {"a": 1}, "--output")
    assert os.listdir(tmp_path) == ["full"] and link.is_symlink() and link.is_char_device()


def test_what_fails_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(str(tmp_path / "new" / "table.json"), {"a": object()}, "--output")
    assert os.listdir(tmp_path) == []


def test_all_is_on_the_disk_before_the_name_says_so(tmp_path, disk_calls):
    write_json(str(tmp_path / "a.json"), {})
    with atomic_folder(str(tmp_path / "model")) as partial:
        for name in ("b", "c"):
            Path(partial, name).touch()
    assert disk_calls[:2] == [("synced", "a.json.partial"), ("synced", tmp_path.name)]
    assert {name for _, name in disk_calls[2:4]} == {"b", "c"}
    assert disk_calls[4:] == [
        ("synced", "model.partial"), ("renamed", "model.partial", "model"), ("synced", tmp_path.name)
    ]  # fmt: skip


def test_a_logdir_that_cannot_be_made_is_named(tmp_path):
    with pytest.raises(UserError, match="--logdir /proc/x cannot be written"):
        RunLogger(str(tmp_path), "/proc/x", "none", {}, 1)


def test_a_curve_of_one_line():
    assert sparkline([2.0, 0.0, 7.0]) == "▃▁█"
    assert sparkline([0.0] * 15 + [1.0], width=8) == "▁▁▁▁▁▁▁█"  # every second value, the last one included
