"""The merge commands refuse bad input: one line with flag or file and a remedy, exit code 2, no target.

Cases that need no code of their own are in tests/bad_inputs/merge.yaml.
"""

import fcntl
import io
import json
import os
import re
import resource
import shutil
import signal
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from merge_weight_en import RELEASE as ENGLISH
from merge_weight_zh import RELEASE as CHINESE
from tests.helpers.weights import LAYOUTS, constant_weights, load_folder, random_weights, save_folder
from utils.weight_diff import output_folder
from utils.weight_diff.commands import run

Q_PROJ, UP_PROJ = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
BIN = r"--path_raw: .*pytorch_model\.bin is .*refused: "


@pytest.fixture
def folders(tmp_path) -> Path:
    """A base and a published diff; RELEASE has no sum for a policy."""
    save_folder(tmp_path / "raw", random_weights(1, torch.float16))
    save_folder(tmp_path / "diff", random_weights(2, torch.float16))
    return tmp_path


def command_line(tmp_path, **changes) -> list[str]:
    """`recover` of a policy, with flags changed (None leaves one out)."""
    paths = {f"path_{name}": tmp_path / name for name in ("raw", "diff", "tuned")}
    flags = paths | {"model_type": "policy"} | changes
    command = [str(flags.pop("command", "recover"))]
    for name, value in flags.items():
        command += [] if value is None else [f"--{name}", str(value)]
    return command


@pytest.fixture
def refused(folders, capsys):
    """Asserts that the command is refused in one line, which matches, and creates nothing."""

    def check(pattern: str, release=ENGLISH, **changes) -> None:
        existing = set(folders.iterdir())
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(release, "", command_line(folders, **changes))
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert re.search(pattern, error), error
        assert set(folders.iterdir()) == existing

    return check


def save_bin(folders: Path, content, **options) -> Path:
    """Replaces the base's weights by a pickle of `content`."""
    (folders / "raw" / "model.safetensors").unlink(missing_ok=True)
    torch.save(content, folders / "raw" / "pytorch_model.bin", **options)
    return folders / "raw" / "pytorch_model.bin"


@pytest.mark.parametrize("flag", ["path_raw", "path_diff"])
def test_target_is_an_input(folders, refused, flag):
    source = folders / flag.removeprefix("path_")
    (folders / "link").symlink_to(source)
    for target in (folders / "link", source / ".." / source.name):
        refused(f"--path_tuned .* is the folder of --{flag}", path_tuned=target)


