"""Checkpoints on disk: damage is recognised, old ones go, a full disk harms nothing."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from utils.checkpoint import save
from utils.errors import UserError
from utils.restore import newest


def flip_a_byte(checkpoint: Path) -> None:
    path = checkpoint / "critic-rank0.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped byte": (flip_a_byte, "critic-rank0.safetensors is not what was written: its hash differs"),
    "a truncated file": (
        lambda checkpoint: os.truncate(checkpoint / "policy-rank0.safetensors", 1000),
        r"policy-rank0.safetensors has 1000 bytes, not \d+",
    ),
    "a missing file": (
        lambda checkpoint: (checkpoint / "random-rank0.json").unlink(),
        "random-rank0.json is missing",
    ),
    "no manifest": (lambda checkpoint: (checkpoint / "manifest.json").unlink(), "manifest.json is missing"),
    "a torn manifest": (
        lambda checkpoint: os.truncate(checkpoint / "manifest.json", 20),
        "manifest.json is not a manifest",
    ),
}


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    """A folder with the checkpoints of steps 1 and 2 of an engine that stands for two."""
    folder, said = tmp_path / "checkpoints", []
    for step in (1, 2):
        assert save(str(folder), {"step": step}, engines(float(step)), 2, said.append), said
    return folder


def engines(value: float) -> dict[str, SimpleNamespace]:
    """Two that hold one tensor each, of this value."""
    return {
        name: SimpleNamespace(state_tensors=lambda: {"weight.0": torch.full((1000,), value)})
        for name in ("policy", "critic")
    }


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(checkpoints, case):
    damage, reason = DAMAGE[case]
    said: list[str] = []
    assert newest(str(checkpoints), said.append).step == 2 and not said
    damage(checkpoints / "step_2")
    assert newest(str(checkpoints), said.append).step == 1
    assert len(said) == 1
    assert re.fullmatch(rf"warning: .*step_2 is damaged \({reason}\); looking for an older one", said[0])
    damage(checkpoints / "step_1")
    with pytest.raises(UserError, match="has no whole checkpoint left: start anew with --overwrite"):
        newest(str(checkpoints), said.append)


def test_only_the_newest_are_kept(checkpoints):
    (checkpoints / "step_7.partial").mkdir()
    assert save(str(checkpoints), {"step": 10}, engines(3.0), 2, print)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_10", "step_2"]


def test_all_is_on_the_disk_before_the_name_says_so(checkpoints, disk_calls):
    """Else a power cut could leave a folder with the right name and nothing in it, or one that is ahead of the metrics.

    Old ones lose their name first.
    """
    (checkpoints.parent / "metrics.jsonl").touch()
    assert save(str(checkpoints), {"step": 3}, engines(3.0), 2, print)
    files = ["policy-rank0.safetensors", "critic-rank0.safetensors", "random-rank0.json", "state.json", "manifest.json"]
    assert sorted(files) == sorted(path.name for path in (checkpoints / "step_3").iterdir())
    assert disk_calls == [
        *(("synced", name) for name in [*files, "step_3.partial", "metrics.jsonl"]),
        ("renamed", "step_3.partial", "step_3"), ("synced", checkpoints.name),
        ("renamed", "step_1", "step_1.partial"),
    ]  # fmt: skip


def test_a_manifest_names_the_state_and_files_of_its_own_folder(checkpoints):
    manifest = checkpoints / "step_2" / "manifest.json"
    entries = json.loads(manifest.read_text())
    said: list[str] = []
    for changed in ({"random-rank0.json": entries["random-rank0.json"]}, entries | {"../x": entries["state.json"]}):
        shutil.copy(checkpoints / "step_2" / "state.json", checkpoints / "x")
        manifest.write_text(json.dumps(changed))
        assert newest(str(checkpoints), said.append).step == 1
    assert "manifest.json names no state.json" in said[0] and "x is missing" in said[1]


def test_a_full_disk_leaves_the_run_going_and_the_older_checkpoint_whole(tmp_path):
    """A disk of 256 KiB takes one checkpoint of 16 kB; the next are refused beforehand, or when it runs full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        said: list[str] = []
        folder = disk / "checkpoints"
        assert save(str(folder), {"step": 1}, small(4000), 2, said.append)
        assert not save(str(folder), {"step": 2}, small(400000), 2, said.append)
        assert re.search(r"step 2 was not saved: it takes 1.6 MB, and .* MB left: make room; older ones are", said[-1])
        assert not save(str(folder), {"step": 2}, small(50000), 2, said.append)  # alone it fits
        assert re.search("step 2 was not saved: .*No space left", said[-1])
        assert [path.name for path in folder.iterdir()] == ["step_1"]
        assert newest(str(folder), said.append).step == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def small(size: int) -> dict[str, SimpleNamespace]:
    return {"policy": SimpleNamespace(state_tensors=lambda: {"weight.0": torch.zeros(size)})}
