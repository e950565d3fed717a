"""The merge commands refuse bad input: one line with flag or file and a remedy, exit code 2, target untouched.

What of it needs no code of its own is in tests/bad_inputs/merge.yaml.
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
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from merge_weight_en import RELEASE as ENGLISH
from merge_weight_zh import RELEASE as CHINESE
from tests.helpers.weights import CONFIG, LAYOUTS, constant_weights, load_folder, random_weights, save_folder
from utils.weight_diff import output_folder
from utils.weight_diff.commands import run

Q_PROJ, UP_PROJ = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folders(tmp_path):
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
    """Asserts that the command is refused in one line before there is a target; gives that line."""

    def check(release=ENGLISH, target="tuned", **changes) -> str:
        before = {path: path.stat().st_mtime_ns for path in (folders / "raw", folders / "diff")}
        existing = set(folders.iterdir())
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(release, "", command_line(folders, **changes))
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert set(folders.iterdir()) == existing
        assert before == {path: path.stat().st_mtime_ns for path in before}
        return error

    return check


def test_model_type_has_a_default_where_one_model_is_published(folders, refused):
    assert "--model_type reward, but --path_diff lacks reward_head.weight" in refused(release=CHINESE, model_type=None)


@pytest.mark.parametrize("flag", ["path_raw", "path_diff", "path_tuned"])
def test_target_is_there_already(folders, refused, flag):
    if flag == "path_tuned":
        (folders / "tuned").mkdir()
        (folders / "tuned" / "kept").write_text("kept")
        assert re.search("--path_tuned .*tuned exists already: give a new folder", refused())
        assert (folders / "tuned" / "kept").read_text() == "kept"
    else:
        source = folders / flag.removeprefix("path_")
        link = folders / "link"
        link.symlink_to(source)
        for target in (source, link, source / ".." / source.name):
            assert re.search(f"--path_tuned .* is the folder of --{flag}: give a new one", refused(path_tuned=target))


def test_the_target_of_make_diff_is_the_diff(folders, refused):
    save_folder(folders / "tuned", random_weights(3))
    error = refused(command="make_diff")
    assert re.search("--path_diff .*diff exists already: give a new folder", error)


def test_target_below_a_file(folders, refused):
    (folders / "file").write_text("kept")
    error = refused(path_tuned=folders / "file" / "tuned")
    assert re.search("--path_tuned .*cannot be written: .*file is not a writable folder; choose another place", error)


def test_no_space(refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    assert re.search(r"--path_tuned .* needs 0\.00 GB, but 0\.00 GB are free on its disk: free some", refused())


def test_the_disk_fills_up(folders, refused):
    """A limit on the size of files stands in for the full disk: the same error comes out of the same call."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, hard))
    try:
        error = refused()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.search(
        "--path_tuned .*cannot be written .*File too large.*: free the disk, or give another folder", error
    )


def test_no_weights_in_hugging_face_layout(folders, refused):
    (folders / "raw" / "model.safetensors").rename(folders / "raw" / "consolidated.00.safetensors")
    error = refused()
    assert re.search("--path_raw: no model.safetensors or pytorch_model.bin .*raw; .*convert Meta's own files", error)


def test_weights_of_another_kind_of_model(folders, refused):
    save_folder(folders / "raw", {"transformer.wte.weight": torch.ones(3, 2)})
    assert re.search("--path_raw: no model.embed_tokens.weight in .*raw; give a LLaMA", refused())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_shard(folders, refused, layout):
    shutil.rmtree(folders / "raw")
    save_folder(folders / "raw", random_weights(1, torch.float16), layout, shards=3)
    (shard,) = (folders / "raw").glob("*-00002-of-00003.*")
    shard.unlink()
    assert re.search(f"--path_raw: .*raw lacks {shard.name}, which its index names; copy", refused())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept", [0, 3, 40, 0.5, -1])
def test_truncated_shard(folders, refused, layout, kept):
    shutil.rmtree(folders / "diff")
    save_folder(folders / "diff", random_weights(2, torch.float16), layout, shards=2)
    (shard,) = (folders / "diff").glob("*-00001-of-00002.*")
    content = shard.read_bytes()
    shard.write_bytes(content[: int(kept * len(content)) if 0 < kept < 1 else kept])
    assert re.search(f"--path_diff: .*{shard.name} is .*truncated.*copy it again", refused())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_index_that_names_absent_tensors(folders, refused, layout):
    shutil.rmtree(folders / "raw")
    save_folder(folders / "raw", random_weights(1, torch.float16), layout, shards=2)
    (index,) = (folders / "raw").glob("*.index.json")
    content = json.loads(index.read_text())
    first = content["weight_map"]["lm_head.weight"]
    content["weight_map"] |= {f"model.layers.{i}.mlp.gate_proj.weight": first for i in range(7)}
    index.write_text(json.dumps(content))
    names = ", ".join(f"model.layers.{i}.mlp.gate_proj.weight" for i in range(5))
    assert re.search(f"--path_raw: the index names tensors that are not in .*: {names} and 2 more; .*copy", refused())


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {"lm_head.weight": "../diff/model.safetensors"}}']
)
def test_damaged_index(folders, refused, content):
    (folders / "raw" / "model.safetensors.index.json").write_text(content)
    assert re.search(r"--path_raw: .*index\.json is .*damaged.*copy it again", refused())


