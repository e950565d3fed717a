"""Which files a run's inputs are, and the cache of their hashes."""

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.sources import Source, parts_of
from ppo.config import PPOConfig
from reward.config import RewardConfig
from sft.config import SFTConfig
from utils.errors import UserError
from utils.hub import data_revision, downloaded
from utils.run import fingerprints as module
from utils.run.fingerprints import INPUTS, changes, code_files, fingerprints

WEIGHTS = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}


def write(folder: Path, **contents: str) -> Path:
    """A folder of files by name; __ stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def found(flag: str, value) -> dict:
    return fingerprints(SimpleNamespace(split="train", valid_split="", **{flag: value}), print).get(flag, {})


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("config", [PPOConfig, SFTConfig, RewardConfig])
def test_every_flag_that_names_an_input_is_one(config):
    names = {field.name for field in dataclasses.fields(config)} - {"model_save_path"}
    assert {name for name in names if name.endswith(("_path", "_fn", "advantage_estimator"))} == names & INPUTS.keys()


@pytest.mark.parametrize(
    ("names", "read"),
    [
        ("config.json model.safetensors pytorch_model.bin README.md notes.txt", "config.json model.safetensors"),
        (
            "config.json pytorch_model.bin vocab.txt merges.txt x.py",
            "config.json pytorch_model.bin vocab.txt merges.txt",
        ),
        ("tokenizer.model chat_template.jinja consolidated.safetensors", "tokenizer.model chat_template.jinja"),
        (
            "model.safetensors model.safetensors.index.json vocab.json eval_results.json trainer_state.json",
            "model.safetensors vocab.json",
        ),
    ],
)
def test_files_of_a_model_are_those_that_are_read(tmp_path, names, read):
    write(tmp_path, **dict.fromkeys(names.split(), "x"))
    assert found("policy_model_path", str(tmp_path)) == dict.fromkeys(read.split(), sha("x"))


def test_additional_chat_templates_are_read(tmp_path):
    write(tmp_path / "additional_chat_templates", tools__jinja="x")
    for flag in ("policy_model_path", "tokenizer_name_or_path"):
        assert found(flag, str(tmp_path)) == {"additional_chat_templates/tools.jinja": sha("x")}


def test_shards_are_those_of_the_index(tmp_path):
    index = json.dumps(WEIGHTS)
    parts = {f"part-{i}.safetensors": str(i) for i in (1, 2, 3)}  # the index does not name the third
    write(tmp_path, **{"model.safetensors.index.json": index}, **parts)
    wanted = {"model.safetensors.index.json": sha(index)} | {f"part-{i}.safetensors": sha(str(i)) for i in (1, 2)}
    assert found("policy_model_path", str(tmp_path)) == wanted
    for damaged in ("{}", "[]", '{"weight_map": 1}', "{", "[" * 100_000):  # its loader says so
        (tmp_path / "model.safetensors.index.json").write_text(damaged)
        assert found("policy_model_path", str(tmp_path)) == {}


def test_files_of_data_functions_and_tokenizers(tmp_path):
    data = write(tmp_path / "d", train__json="1", a_train__jsonl="2", valid__json="3", test__json="4", b_train__csv="5")
    assert set(found("data_path", str(data))) == {"train.json", "a_train.jsonl", "valid.json", "b_train.csv"}
    assert found("data_path", str(data / "b_train.csv")) == {"the .csv file": sha("5")}
    both = found("data_path", [str(data / "b_train.csv"), str(data)])
    assert set(both) == {"the .csv file", "2/train.json", "2/a_train.jsonl", "2/valid.json", "2/b_train.csv"}
    code = write(tmp_path / "c", f__py="x") / "f.py"
    assert found("reward_fn", f"{code}:f") == {"the function": "f", "the file": sha("x")}
    words = write(tmp_path / "t", my__model="x", tokenizer_config__json="{}", other__json="{}")
    alone = found("tokenizer_name_or_path", str(words / "my.model"))
    assert alone == {"tokenizer.model": sha("x"), "tokenizer_config.json": sha("{}")}


def test_what_cannot_be_read_has_no_fingerprint(tmp_path):
    """Nor does it stop or hold up anything: the loaders explain it."""
    os.mkfifo(tmp_path / "train.json")
    (tmp_path / "loop_train.json").symlink_to("loop_train.json")
    for value in (str(tmp_path), "/nowhere", "", "\0", str(tmp_path / "train.json"), "no/where"):
        assert found("data_path", value) == {} == found("policy_model_path", value)
    name = os.fsdecode(b"\xff_train.json")
    (tmp_path / name).write_text("x")
    assert json.dumps(found("data_path", str(tmp_path)), ensure_ascii=False).encode()


def test_hub_ids_are_the_snapshots_that_are_read(tmp_path, monkeypatch):
    """Of data sets, the commit. Both are read from Hugging Face's caches."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    model, commit = tmp_path / "models--some--model", "0123456789abcdef" * 2 + "01234567"
    write(model / "refs", main=commit)
    write(model / "snapshots" / commit, config__json="x", model__safetensors="y")
    assert found("policy_model_path", "some/model") == {"config.json": sha("x"), "model.safetensors": sha("y")}
    assert found("tokenizer_name_or_path", "some/model") == {"config.json": sha("x")}
    info = json.dumps({"config_name": "default", "version": {"version_str": "0.0.0"}, "splits": {}})
    write(tmp_path / "some___data" / "default" / "0.0.0" / commit, dataset_info__json=info)
    assert found("data_path", "some/data") == {"the revision": commit}
    assert found("data_path", "other/data") == {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", None
    )  # each is asked for once, in all of a node's processes
    assert found("tokenizer_name_or_path", "some/model") == {"config.json": sha("x")}
    assert downloaded["some/data", "data"] == commit