def test_no_space(refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    refused(r"--path_tuned .* needs .* GB, but .* GB are free")


def test_the_disk_fills_up(refused):
    """A limit on the size of files gives the same error of the same call as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        refused("--path_tuned .*cannot be written: .*File too large.*free disk space")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept", [None, 0, 3, 40, 0.5, -1])
def test_missing_or_truncated_shard(folders, refused, layout, kept):
    shutil.rmtree(folders / "diff")
    save_folder(folders / "diff", random_weights(2, torch.float16), layout, shards=2)
    (shard,) = (folders / "diff").glob("*-00001-of-00002.*")
    content = shard.read_bytes()
    if kept is None:
        shard.unlink()
        refused(f"--path_diff: .*diff lacks {shard.name}, which its index names")
    else:
        shard.write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else kept])
        refused(f"--path_diff: .*{shard.name} is .*truncated.*copy it again")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_index_that_names_absent_tensors(folders, refused, layout):
    shutil.rmtree(folders / "raw")
    save_folder(folders / "raw", random_weights(1, torch.float16), layout, shards=2)
    (index,) = (folders / "raw").glob("*.index.json")
    content = json.loads(index.read_text())
    content["weight_map"] |= {f"x{i}": content["weight_map"]["lm_head.weight"] for i in range(7)}
    index.write_text(json.dumps(content))
    refused("--path_raw: the index names tensors that are not in .*: x0, x1, x2, x3, x4 and 2 more;")


def safetensors_with(offsets: list[list[int]]) -> bytes:
    entries = {str(i): {"dtype": "F32", "shape": [16], "data_offsets": place} for i, place in enumerate(offsets)}
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + bytes(max(end for _, end in offsets))


OFFSETS = ([[0, 64], [32, 96]], [[0, 64], [0, 64]], [[0, 64], [-64, 0]], [[0, 64], [96, 160]])  # overlaps, holes


def weights_with(change):
    """Damage that changes the diff's weights."""
    return lambda folder: save_folder(folder / "diff", change(load_folder(folder / "diff")))


def text_in(name: str, content: str):
    return lambda folder: (folder / name).write_text(content)


def without_configs(folder: Path) -> None:
    for side in ("raw", "diff"):
        (folder / side / "config.json").unlink()


def unreadable_even_for_root(folder: Path) -> None:
    (folder / "raw" / "model.safetensors").unlink()
    (folder / "raw" / "model.safetensors").symlink_to("/proc/self/mem")


def too_large(folder: Path) -> None:
    for side in ("raw", "diff"):
        save_folder(folder / side, constant_weights(40000.0, torch.float16))


def safetensors_of(content: bytes):
    return lambda folder: (folder / "raw" / "model.safetensors").write_bytes(content)


def bin_of(change):
    return lambda folder: save_bin(folder, change(random_weights(1)))


HASHES, INDEX = {"dtype": "float16", "sha256": {}}, "raw/model.safetensors.index.json"
MANIFESTS = (3, {}, {"total": 1}, {"total": 1, "raw": HASHES, "tuned": HASHES})
MANIFESTS += ({"total": 1, "tuned": HASHES | {"dtype": "int8"}},)
INDICES = ("{", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {"x": "../diff/y"}}')
NOT_SAFETENSORS = (b"", b"x" * 100, b"\x10" + bytes(7) + b'{"a": {}}       ', *map(safetensors_with, OFFSETS))
DAMAGE = [
    ("--path_raw: no model.safetensors or pytorch_model.bin", lambda x: (x / "raw" / "model.safetensors").unlink()),
    ("--path_raw: .*safetensors is not readable", unreadable_even_for_root),
    *((r"--path_raw: .*index\.json is .*damaged.*copy it again", text_in(INDEX, x)) for x in INDICES),
    *((r"--path_raw: .*safetensors is .*refused", safetensors_of(content)) for content in NOT_SAFETENSORS),
    (f"{BIN}not a state dict", bin_of(lambda weights: {"state_dict": weights})),
    (f"{BIN}not a state dict", bin_of(lambda weights: [1, 2])),
    (f"{BIN}{UP_PROJ} is not contiguous", bin_of(lambda weights: weights | {UP_PROJ: weights[UP_PROJ].T})),
    (f"{BIN}{UP_PROJ} is not contiguous", bin_of(lambda weights: weights | {UP_PROJ: torch.zeros(1).expand(1 << 33)})),
    (f"{BIN}its pickle asks for torch.nn.modules.linear", bin_of(lambda weights: torch.nn.Linear(2, 2))),
    ("--path_diff lacks 8 tensors that --path_raw has: (.*, ){4}.* and 3 more",
     weights_with(lambda x: {"model.embed_tokens.weight": x["model.embed_tokens.weight"]})),
    (r"--path_diff mixes dtypes: .*float32 \(lm_head.weight\)",
     weights_with(lambda x: x | {"lm_head.weight": x["lm_head.weight"].float()})),
    *((f"{UP_PROJ} of the recovered model holds NaN or Inf", weights_with(lambda x, y=y: x | {UP_PROJ: x[UP_PROJ] + y}))
      for y in (torch.nan, torch.inf, -torch.inf)),
    ("of the recovered model has values beyond the range of float16; pass --dtype float32", too_large),
    *((r"--path_diff: .*weight_manifest\.json is .*damaged.*copy it again",
       text_in("diff/weight_manifest.json", json.dumps(x))) for x in MANIFESTS),
    ("no config.json in --path_diff or --path_raw; copy it there", without_configs),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "damage"), DAMAGE)
