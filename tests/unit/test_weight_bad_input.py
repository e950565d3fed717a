"""The merge commands refuse bad input: one line with flag or file and a remedy, exit code 2, no target.

Cases that need no code of their own are in tests/bad_inputs/merge.yaml; live pickles in tests/security/test_code.py.
"""

import fcntl
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge_weight_en import RELEASE as ENGLISH
from merge_weight_zh import RELEASE as CHINESE
from tests.helpers.tiny_run import as_argv
from tests.helpers.weights import LAYOUTS, constant_weights, load_folder, random_weights, save_folder
from utils.errors import UserError
from utils.weight_diff import output_folder
from utils.weight_diff.commands import run
from utils.weight_diff.manifest import Hashes, Manifest, read_manifest

Q_PROJ, UP_PROJ = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
BIN = r"--path_raw: .*pytorch_model\.bin is .*refused: "


@pytest.fixture
def folders(tmp_path) -> Path:
    """A base and a published diff; RELEASE has no sum for a policy."""
    save_folder(tmp_path / "raw", random_weights(1, torch.float16))
    save_folder(tmp_path / "diff", random_weights(2, torch.float16))
    return tmp_path


def command_line(tmp_path, command="recover", **changes) -> list[str]:
    """A command for a policy, with flags changed (None leaves one out)."""
    flags = {f"path_{name}": tmp_path / name for name in ("raw", "diff", "tuned")} | {"model_type": "policy"}
    return [command, *as_argv(flags | changes)]


@pytest.fixture
def refused(folders, capsys):
    """Asserts that the command is refused in one line, which matches, and creates nothing."""

    def check(pattern: str, release=ENGLISH, **changes) -> None:
        existing = set(folders.iterdir())
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(release, "", command_line(folders, **changes))
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert re.search(pattern, error), error
        assert set(folders.iterdir()) == existing

    return check


def save_bin(folders: Path, content) -> Path:
    """Replaces the base's weights by a pickle of `content`."""
    (folders / "raw" / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, folders / "raw" / "pytorch_model.bin")
    return folders / "raw" / "pytorch_model.bin"


def binary(change):
    """Damage that pickles something else than the base's weights."""
    return lambda folders: save_bin(folders, change(random_weights(1)))


def file(name: str, content: bytes | str):
    """Damage that writes a file."""
    return lambda folders: (folders / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def index(content: str):
    """Damage that puts an index in the place of the base's single file, which would come before it."""
    return lambda x: (
        (x / "raw" / "model.safetensors").rename(x / "raw" / "model.safetensors.index.json").write_text(content)
    )


def safetensors_with(*offsets: list[int]) -> bytes:
    entries = {str(i): {"dtype": "F32", "shape": [16], "data_offsets": place} for i, place in enumerate(offsets)}
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(max(end for _, end in offsets))


INDICES = ("{", "[" * 200_000, '{"weight_map": 3}', '{"weight_map": {"x": "../diff/y"}}')
NOT_SAFETENSORS = (b"", b"x" * 100, b"\x10" + bytes(7) + b'{"a": {}}       ')
NOT_SAFETENSORS += tuple(safetensors_with([0, 64], x) for x in ([32, 96], [-64, 0], [96, 160]))
EMPTY = {"dtype": "float16", "sha256": {}}
MANIFESTS = (
    3, {"total": 1, "tuned": {"dtype": "int8", "sha256": {}}}, {"total": "1", "tuned": EMPTY}, {"tuned": EMPTY},
    {"total": math.nan, "tuned": EMPTY}, {"total": 1, "tuned": EMPTY, "raw": EMPTY}, {"total": 1, "tuned": None},
    {"total": 1, "tuned": {"dtype": "float16", "sha256": {"lm_head.weight": "0"}}},
)  # fmt: skip
DAMAGE = [
    ("--path_raw: no model.safetensors or pytorch_model.bin", lambda x: (x / "raw" / "model.safetensors").unlink()),
    *((r"--path_raw: .*index\.json is .*damaged", index(x)) for x in INDICES),
    *((r"--path_raw: .*safetensors is .*refused", file("raw/model.safetensors", x)) for x in NOT_SAFETENSORS),
    (f"{BIN}not a state dict", binary(lambda x: {"state_dict": x})),
    (f"{BIN}{UP_PROJ} is not contiguous", binary(lambda x: x | {UP_PROJ: x[UP_PROJ].T})),
    (f"{BIN}{UP_PROJ} is not contiguous", binary(lambda x: x | {UP_PROJ: torch.zeros(1).expand(1 << 33)})),
    (f"{BIN}its pickle asks for torch.nn.modules.linear", binary(lambda x: torch.nn.Linear(2, 2))),
    ("values beyond the range of float16; pass --dtype float32",
     lambda x: [save_folder(x / side, constant_weights(4e4, torch.float16)) for side in ("raw", "diff")]),
    *(("--path_diff: .*weight_manifest.json is .*damaged", file("diff/weight_manifest.json", json.dumps(x)))
      for x in MANIFESTS),
    ("no config.json in --path_diff or --path_raw",
     lambda x: [(x / side / "config.json").unlink() for side in ("raw", "diff")]),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "damage"), DAMAGE)
def test_damaged_folders(folders, refused, pattern, damage):
    damage(folders)
    refused(pattern)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept", ["absent name", None, 40, -1])
