"""What a user names by --output is whole or not at all, links and devices stay what they are; and by --logdir."""

import json
import os
import re
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models

from tests.helpers.families import FAMILIES, family_tokenizer
from tests.helpers.tiny import tiny_llama
from utils.errors import UserError
from utils.files import atomic_folder, check_output_file, check_writable, disk_errors, write_json
from utils.models.export import save_causal_lm, saved_tensors
from utils.run.checkpoint import CheckpointWriter
from utils.run.display import sparkline
from utils.run.logger import RunLogger


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


def test_a_link_to_nowhere_is_no_place_for_a_folder(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=r"--model_save_path .*out/run cannot be written: .*out is not a writable folder"
    ):
        check_writable(str(tmp_path / "out" / "run"), "--model_save_path")


def test_a_full_device_is_one_line_and_stays_a_device(tmp_path):
    """Reached by a link, so that a fault here does not cost the machine its /dev/full."""
    link = tmp_path / "full"
    link.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"--output .*full cannot be written: No space left on device"):
        write_json(str(link), {"a": 1}, "--output")
    assert os.listdir(tmp_path) == ["full"] and link.is_symlink() and link.is_char_device()


def test_tokenizers_have_no_error_of_their_own(tmp_path):
    """They raise plain Exceptions; one that is not of the disk stays what it is."""
    with pytest.raises(UserError, match=r"^it cannot be written: No such file .*; free disk space"), disk_errors("it"):
        Tokenizer(models.BPE()).save(str(tmp_path / "none" / "tokenizer.json"))
    with pytest.raises(Exception, match=r"^broken$") as raised, disk_errors("it"):
        raise Exception("broken")
    assert raised.type is Exception


@pytest.mark.parametrize("inodes", range(2, 8))
def test_a_disk_without_inodes_is_one_line(tmp_path, inodes):
    """It has bytes left; at 7 the tokenizer's last file does not fit. An export, and a checkpoint."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = f"size=16m,nr_inodes={inodes}"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs: run it as root")
    try:
        lm, said = tiny_llama(), []
        with pytest.raises(UserError, match=r"best cannot be written: .*No space left on device"):
            save_causal_lm(lm.config, saved_tensors(lm), f"{disk}/best", family_tokenizer(FAMILIES["ChatML"]))
        assert os.listdir(disk) == []
        policy = SimpleNamespace(state_tensors=lambda: {"weight/w/0": torch.ones(3)})
        CheckpointWriter(f"{disk}/checkpoints", {"policy": policy}, 2).save({"step": 1}, said.append)
        if inodes < 7:  # two folders, four files, the disk's own
            assert re.search("checkpoint of step 1 was not saved: .*No space left on device.*; older ones", said[0])
            assert {path.name for path in disk.rglob("*")} <= {"checkpoints", "run_index.json"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


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
        RunLogger(str(tmp_path), "/proc/x", 1)


def test_a_curve_of_one_line():
    assert sparkline([2.0, 0.0, 7.0]) == "▃▁█"
    assert sparkline([0.0] * 15 + [1.0], width=8) == "▁▁▁▁▁▁▁█"  # every second value, the last one included
