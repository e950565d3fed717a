"""Checkpoints on disk: damage is recognised, old ones are removed, and writing goes on beside the run.

Full disks: tests/faults/test_kill.py.
"""

import hashlib
import json
import os
import re
import resource
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from utils.engine.memory import group_room
from utils.errors import UserError
from utils.run.checkpoint import PIECE, CheckpointWriter
from utils.run.index import INDEX
from utils.run.own_files import files_in
from utils.run.restore import named, newest
from utils.run.state_file import file_pieces, write_files


def flip_a_byte(checkpoint: Path) -> None:
    path = checkpoint / "critic-rank0.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def change_manifest(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        shutil.copy(checkpoint / "state.json", checkpoint.parent / "x")
        file = checkpoint / "manifest.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return damage


DAMAGE = {
    "critic-rank0.safetensors does not match its SHA-256": flip_a_byte,
    r"policy-rank0.safetensors has 1000 bytes, not \d+": lambda path: os.truncate(
        path / "policy-rank0.safetensors", 1000
    ),
    "random-rank0.json is missing": lambda path: (path / "random-rank0.json").unlink(),
    "manifest.json is missing": lambda path: (path / "manifest.json").unlink(),
    "manifest.json: Unterminated string .*": lambda path: os.truncate(path / "manifest.json", 20),
    "manifest.json names no state.json": change_manifest(
        lambda entries: {"random-rank0.json": entries["random-rank0.json"]}
    ),
    r"manifest.json: \.\./x\.\[key\]: String should match .*": change_manifest(
        lambda entries: entries | {"../x": entries["state.json"]}
    ),
}


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    """A folder with the checkpoints of steps 1 and 2 of an engine that stands for two."""
    folder, said = tmp_path / "checkpoints", []
    for step in (1, 2):
        save(folder, step, engines(float(step)), said.append)
    assert [line[:20] for line in said] == ["checkpoint of step 1", "checkpoint of step 2"]
    return folder


def save(folder: Path, step: int, models: dict, say: Callable[[str], None] = print, **options) -> CheckpointWriter:
    """The writer, which has saved one checkpoint and keeps two."""
    writer = CheckpointWriter(str(folder), models, 2)
    writer.save({"step": step}, say, **options)
    return writer


def engines(value: float) -> dict[str, SimpleNamespace]:
    """Two that hold one tensor each, of this value."""
    return {
        name: SimpleNamespace(state_tensors=lambda: {"weight/w/0": torch.full((1000,), value)})
        for name in ("policy", "critic")
    }


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(checkpoints, reason):
    damage, said = DAMAGE[reason], []
    assert newest(str(checkpoints), said.append).step == 2 and not said
    damage(checkpoints / "step_2")
    assert newest(str(checkpoints), said.append).step == 1
    assert len(said) == 1 and re.search(rf"step_2 is damaged \({reason}\)", said[0])
    damage(checkpoints / "step_1")
    with pytest.raises(UserError, match=r"all checkpoints .* damaged; .*--overwrite"):
        newest(str(checkpoints), said.append)


def test_only_the_newest_are_kept(checkpoints):
    index = checkpoints.parent / INDEX
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"checkpoints": [1, 2, 7]}))  # killed while writing the third
    (checkpoints / "step_7.partial").mkdir()
    save(checkpoints, 10, engines(3.0))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_10", "step_2"]
    assert json.loads(index.read_text()) == content | {"checkpoints": [2, 10], "last_checkpoint": 10}