def test_file_that_cannot_be_read(folders, refused):
    """Reading this one fails even for root."""
    (folders / "raw" / "model.safetensors").unlink()
    (folders / "raw" / "model.safetensors").symlink_to("/proc/self/mem")
    assert re.search(r"--path_raw: .*safetensors is not readable.*copy it again", refused())


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x10" + bytes(7) + b'{"a": {}}       ', b"\xff" * 8])
def test_file_that_is_no_safetensors(folders, refused, content):
    (folders / "raw" / "model.safetensors").write_bytes(content)
    assert re.search(r"--path_raw: .*safetensors is not readable, truncated or refused.*copy it again", refused())


class Touch:
    """What runs when a pickle of it is loaded."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.system, (f"touch {self._path}",)


@pytest.mark.parametrize("layout", ["zip", "legacy"])
@pytest.mark.parametrize("place", ["value", "whole"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(folders, refused, layout, place):
    mark, file = folders / "ran", folders / "raw" / "pytorch_model.bin"
    weights = random_weights(1)
    content = weights | {"extra": Touch(mark)} if place == "value" else Touch(mark)
    (folders / "raw" / "model.safetensors").unlink()
    torch.save(content, file, _use_new_zipfile_serialization=layout == "zip")
    error = refused()
    assert re.search(
        r"--path_raw: .*pytorch_model\.bin is .*refused: its pickle asks for posix\.system.*safetensors", error
    )
    assert not mark.exists()
    try:
        torch.load(file, weights_only=False)  # the code was live
    finally:
        assert mark.exists()


def test_pickles_of_other_things(folders, refused):
    (folders / "raw" / "model.safetensors").unlink()
    file, weights = folders / "raw" / "pytorch_model.bin", random_weights(1)
    for content, pattern in (
        ({"state_dict": weights}, "refused: not a state dict of tensors alone"),
        ([1, 2], "refused: not a state dict of tensors alone"),
        (weights | {UP_PROJ: weights[UP_PROJ].T}, f"refused: {UP_PROJ} is not contiguous; save it again"),
        (weights | {UP_PROJ: torch.zeros(1).expand(1 << 33)}, f"refused: {UP_PROJ} is not contiguous; save it again"),
        (torch.nn.Linear(2, 2), "refused: its pickle asks for torch.nn.modules.linear.Linear"),
    ):
        torch.save(content, file)
        assert re.search(f"--path_raw: .*{pattern}", refused())


def repacked(content: bytes, compression: int = zipfile.ZIP_STORED, **changed) -> bytes:
    """The archive of torch.save with records changed (name without dots and slashes -> function)."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for record in old.infolist():
            data, name = old.read(record), re.sub(r"\W", "", record.filename.partition("/")[2])
            new.writestr(record.filename, changed.get(name, lambda same: same)(data))
    return stream.getvalue()


def longer(pickled: bytes) -> bytes:
    """A pickle whose first tensor, and its storage, has 200 elements instead of 100."""
    assert pickled.count(b"Kd") >= 2
    return pickled.replace(b"Kd", b"K\xc8")


@pytest.mark.parametrize(
    ("changed", "pattern"),
    [
        ({"data0": lambda data: data[:-2]}, "its pickle and its records do not agree"),
        ({"data0": lambda data: data + b"xx"}, "its pickle and its records do not agree"),
        ({"datapkl": longer}, "its pickle and its records do not agree"),
        ({"byteorder": lambda _: b"big"}, "its numbers are big-endian"),
        ({"compression": zipfile.ZIP_DEFLATED}, "its records are compressed"),
    ],
)
def test_a_storage_that_is_not_its_record_is_refused(folders, refused, changed, pattern):
    """Else a tensor would be read out of what comes after it in the file, or as other numbers."""
    (folders / "raw" / "model.safetensors").unlink()
    stream = io.BytesIO()
    torch.save({"first": torch.ones(100), **random_weights(1)}, stream)
    (folders / "raw" / "pytorch_model.bin").write_bytes(repacked(stream.getvalue(), **changed))
    assert re.search(f"--path_raw: .*pytorch_model.bin is .*refused: {pattern}", refused())