def test_missing_or_truncated_shard(folders, refused, layout, kept):
    shutil.rmtree(folders / "diff")
    save_folder(folders / "diff", random_weights(2, torch.float16), layout, shards=2)
    (shard,), (index,) = (list((folders / "diff").glob(name)) for name in ("*-00001-of-00002.*", "*.index.json"))
    content, names = shard.read_bytes(), json.loads(index.read_text())
    if kept == "absent name":
        index.write_text(json.dumps({"weight_map": names["weight_map"] | {"x0": shard.name}}))
        refused("--path_diff: the index names tensors that are not in .*: x0;")
    elif kept is None:
        shard.unlink()
        refused(f"--path_diff: .*diff lacks {shard.name}, which its index names")
    else:
        shard.write_bytes(content[:kept])
        refused(f"--path_diff: .*{shard.name} is .*truncated.*copy it again")


def test_the_disk_fills_up(refused):
    """A limit on the size of files gives the same error of the same call as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        refused("--path_tuned .*cannot be written: .*File too large.*free disk space")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def repacked(content: bytes, compression: int = zipfile.ZIP_STORED, **changed) -> bytes:
    """The archive of torch.save with records changed (name without dots and slashes -> function)."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for record in old.infolist():
            name = re.sub(r"\W", "", record.filename.partition("/")[2])
            new.writestr(record.filename, changed.get(name, lambda same: same)(old.read(record)))
    return stream.getvalue()


REPACKED = [
    ("do not agree", {"data0": lambda data: data[:-2]}),
    ("do not agree", {"datapkl": lambda pickled: pickled.replace(b"Kd", b"K\xc8")}),  # 200 elements, not 100
    ("big-endian", {"byteorder": lambda _: b"big"}),
    ("compressed", {"compression": zipfile.ZIP_DEFLATED}),
]


@pytest.mark.parametrize(("pattern", "changed"), REPACKED)
def test_a_storage_that_is_not_its_record_is_refused(folders, refused, pattern, changed):
    """Otherwise a tensor would be read from the wrong bytes."""
    path = save_bin(folders, {"first": torch.ones(100), **random_weights(1)})
    path.write_bytes(repacked(path.read_bytes(), **changed))
    refused(f"{BIN}.*{pattern}")


PATCHES = [
    lambda index, value: (index + 10**6, value),
    lambda index, value: (index.flip(0), value),
    lambda index, value: (index, value[1:].clone()),
    lambda index, value: (index,),
]


@pytest.mark.parametrize("change", PATCHES)
def test_damaged_patch(folders, refused, change):
    save_folder(folders / "raw", random_weights(1))
    save_folder(folders / "model", random_weights(2))
    shutil.rmtree(folders / "diff")
    run(ENGLISH, "", command_line(folders, "make_diff", path_tuned=folders / "model"))
    (folders / "diff" / "weight_manifest.json").unlink()
    diff, names = load_folder(folders / "diff"), [f"{Q_PROJ}.patch_{part}" for part in ("index", "value")]
    patch = change(*(diff.pop(name) for name in names))
    save_file(diff | dict(zip(names, patch)), folders / "diff" / "model.safetensors")
    refused(f"--path_diff: the patch of {Q_PROJ} is damaged")


def test_what_the_commands_are_not_for(folders, refused):
    """A recovered model in place of a diff, a base of another language."""
    run(ENGLISH, "", command_line(folders, path_tuned=folders / "model"))
    refused("--path_diff .* is a recovered model", path_diff=folders / "model")
    save_folder(folders / "diff", random_weights(2, torch.float16, reward_head=True))
    refused("published for --model_type reward is 49954.0859; .*not OpenChinese", CHINESE, model_type=None)


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_no_target_and_the_next_run_works(folders, monkeypatch, stop, code):
    write, before = output_folder.save_file, set(folders.iterdir())
    handlers = signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)

    def interrupted(*arguments, **options):
        write(*arguments, **options)
        os.kill(os.getpid(), stop)

    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(output_folder, "save_file", interrupted)
            run(ENGLISH, "", command_line(folders))
    finally:
        signal.signal(signal.SIGINT, handlers[0])
    assert stopped.value.code == code and set(folders.iterdir()) == before
    assert signal.getsignal(signal.SIGTERM) == handlers[1]
    run(ENGLISH, "", command_line(folders))
    assert (folders / "tuned" / "model.safetensors").is_file()


def test_what_a_killed_run_left_is_removed_and_what_others_wrote_stays(folders, refused):
    partial = folders / "tuned.partial"
    partial.mkdir()
    (partial / "model-00001.safetensors").write_text("half")
    refused("--path_tuned: .*tuned.partial exists and was not written by this command")
    assert (partial / "model-00001.safetensors").read_text() == "half"
    (partial / ".being-written").touch()
    with open(partial / ".being-written") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        refused("--path_tuned: another run is writing .*tuned.partial")
    run(ENGLISH, "", command_line(folders))
    left = {path.name for path in (folders / "tuned").iterdir()}
    assert not partial.exists() and not left & {".being-written", "model-00001.safetensors"}


def test_a_manifest_may_say_more_but_not_be_a_pipe(tmp_path):
    """Ignored, it would leave the weights unverified."""
    manifest = tmp_path / "weight_manifest.json"
    manifest.write_text(json.dumps({"total": 1, "tuned": EMPTY | {"more": 1}, "raw": None, "more": 1}))
    assert read_manifest(tmp_path, "--path_diff") == Manifest(1, Hashes(**EMPTY))
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(UserError, match=r"--path_diff: .*weight_manifest.json is damaged .* not a regular file"):
        read_manifest(tmp_path, "--path_diff")