def test_a_data_set_that_needs_code_of_its_own():
    """`datasets` raises RuntimeError."""
    with pytest.raises(OSError, match="scripts are no longer supported"):
        data_revision("some/script.py")
    with pytest.raises(UserError, match=r"^--data_path: cannot load some/script.py .Dataset scripts are no longer"):
        parts_of(Source("some/script.py"))


def test_changes_are_named():
    assert changes({"a": "1", "b": "1", "c": "1"}, {"a": "1", "b": "2", "d": "1"}) == (
        "b has other content, c is missing, d is new"
    )
    assert changes({"a": "1"}, {"a": "1"}) == ""
    assert changes({}, {f"{i}": "" for i in range(9)}).endswith("4 is new and 4 more")


def test_the_code_is_all_of_the_toolkits_python_files():
    files = code_files()
    assert {"train_ppo.py", "ppo/loss.py", "utils/run/fingerprints.py", "data/formats/records.py"} <= files.keys()
    assert not [name for name in files if name.startswith(("tests", "outputs", ".venv"))]
    assert files["train_ppo.py"] == sha(Path(module.__file__).parents[2].joinpath("train_ppo.py").read_text())


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The cache's file, in a home of the test's own. Files are cached at any size and age."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "MIN_CACHED", 0)
    monkeypatch.setattr(module, "MIN_AGE", -1)
    return tmp_path / "cache" / "ppo-max" / "sha256.json"


def test_a_file_that_did_not_change_is_not_read_again(tmp_path, cache):
    folder = write(tmp_path / "m", config__json="before")
    file = folder / "config.json"
    assert found("policy_model_path", str(folder)) == {"config.json": sha("before")}
    ((key, digest),) = json.loads(cache.read_text())["sha256"].items()
    assert digest == sha("before")
    cache.write_text(json.dumps({"sha256": {key: "0" * 64}}))  # shows where the next answer comes from
    assert found("policy_model_path", f"{folder}/") == {"config.json": "0" * 64}
    times = file.stat()
    file.write_text("after.")  # as many bytes
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert found("policy_model_path", str(folder)) == {"config.json": sha("after.")}
    other = tmp_path / "m2"
    os.replace(folder, other)
    assert found("policy_model_path", str(other)) == {"config.json": sha("after.")}
    assert len(json.loads(cache.read_text())["sha256"]) == 3


def test_small_files_and_those_that_just_changed_are_not_cached(tmp_path, cache, monkeypatch):
    folder = write(tmp_path / "m", config__json="x")
    monkeypatch.setattr(module, "MIN_CACHED", 2)
    found("policy_model_path", str(folder))
    monkeypatch.setattr(module, "MIN_CACHED", 0)
    monkeypatch.setattr(module, "MIN_AGE", 10**9)
    found("policy_model_path", str(folder))
    assert not cache.exists()
    time.sleep(1.1)
    found("policy_model_path", str(folder))
    assert cache.exists()


DAMAGE = {
    "no JSON": "{", "a list": "[]", "no entries": "{}", "other types": '{"sha256": {"a": 1}}', "deep": "[" * 100_000,
    "no hash": '{"sha256": {"KEY": "../x"}}',
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_no_cache(tmp_path, cache, damage):
    folder = write(tmp_path / "m", config__json="x")
    found("policy_model_path", str(folder))
    (key,) = json.loads(cache.read_text())["sha256"]
    cache.write_text(DAMAGE[damage].replace("KEY", key))
    assert found("policy_model_path", str(folder)) == {"config.json": sha("x")}
    assert json.loads(cache.read_text()) == {"sha256": {key: sha("x")}}


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, cache, monkeypatch):
    folder = write(tmp_path / "m", config__json="x")
    wanted = {"config.json": sha("x")}
    os.makedirs(cache)  # a folder in its place
    assert found("policy_model_path", str(folder)) == wanted
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]
    for home in (str(folder / "config.json"), "relative", "/proc/nowhere"):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        assert found("policy_model_path", str(folder)) == wanted
    assert not Path("relative").exists()


def test_the_cache_has_a_bound_and_loses_the_oldest_entries(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(module, "MAX_CACHED", 3)
    for i in range(5):
        found("data_path", str(write(tmp_path / "d", **{f"{i}__json": str(i)}) / f"{i}.json"))
    assert list(json.loads(cache.read_text())["sha256"].values()) == [sha(str(i)) for i in (2, 3, 4)]


def test_names_keep_the_order_of_values(tmp_path):
    paths = [str(write(tmp_path / name, train__json=name)) for name in ("b", "a")]
    assert found("data_path", paths) == {"train.json": sha("b"), "2/train.json": sha("a")}
