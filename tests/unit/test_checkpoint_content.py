"""A checkpoint whose hashes are right but whose content no run wrote is damaged: the run goes on to an older one."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppo.state import PPOState, RunState
from reward.stage import RewardState
from tests.helpers.checkpoints import rehash
from tests.helpers.parts import ppo_config, tiny_scalar_model
from utils.engine.engine import TrainEngine, init_distributed, shutdown_distributed
from utils.engine.state import SharedState
from utils.errors import UserError
from utils.files import read_json
from utils.run import checkpoint
from utils.run.checkpoint import CheckpointWriter
from utils.run.restore import named, newest, restore
from utils.run.state_file import write_files
from utils.schema import checked

HEAD = "head.weight"  # the smallest parameter: 32 elements
FLAGS = {"world_size": 1, "train_steps": 9, "critic_pretrain_steps": 1}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Iterator[Path]:
    """Checkpoints of steps 1 and 2, in a process group of one."""
    before = dict(os.environ)
    init_distributed()
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    engine = TrainEngine(tiny_scalar_model(), ppo_config(), "critic")
    writer = CheckpointWriter(str(folder), {"critic": engine}, 2)
    for step in (1, 2):
        train(engine)
        writer.save(RunState(step=step).state_dict() | {"flags": FLAGS}, print)
    yield folder
    shutdown_distributed()
    os.environ.clear()
    os.environ.update(before)


def backward(engine: TrainEngine) -> None:
    """Adds a gradient."""
    ids = torch.arange(2, 20).view(2, 9)
    engine.backward(engine(ids, torch.ones_like(ids)).square().sum())


def train(engine: TrainEngine) -> None:
    """One step."""
    backward(engine)
    engine.measure()
    engine.apply(1e-3)


def in_json(name: str, *keys: str | int, value) -> Callable[[Path], None]:
    """Sets what these keys lead to in a JSON file; None removes it."""

    def damage(checkpoint: Path) -> None:
        content = part = json.loads((checkpoint / name).read_text())
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        if value is None:
            del part[keys[-1]]
        (checkpoint / name).write_text(json.dumps(content))
        rehash(checkpoint)

    return damage


def in_state(*keys: str, value) -> Callable[[Path], None]:
    return in_json("state.json", *keys, value=value)


def in_streams(*keys: str | int, value) -> Callable[[Path], None]:
    return in_json("random-rank0.json", *keys, value=value)


def in_tensors(change: Callable[[dict[str, torch.Tensor]], dict]) -> Callable[[Path], None]:
    """`change` returns the tensors to replace; None removes one."""

    def damage(checkpoint: Path) -> None:
        file = checkpoint / "critic-rank0.safetensors"
        tensors = load_file(file)
        save_file({name: x for name, x in (tensors | change(tensors)).items() if x is not None}, file)
        rehash(checkpoint)

    return damage


def in_manifest(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    return lambda checkpoint: rehash(checkpoint, change)


def fifo_of_no_bytes(checkpoint: Path) -> None:
    """A read of it would wait for ever."""
    (checkpoint / "random-rank0.json").unlink()
    os.mkfifo(checkpoint / "random-rank0.json")
    rehash(checkpoint)


def raw_json(name: str, text: str | bytes) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        rehash(checkpoint)

    return damage


W, M = f"weight/{HEAD}/0", f"exp_avg/{HEAD}/0"
DAMAGE = {
    "step a text": (in_state("step", value="2"), "state.json: step: .* valid integer"),
    "step 0, of which no run writes one": (in_state("step", value=0), "state.json: step: .* greater .*"),
    "no weights at all": (in_tensors(dict.fromkeys), "critic: its files hold no weights"),
    "step negative": (in_state("step", value=-1), "state.json: step: .*"),
    "step with a fraction": (in_state("step", value=2.5), "state.json: step: .*"),
    "step of another folder": (in_state("step", value=1), "state.json is of step 1"),
    "step after the last": (in_state("flags", "train_steps", value=0), "state.json: step 2 is after the last .*"),
    "no flags": (in_state("flags", value=None), "state.json: flags: .*"),
    "flags a list": (in_state("flags", value=[]), "state.json: flags: .*"),
    "no number of ranks": (in_state("flags", "world_size", value=None), "state.json: flags.world_size: .*"),
    "more ranks": (in_state("flags", "world_size", value=10**12), "manifest.json names no random-rank1.json"),
    "no moments": (in_state("moments", value=None), "state.json: moments: .* required"),
    "moments of text": (in_state("moments", "mean", value="0"), "state.json: moments.mean: .*"),
    "NaN": (in_state("moments", "mean", value=float("nan")), "state.json: moments.mean: .* finite .*"),
    "negative squares": (in_state("moments", "squares", value=-1.0), "state.json: moments.squares: .*"),
    "place of a huge number": (in_state("next_place", value=10**400), "state.json: next_place: .*"),
    "more digits than Python reads": (raw_json("state.json", "[" + "9" * 5000), "state.json: Exceeds the limit .*"),
    "deep JSON": (raw_json("state.json", '{"step":' * 200 + "1" + "}" * 200), "state.json: nested too deeply"),
    "JSON of no end of depth": (raw_json("state.json", "[" * 10**6), "state.json: nested too deeply"),
    "not UTF-8": (raw_json("state.json", b"{\xff}"), "state.json: .* can't decode .*"),
    "half a character": (raw_json("state.json", '{"step": 2, "a": "\\ud800"}'), "state.json: .* surrogates .*"),
    "a list": (raw_json("random-rank0.json", "[]"), "random-rank0.json: not a JSON object"),
    "Python's words": (in_streams("python", 1, 3, value=-1), "random-rank0.json: python.1.3: .*"),
    "Python's place": (in_streams("python", 1, 624, value=625), "random-rank0.json: invalid state"),
    "fewer words": (in_streams("python", 1, value=[1]), "random-rank0.json: python.1: .* 625 .*"),
    "NumPy's place, which NumPy would read at": (in_streams("numpy", 2, value=10**6), "random-rank0.json: numpy.2: .*"),
    "NumPy's words": (in_streams("numpy", 1, value="00"), "random-rank0.json: numpy.1: .*"),
    "PyTorch's bytes": (in_streams("torch", value="zz" * 5056), "random-rank0.json: torch: .*"),
    "PyTorch's content": (in_streams("torch", value="ff" * 5056), "random-rank0.json: .*"),
    "streams that the manifest leaves out": (
        in_manifest(lambda entries: {k: v for k, v in entries.items() if "random" not in k}),
        "manifest.json names no random-rank0.json",
    ),
    "size of text": (
        in_manifest(lambda entries: entries | {"state.json": entries["state.json"] | {"bytes": "9"}}),
        "manifest.json: state.json.bytes: .*",
    ),
    "no hash": (in_manifest(lambda entries: entries | {"state.json": {"bytes": 1}}), "manifest.json: .*sha256: .*"),
    "entry null": (in_manifest(lambda entries: entries | {"state.json": None}), "manifest.json: state.json: .*"),
    "manifest a list": (in_manifest(list), "manifest.json: not a JSON object"),
    "a pipe": (fifo_of_no_bytes, "random-rank0.json is not a regular file"),
    "int8": (in_tensors(lambda x: {W: x[W].to(torch.int8)}), "critic: weight/head.weight/0 is I8 .*"),
    "float64": (in_tensors(lambda x: {M: x[M].double()}), "critic: exp_avg/head.weight/0 is F64 .*"),
    "two dimensions": (in_tensors(lambda x: {W: x[W].view(4, 8)}), r"critic: weight/head.weight/0 is F32 \[4, 8\], .*"),
    "no start": (in_tensors(lambda x: {"weight/a": torch.ones(1)}), "critic: weight/a is .*"),
    "negative start": (in_tensors(lambda x: {"weight/a/-1": torch.ones(1)}), "critic: weight/a/-1 is .*"),
    "no beginning": (in_tensors(lambda x: {W: None, f"weight/{HEAD}/3": x[W][3:].clone()}), ".* overlap or have gaps"),
    "a gap": (
        in_tensors(lambda x: {W: x[W][:3].clone(), f"weight/{HEAD}/4": x[W][4:].clone()}),
        "critic: the parts of weight/head.weight, 32 elements, overlap or have gaps",
    ),
    "an overlap": (in_tensors(lambda x: {f"weight/{HEAD}/31": torch.ones(1)}), ".* overlap or have gaps"),
    "a part twice": (in_tensors(lambda x: {f"weight/{HEAD}/00": x[W].clone()}), ".* overlap or have gaps"),
    "fewer moments": (
        in_tensors(lambda x: {M: x[M][:31].clone()}),
        "critic: weight and exp_avg have other sizes of head.weight",
    ),
    "no moment of a parameter": (
        in_tensors(lambda x: {M: None}),
        "critic: weight and exp_avg have other sizes of head.weight",
    ),
    "one kind of moments": (
        in_tensors(lambda x: dict.fromkeys(k for k in x if "exp_avg/" in k)),
        "critic: it has step 2 .*",
    ),
    "no step of Adam": (in_tensors(lambda x: {"step": None}), "critic: it has step None .*"),
    "step of Adam": (
        in_tensors(lambda x: {"step": torch.tensor(float("nan"))}),
        "critic: step is not one whole number.*",
    ),
    "steps of Adam": (in_tensors(lambda x: {"step": torch.ones(2)}), "critic: step is not one whole number.*"),
    "an unknown kind": (in_tensors(lambda x: {"bias/a/0": torch.ones(1)}), "critic: it has step 2 .*"),
    "no safetensors": (raw_json("critic-rank0.safetensors", "{}"), "critic: .*header.*"),
}


@pytest.fixture
def checkpoints(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoints"))


@pytest.mark.parametrize("case", DAMAGE)
def test_wrong_content_under_right_hashes_is_damage(checkpoints, case):
    damage, reason = DAMAGE[case]
    said: list[str] = []
    damage(checkpoints / "step_2")
    assert newest(str(checkpoints), said.append, PPOState).step == 1
    assert len(said) == 1 and re.search(rf"step_2 is damaged \({reason}\); trying an older one$", said[0])


def test_what_the_manifest_does_not_name_is_not_read(checkpoints):
    """Also not a second share of an engine, which a glob would find."""
    step_2 = checkpoints / "step_2"
    weights = load_file(step_2 / "critic-rank0.safetensors")
    save_file({W: weights[W] + 1}, step_2 / "critic-rank9.safetensors")
    (step_2 / "notes.txt").write_text("mine")
    engine = TrainEngine(tiny_scalar_model(seed=7), ppo_config(), "critic")
    restore(newest(str(checkpoints), print, PPOState), {"critic": engine})
    assert torch.equal(engine.full_state_dict()[HEAD].flatten(), weights[W])


@pytest.mark.parametrize(
    "stage",
    [{"zero_stage": 0}, *({"zero_stage": i, "offload_optimizer": off} for i in (2, 3) for off in (False, True))],
    ids=lambda stage: "-".join(map(str, stage.values())),
)
def test_a_change_waits_until_the_state_before_it_has_been_read(sound, tmp_path, monkeypatch, stage):
    """What a bad step does needs no wait, since it changes nothing. Here the thread begins late to read."""
    monkeypatch.setattr(checkpoint, "write_files", lambda *args: (time.sleep(0.1), write_files(*args))[1])
    engine = TrainEngine(tiny_scalar_model(), ppo_config(**stage), "critic")
    other = SharedState([str(sound / "step_1" / "critic-rank0.safetensors")])
    changes = {
        "bad step": lambda: (backward(engine), engine.measure(), engine.drop_gradients()),
        "step": lambda: train(engine),
        "scaling": lambda: engine.scale_weight(HEAD, 2.0),
        "loading": lambda: engine.load_state(other),
    }
    train(engine)
    writer = CheckpointWriter(str(tmp_path / "checkpoints"), {"critic": engine}, 1)
    for i, (name, change) in enumerate(changes.items()):
        before = {key: x.clone() for key, x in engine.state_tensors().items()}
        writer.save({"step": i}, print, background=True)
        change()
        writer.finish()
        after, saved = engine.state_tensors(), load_file(tmp_path / f"checkpoints/step_{i}/critic-rank0.safetensors")
        assert all(torch.equal(x, saved.pop(key)) for key, x in before.items()) and not saved, name
        same = all(torch.equal(x, after[key]) for key, x in before.items())
        assert same == (name == "bad step"), name


@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_numbers_that_no_step_leaves_are_refused(checkpoints, kind, value):
    """Found while they are read into the engine: another pass over all files would take as long again."""
    key = f"{kind}/{HEAD}/0"
    in_tensors(lambda x: {key: x[key].index_fill(0, torch.tensor(5), value)})(checkpoints / "step_2")
    engine = TrainEngine(tiny_scalar_model(), ppo_config(), "critic")
    found = named(str(checkpoints / "step_2"), PPOState)
    if value == -1.0 and kind != "exp_avg_sq":
        restore(found, {"critic": engine})
        return
    with pytest.raises(UserError, match=r"step_2 is damaged \(critic: .* not finite, .*\); remove it"):
        restore(found, {"critic": engine})


def test_a_reward_models_state_has_its_center():
    sound = {"step": 1, "best": -0.5, "stage": {"center": 0.1}, "flags": FLAGS}
    for change in ({}, {"best": None}, {"best": float("-inf")}):
        checked(RewardState, sound | change)
    better_than_all = ({"best": float("nan")}, {"best": float("inf")})
    for change in ({"stage": {}}, {"stage": {"center": "0"}}, {"best": "0"}, {"stage": None}, *better_than_all):
        with pytest.raises(ValueError, match=r"^(stage|best)"):
            checked(RewardState, sound | change)


def test_json_is_read_from_files_alone(tmp_path):
    """A pipe would wait for ever, a device without end; and a file has a limit."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "none.json").symlink_to("none.json")
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate((1 << 26) + 1)
    reasons = {
        "pipe.json": "not a regular file", "folder.json": "Is a directory", "none.json": "Too many levels",
        "large.json": "more than 64 MB", "/dev/zero": "not a regular file",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=rf"--flag: .* is damaged or not readable \(.*{reason}.*\); copy it again"):
            read_json(tmp_path / name, "--flag")
    (tmp_path / "marked.json").write_bytes(b'\xef\xbb\xbf{"a": 1, "a": 2}')
    assert read_json(tmp_path / "marked.json") == {"a": 2}