def test_damaged_folders(folders, refused, pattern, damage):
    damage(folders)
    refused(pattern)


def test_make_diff_of_another_architecture(folders, refused):
    weights = random_weights(2, torch.float16)
    del weights[UP_PROJ]
    save_folder(folders / "tuned", weights)
    refused(f"--path_tuned lacks 1 tensors .*: {UP_PROJ};", command="make_diff", path_diff=folders / "new")


def test_wrong_base_shows_in_the_sum_published_for_the_language(folders, refused):
    save_folder(folders / "diff", random_weights(2, torch.float16, reward_head=True))
    refused("published for --model_type reward is 49954.0859; .*not OpenChinese", release=CHINESE, model_type=None)


def test_a_recovered_model_is_no_diff(folders, refused):
    run(ENGLISH, "", command_line(folders, path_tuned=folders / "model"))
    refused("--path_diff .* is a recovered model", path_diff=folders / "model")


class Touch:
    """Runs a command when a pickle of it is loaded."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.system, (f"touch {self._path}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["value", "whole"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(folders, refused, zipped, place):
    mark = folders / "ran"
    content = random_weights(1) | {"extra": Touch(mark)} if place == "value" else Touch(mark)
    file = save_bin(folders, content, _use_new_zipfile_serialization=zipped)
    refused(rf"{BIN}its pickle asks for posix\.system")
    assert not mark.exists()
    try:
        torch.load(file, weights_only=False)  # the code was live
    finally:
        assert mark.exists()


def repacked(content: bytes, compression: int = zipfile.ZIP_STORED, **changed) -> bytes:
    """The archive of torch.save with records changed (name without dots and slashes -> function)."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for record in old.infolist():
            data, name = old.read(record), re.sub(r"\W", "", record.filename.partition("/")[2])
            new.writestr(record.filename, changed.get(name, lambda same: same)(data))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("changed", "pattern"),
    [
        ({"data0": lambda data: data[:-2]}, "do not agree"),
        ({"data0": lambda data: data + b"xx"}, "do not agree"),
        ({"datapkl": lambda pickled: pickled.replace(b"Kd", b"K\xc8")}, "do not agree"),  # 200 elements, not 100
        ({"byteorder": lambda _: b"big"}, "big-endian"),
        ({"compression": zipfile.ZIP_DEFLATED}, "compressed"),
    ],
)
def test_a_storage_that_is_not_its_record_is_refused(folders, refused, changed, pattern):
    """Otherwise a tensor would be read from the wrong bytes."""
    file = save_bin(folders, {"first": torch.ones(100), **random_weights(1)})
    file.write_bytes(repacked(file.read_bytes(), **changed))
    refused(BIN + f".*{pattern}")


@pytest.mark.parametrize(
    "change",
    [
        lambda index, value: (index + 10**6, value),
        lambda index, value: (index - 10**6, value),
        lambda index, value: (index.flip(0), value),
        lambda index, value: (index, value[1:].clone()),
        lambda index, value: (index.long(), value),
        lambda index, value: (index,),
    ],
)
def test_damaged_patch(folders, refused, change):
    save_folder(folders / "raw", random_weights(1))
    save_folder(folders / "model", random_weights(2))
    shutil.rmtree(folders / "diff")
    run(ENGLISH, "", command_line(folders, command="make_diff", path_tuned=folders / "model"))
    (folders / "diff" / "weight_manifest.json").unlink()
    diff = load_folder(folders / "diff")
    names = [f"{Q_PROJ}.patch_{part}" for part in ("index", "value")]
    patch = change(*(diff.pop(name) for name in names))
    save_file(diff | dict(zip(names, patch)), folders / "diff" / "model.safetensors")
    refused(f"--path_diff: the patch of {Q_PROJ} is damaged")


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
    assert not partial.exists()
    assert not {".being-written", "model-00001.safetensors"} & {file.name for file in (folders / "tuned").iterdir()}