@pytest.mark.parametrize("old, new", [(b"Kd", b"K\xc8"), (b"d" + bytes(7), b"e" + bytes(7))])
def test_a_storage_of_another_size_is_refused_in_the_older_layout(folders, refused, old, new):
    (folders / "raw" / "model.safetensors").unlink()
    file = folders / "raw" / "pytorch_model.bin"
    torch.save({"first": torch.ones(100), **random_weights(1)}, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new))
    assert re.search("--path_raw: .*pytorch_model.bin is .*refused: storage has wrong byte size", refused())


@pytest.mark.parametrize(
    "offsets", [[[0, 64], [32, 96]], [[0, 64], [0, 64]], [[0, 64], [-64, 0]], [[0, 64], [96, 160]]]
)
def test_safetensors_whose_tensors_overlap_or_leave_holes_are_refused(folders, refused, offsets):
    entries = {str(i): {"dtype": "F32", "shape": [16], "data_offsets": place} for i, place in enumerate(offsets)}
    header = json.dumps(entries).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(max(end for _, end in offsets))
    (folders / "raw" / "model.safetensors").write_bytes(content)
    assert re.search("--path_raw: .*model.safetensors is .*refused: Error while deserializing header: inv", refused())


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch | {"index": patch["index"] + 10**6},
        lambda patch: patch | {"index": patch["index"].flip(0)},
        lambda patch: patch | {"value": patch["value"][1:].clone()},
        lambda patch: patch | {"index": patch["index"].long()},
        lambda patch: {"index": patch["index"]},
    ],
)
def test_damaged_patch(folders, refused, change):
    save_folder(folders / "raw", random_weights(1))
    save_folder(folders / "diff", random_weights(2))
    shutil.move(folders / "diff", folders / "model")
    run(ENGLISH, "", command_line(folders, command="make_diff", path_tuned=folders / "model"))
    (folders / "diff" / "weight_manifest.json").unlink()
    diff = load_folder(folders / "diff")
    patch = change({part: diff.pop(f"{Q_PROJ}.patch_{part}") for part in ("index", "value")})
    save_file(
        diff | {f"{Q_PROJ}.patch_{part}": tensor for part, tensor in patch.items()},
        folders / "diff" / "model.safetensors",
    )
    assert re.search(f"--path_diff: the patch of {Q_PROJ} is damaged; copy the diff again", refused())


def without(weights, *names):
    return {name: value for name, value in weights.items() if name not in names}


def test_key_sets_that_differ(folders, refused):
    raw, diff = random_weights(1, torch.float16), random_weights(2, torch.float16)
    save_folder(folders / "raw", without(raw, UP_PROJ))
    assert re.search(f"--path_raw lacks 1 tensors that --path_diff has: {UP_PROJ}; give", refused())
    save_folder(folders / "raw", raw)
    save_folder(folders / "diff", without(diff, "lm_head.weight"))
    assert re.search("--path_diff lacks 1 tensors that --path_raw has: lm_head.weight; give", refused())
    save_folder(folders / "diff", without(diff, *[name for name in diff if "layers" in name]))
    assert re.search(
        r"--path_diff lacks 6 tensors that --path_raw has: (model.layers[\w.]+, ){4}model[\w.]+ and 1 more", refused()
    )


def test_shapes_that_differ(folders, refused):
    diff = random_weights(2, torch.float16)
    save_folder(folders / "diff", diff | {UP_PROJ: diff[UP_PROJ][:-1].clone()})
    shapes = r"has shape \[20, 8\] in --path_raw and \[19, 8\] in --path_diff"
    assert re.search(f"{UP_PROJ} {shapes}; give folders of models of one size", refused())


def test_a_model_of_another_architecture_has_no_diff(folders, refused):
    command = {"command": "make_diff", "path_diff": folders / "new", "path_tuned": folders / "tuned"}
    save_folder(folders / "tuned", without(random_weights(3, torch.float16), UP_PROJ))
    assert re.search(f"--path_tuned lacks 1 tensors that --path_raw has: {UP_PROJ}; give", refused(**command))


def test_mixed_dtypes(folders, refused):
    diff = random_weights(2, torch.float16)
    save_folder(folders / "diff", diff | {UP_PROJ: diff[UP_PROJ].float()})
    error = refused()
    assert re.search(r"--path_diff mixes dtypes: .*; give weights that are all of one dtype", error)
    assert f"float32 ({UP_PROJ})" in error
    save_folder(folders / "diff", {name: value.to(torch.int8) for name, value in diff.items()})
    assert re.search(r"--path_diff holds int8 .*: give weights in one of float16, bfloat16, float32", refused())