def test_what_the_run_did_not_write_is_kept(checkpoints):
    """A copy of a checkpoint is neither removed nor overwritten; under a name of its own it can be resumed from."""
    said = []
    shutil.copytree(checkpoints / "step_1", checkpoints / "step_99")
    for name in ("step_3_good", "keep_me", "mine.partial", "step_8", "step_9.partial", "step_1/mine"):
        (checkpoints / name).mkdir()
    for name in ("notes.txt", "step_1/notes.txt", "step_1/mine/deep", "step_8/state.json"):
        (checkpoints / name).write_text(name)
    theirs = [*files_in(str(checkpoints / "step_99")), "keep_me", "mine.partial", "notes.txt", "step_1/mine/deep"]
    theirs = {f"step_99/{name}" if name in files_in(str(checkpoints / "step_99")) else name for name in theirs}
    theirs |= {"step_1/notes.txt", "step_3_good", "step_8/state.json", "step_9.partial"}
    for step in (3, 4, 8, 9):
        save(checkpoints, step, engines(3.0), said.append)
    assert [re.search("step_. was not saved|not written by this run", line) is None for line in said] == [1, 1, 0, 0]
    kept = set(files_in(str(checkpoints)))
    assert {path for path in kept if path.split("/")[0] not in ("step_3", "step_4")} == theirs
    assert newest(str(checkpoints), said.append).step == 4
    with pytest.raises(UserError, match=r"state\.json is of step 1"):
        named(str(checkpoints / "step_99"))
    (checkpoints / "step_99").rename(checkpoints / "mine")
    assert named(str(checkpoints / "mine")).step == 1


def test_notes_do_not_take_the_place_of_a_checkpoint(checkpoints):
    """A pruned one's folder, which only holds the user's notes, is none, and is written again."""
    said, notes = [], checkpoints / "step_1" / "notes.txt"
    notes.write_text("mine")
    for step in (3, 4, 1):
        save(checkpoints, step, engines(3.0), said.append)
        assert notes.read_text() == "mine"
    assert len(said) == 3 and not any("not saved" in line for line in said)
    (checkpoints / "step_5").mkdir()
    (checkpoints / "step_5" / "notes.txt").write_text("mine")
    index = json.loads((checkpoints.parent / INDEX).read_text())
    (checkpoints.parent / INDEX).write_text(json.dumps(index | {"checkpoints": [4, 5]}))  # killed while writing it
    assert newest(str(checkpoints), said.append).step == 4 and len(said) == 3


@pytest.mark.parametrize("is_of_run", [True, False])
def test_an_older_versions_partial_checkpoint_is_of_the_run(checkpoints, is_of_run):
    (checkpoints.parent / INDEX).unlink()
    if is_of_run:
        (checkpoints.parent / "config.json").write_text('{"argv": []}')
    (checkpoints / "step_3.partial").mkdir()
    said = []
    save(checkpoints, 3, engines(3.0), said.append)
    assert (checkpoints / "step_3").exists() == is_of_run and ("not written by this run" not in said[0]) == is_of_run


@pytest.mark.parametrize("background", [False, True])
def test_all_is_on_the_disk_before_the_name_says_so(checkpoints, disk_calls, background):
    """Else a power cut could leave a named folder without content, or a checkpoint that is ahead of the metrics."""
    (checkpoints.parent / "metrics.jsonl").touch()
    save(checkpoints, 3, engines(3.0), background=background).finish()
    files = ["policy-rank0.safetensors", "critic-rank0.safetensors", "random-rank0.json", "state.json", "manifest.json"]
    assert sorted(files) == sorted(path.name for path in (checkpoints / "step_3").iterdir())
    index = [("synced", f"{INDEX}.partial"), ("synced", checkpoints.parent.name)]
    assert disk_calls == [
        *index, *(("synced", name) for name in [*files, "metrics.jsonl", "step_3.partial"]),
        ("renamed", "step_3.partial", "step_3"), ("synced", checkpoints.name),
        ("renamed", "step_1", "step_1.partial"), *index,
    ]  # fmt: skip


@pytest.fixture
def held_disk(monkeypatch):
    """An event that lets writing to the disk begin, for threads that write in the background."""
    sync, may_write, main = os.fsync, threading.Event(), threading.main_thread()
    monkeypatch.setattr(
        os, "fsync", lambda handle: (threading.current_thread() is main or may_write.wait(60), sync(handle))
    )
    yield may_write
    may_write.set()


def test_the_run_goes_on_while_the_state_as_it_was_is_written(tmp_path, held_disk):
    """What is changed meanwhile, tensors and the run's own numbers, is not in the files; nor is the name there yet."""
    weight, state, said = torch.arange(5.0), {"step": 1, "stage": {"seen": 1}}, []
    tmp_path /= "checkpoints"
    policy = SimpleNamespace(state_tensors=lambda: {"weight/w/0": weight})
    writer = CheckpointWriter(str(tmp_path), {"policy": policy}, 2)
    writer.save(state, said.append, background=True)
    policy.before_change()  # waits for the copy to the system's cache, not for the disk
    weight += 1
    state["stage"]["seen"] = 2
    writer.finish(wait=False)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1.partial"] and not said
    held_disk.set()
    writer.save({"step": 2}, said.append, background=True)  # waits for the one before
    assert (tmp_path / "step_1").exists()
    writer.finish()
    writer.finish()
    assert [re.sub(r"[\d.]+ s", "_", line) for line in said] == [
        f"checkpoint of step {step}: 0.0 MB in _; the run waited _ for it" for step in (1, 2)
    ]
    assert load_file(tmp_path / "step_1" / "policy-rank0.safetensors")["weight/w/0"].tolist() == [0, 1, 2, 3, 4]
    assert load_file(tmp_path / "step_2" / "policy-rank0.safetensors")["weight/w/0"].tolist() == [1, 2, 3, 4, 5]
    assert json.loads((tmp_path / "step_1" / "state.json").read_text())["stage"] == {"seen": 1}
    assert newest(str(tmp_path), said.append).step == 2


def test_a_checkpoint_takes_one_buffer_of_memory(tmp_path):
    """In the background, too: a limit on the process's memory leaves no room for a second one, nor for the state."""
    state, tmp_path = {"w": torch.arange(PIECE // 4 + 1, dtype=torch.float32)}, tmp_path / "checkpoints"
    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + 3 * PIECE // 2, before[1]))
    try:
        save(tmp_path, 1, {"policy": SimpleNamespace(state_tensors=lambda: state)}, background=True).finish()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert torch.equal(load_file(tmp_path / "step_1" / "policy-rank0.safetensors")["w"], state["w"])


def test_a_failure_to_write_does_not_hold_the_run_up(checkpoints):
    """Of one file: the limit of a shell (ulimit -f). The engines may change at once, and older checkpoints stay."""
    before, said, models = resource.getrlimit(resource.RLIMIT_FSIZE), [], engines(3.0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        writer = save(checkpoints, 3, models, said.append, background=True)
        assert writer._writing.read.wait(60)
        models["policy"].before_change()
        writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said == ["warning: the checkpoint of step 3 was not saved: File too large; older ones are intact"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_1", "step_2"]


@pytest.mark.parametrize("size", [8, 1000, 10**6])
def test_a_file_in_pieces_is_what_safetensors_reads(tmp_path, size):
    """Also where tensors and buffers end at other places; types of every width, a scalar and an empty one."""
    tensors = {
        "a": torch.randn(3, 7), "step": torch.tensor(3), "half": torch.randn(77).bfloat16(), "none": torch.empty(0),
        "é/0": torch.arange(9, dtype=torch.uint8), "slice": torch.arange(90.0)[20:70],
    }  # fmt: skip
    file, buffer = tmp_path / "model.safetensors", torch.empty(size, dtype=torch.uint8)
    entry = write_files(str(tmp_path), {file.name: file_pieces(tensors, buffer)})[file.name]
    content = file.read_bytes()
    assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    header = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:header]).items():
        assert (header + entry["data_offsets"][0]) % tensors[name].element_size() == 0
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_room_in_host_memory_is_what_control_groups_leave(tmp_path):
    v1, v2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")
    groups = {
        "v1/memory/job/step": (v1, "7000", "4000", "total_inactive_file 300"),
        "v1/memory/job": (v1, "9000", "8000", "cache 5\ntotal_inactive_file 500"),
        "v2/user/run": (v2, "max", "100", "inactive_file 0"),
        "v2/user": (v2, "5000", "4000", "inactive_file 1"),
    }
    for folder, (names, *numbers) in groups.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, number in zip((*names, "memory.stat"), numbers, strict=True):
            (tmp_path / folder / name).write_text(f"{number}\n")
    for version, line, room in (("v1", "4:memory:/job/step", 1500), ("v2", "0::/user/run", 1001)):
        (tmp_path / "cgroup").write_text(f"9:cpu:/x\n{line}\n")
        assert group_room(str(tmp_path / "cgroup"), str(tmp_path / version)) == room