@pytest.mark.parametrize(
    ("side", "value"), [("raw", torch.nan), ("diff", torch.nan), ("raw", torch.inf), ("diff", -torch.inf)]
)
def test_result_that_is_not_finite(folders, refused, side, value):
    weights = load_folder(folders / side)
    weights[Q_PROJ][3, 5] = value
    save_folder(folders / side, weights)
    assert re.search(f"{Q_PROJ} of the recovered model holds NaN or Inf: .*copy", refused())


def test_result_beyond_the_range_of_its_dtype(folders, refused):
    for side in ("raw", "diff"):
        save_folder(folders / side, constant_weights(40000.0, torch.float16))
    assert re.search("of the recovered model has values beyond the range of float16: give --dtype float32", refused())


def test_wrong_base_shows_in_the_sum(folders, refused):
    pattern = "the sum of all tensors is .*, that published for --model_type {} is {}: give {} as --path_raw, or copy"
    assert re.search(pattern.format("sft", "50874.8477", "LLaMA-7B .*layout"), refused(model_type="sft"))
    save_folder(folders / "diff", random_weights(2, torch.float16, reward_head=True))
    error = refused(release=CHINESE, model_type="reward")
    assert re.search(pattern.format("reward", "49954.0859", "LLaMA-7B .*not OpenChineseLLaMA"), error)


def test_wrong_base_shows_in_the_manifest(folders, capsys, refused):
    shutil.move(folders / "diff", folders / "model")
    run(ENGLISH, "", command_line(folders, command="make_diff", path_tuned=folders / "model"))
    raw = load_folder(folders / "raw")
    save_folder(folders / "raw", raw | {Q_PROJ: raw[Q_PROJ] * 2})
    assert re.search(f"{Q_PROJ} of --path_raw is not the tensor that this diff was made against: give LLaMA", refused())


def test_a_recovered_model_is_no_diff(folders, refused):
    run(ENGLISH, "", command_line(folders, path_tuned=folders / "model"))
    assert re.search(
        "--path_diff .* is a recovered model.*give the folder of a diff", refused(path_diff=folders / "model")
    )


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "3",
        "{}",
        '{"total": 1}',
        json.dumps({"total": 1} | {part: {"dtype": "float16", "sha256": {}} for part in ("raw", "tuned")}),
        '{"total": 1, "tuned": {"dtype": "int8", "sha256": {}}}',
    ],
)
def test_damaged_manifest(folders, refused, content):
    (folders / "diff" / "weight_manifest.json").write_text(content)
    assert re.search(r"--path_diff: .*weight_manifest\.json is .*damaged.*copy it again", refused())


def test_config_that_is_absent_or_of_another_model(folders, refused):
    (folders / "diff" / "config.json").write_text(json.dumps(CONFIG | {"model_type": "gpt2"}))
    assert re.search("--path_diff: .*config.json is not of a LLaMA model; copy", refused())
    for side in ("raw", "diff"):
        (folders / side / "config.json").unlink()
    assert re.search("no config.json in --path_diff or --path_raw; copy it there", refused())


def test_damaged_tokenizer(folders, refused):
    (folders / "diff" / "tokenizer.model").write_bytes(b"no tokenizer")
    assert re.search("--path_diff: .*tokenizer.model is damaged.*copy it again", refused())


@pytest.fixture
def interruptible():
    """Ctrl-C works here as in a terminal; a shell starts its background jobs with SIGINT ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_no_target_and_the_next_run_works(folders, monkeypatch, stop, code):
    write = output_folder.save_file

    def interrupted(*arguments, **options):
        write(*arguments, **options)
        os.kill(os.getpid(), stop)

    before, handler = set(folders.iterdir()), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(output_folder, "save_file", interrupted)
        run(ENGLISH, "", command_line(folders))
    assert stopped.value.code == code
    assert set(folders.iterdir()) == before
    run(ENGLISH, "", command_line(folders))
    assert (folders / "tuned" / "model.safetensors").is_file()
    assert signal.getsignal(signal.SIGTERM) == handler


def test_what_a_killed_run_left_goes_and_what_others_wrote_stays(folders, refused):
    partial = folders / "tuned.partial"
    partial.mkdir()
    (partial / "model-00001.safetensors").write_text("half")
    assert re.search(
        "--path_tuned: .*tuned.partial is in the way, and no run of this command has left it: move", refused()
    )
    assert (partial / "model-00001.safetensors").read_text() == "half"
    (partial / ".being-written").touch()
    with open(partial / ".being-written") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        assert re.search("--path_tuned: another run is writing .*tuned.partial: wait for it", refused())
    run(ENGLISH, "", command_line(folders))
    assert not partial.exists()
    assert not list((folders / "tuned").glob(".*"))
    assert not (folders / "tuned" / "model-00001.safetensors").exists()
