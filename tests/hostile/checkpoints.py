"""Cases of checkpoints, whose hashes are right again."""

import json
from functools import partial
from pathlib import Path

import torch

from tests.hostile.case import Case, named, shown, some, values_of
from tests.hostile.changes import (
    REMOVED,
    Change,
    all_of,
    fifo,
    header,
    holding,
    in_place,
    named_too,
    nested,
    rehash,
    tensors,
    without,
)
from tests.hostile.configs import PLACES
from tests.hostile.configs import again as kept
from tests.hostile.weights import HEADERS as WEIGHT_HEADERS

RUN = {"model_save_path": "{model}", "train_steps": 2, "checkpoint_per_step": 1, "report_to": "none"}
fit = partial(Case, "sft", "fit_run", flags=RUN)
ppo = partial(Case, "ppo", "ppo_run", flags=RUN | {"critic_pretrain_steps": 0})
HUGE = 10**15
NAN, INF = float("nan"), float("inf")
STEP = "checkpoints/step_1"
STATE = {
    "": [3, None, [], "x", {}],
    "step": [-1, 0, 2, 7, HUGE, 1.5, "1", None, True, [1], NAN, REMOVED],
    "best": ["x", [], NAN, INF, {}, REMOVED],
    "stage": [3, None, [], "x", REMOVED],
    "flags": [3, None, [], {}, "x", REMOVED],
    "flags.lr": ["x", None, REMOVED],
    "flags.world_size": [0, "x", -1],
    "flags.replaced_defaults": [3, []],
    "flags.no_such": [3],
}  # fmt: skip
PPO_STATE = {
    "next_place": [-8, HUGE * 10**6, "8", None, 1.5, [], REMOVED],
    "moments": [3, None, [], {}, REMOVED],
    "moments.mean": ["x", None, NAN, INF, []],
    "moments.count": [-1, 1.5, "8", None, HUGE * 10**6],
    "moments.squares": [-1, NAN, "x", None],
    "best_score": ["x", None, NAN, []],
    "pretrain_place": [-1, HUGE, "x"],
    "left_out": [-1, "x", None],
    "rollbacks": [-1, "x", HUGE],
    "critic_center": ["x", NAN, [], 10**400],
    "value_moments": [3, [], {}, {"mean": NAN, "count": 1, "squares": 0.0}],
    "unfinished": [3, "x", [], {}, {"metrics": {}, "samples": []}],
}  # fmt: skip
STREAMS = {
    "": [3, [], None, {}],
    "python": [3, [], None, [3, [], None], [3, ["x"] * 625, None], [2, [0] * 625, None], [3, [-1] * 625, None], [3,
    [2**40] * 625, None]],
    "numpy": [3, [], ["PCG64", "00", 0, 0, 0.0], ["MT19937", "zz", 0, 0, 0.0], ["MT19937", "00", 0, 0, 0.0],
    ["MT19937", "00" * 2496, 10**9, 0, 0.0],
              ["MT19937", "00" * 2496, -1, 0, 0.0], ["MT19937", "00" * 2496, 0, "x", 0.0]],
    "torch": [3, "", "zz", "00", None, "00" * 5056, "ff" * 5056],
    "gpu": [3, "zz"],
}  # fmt: skip
ENTRY = {"bytes": 3, "sha256": "0" * 64}
MANIFEST = {
    "": [3, [], None, {}, {"state.json": {}}],
    "state.json": [3, None, [], {"bytes": -1, "sha256": "0" * 64}, {"bytes": "x", "sha256": 3}, {"bytes": 1e400,
    "sha256": ""}, REMOVED],
    "model-rank0.safetensors": [REMOVED, {}, {"bytes": None}],
    "random-rank0.json": [REMOVED],
    "../../config.json": [ENTRY],
    "/etc/passwd": [ENTRY],
    "no_such": [ENTRY],
}  # fmt: skip


LATER = "a flag that a checkpoint does not know was added later"
ANOTHER = "another number of processes is no reason to stop, and the run says so"
NUMBER = "an evaluation may be any number"
MAY = {
    "best = NaN": NUMBER,
    "best = Infinity": NUMBER,
    "flags = {}": LATER,
    "flags.lr = left out": LATER,
    "flags.no_such = 3": LATER,
} | {f"flags.world_size = {x}": ANOTHER for x in ("0", "x", "-1")}
MAY_PPO = {
    "moments.count = 1000000000000000000000": "a count may be large",
    "rollbacks = 1000000000000000": "then there are no rollbacks left",
    "pretrain_place = 1000000000000000": "without the pre-training loss it is not used",
}
PYTHON_2 = "Python's own older form"
GPU = "only read on a GPU"
MAY_STREAMS = {"gpu = 3": GPU, "gpu = zz": GPU, "python = [2, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,…": PYTHON_2}


def table(name: str, values: dict, make, accepted: dict) -> dict[str, Case]:
    """Cases of a JSON file in the checkpoint, whose hash is right again."""
    found = values_of(f"{STEP}/{name}", values, lambda change: make(all_of(change, again)), accepted)
    return {title.removeprefix(f"{STEP}/"): case for title, case in found.items()}


def again(folder: Path) -> None:
    rehash(folder / STEP)


def manifest(key: str, value) -> Change:
    """Another entry in the manifest; "" is the whole of it."""

    def change(folder: Path) -> None:
        file = folder / STEP / "manifest.json"
        content = json.loads(file.read_text())
        if not key:
            content = value
        elif value is REMOVED:
            del content[key]
        else:
            content[key] = value
        file.write_text(json.dumps(content))

    return change


MODEL = f"{STEP}/model-rank0.safetensors"
NORM = "lm.model.norm.weight"
W, M, V = (f"{kind}/{NORM}/0" for kind in ("weight", "exp_avg", "exp_avg_sq"))


def parts(edit) -> Change:
    """Other tensors in the engine's file, whose hash is right again."""
    return all_of(tensors(MODEL, edit), again)


def swapped(key: str, value) -> Change:
    """Another tensor under a key; None takes it out."""

    def edit(state: dict) -> dict:
        return {k: x for k, x in (state | {key: value}).items() if x is not None}

    return parts(edit)


def renamed(old: str, new: str) -> Change:
    """A tensor under another name."""
    return parts(lambda state: {new if name == old else name: x for name, x in state.items()})


def each(dtype: torch.dtype) -> Change:
    """All tensors in another type."""
    return parts(lambda state: {name: x.to(dtype) for name, x in state.items()})


TENSORS = {
    "a weight left out": swapped(W, None), "a moment left out": swapped(M, None), "both moments left out": parts(
        lambda s: {k: x for k, x in s.items() if k not in (M, V)}),
    "no moments": parts(lambda s: {k: x for k, x in s.items() if not k.startswith("exp_avg")}),
    "no second moments": parts(lambda s: {k: x for k, x in s.items() if not k.startswith("exp_avg_sq")}),
    "no step": swapped("step", None), "no tensors": parts(lambda s: {"step": s["step"]}),
    "a negative step": swapped("step", torch.tensor(-5.0)), "a huge step": swapped("step", torch.tensor(1e30)),
    "a step of NaN": swapped("step", torch.tensor(NAN)), "a step of a half": swapped("step", torch.tensor(0.5)),
    "a list of steps": swapped("step", torch.ones(3)), "no number as step": swapped("step", torch.ones(0)),
    "another step": swapped("step", torch.tensor(9.0)), "weights in int8": each(torch.int8),
    "weights in float64": each(torch.float64),
    "weights in bfloat16": each(torch.bfloat16), "weights in bool": each(torch.bool), "one weight in int64": swapped(W,
    torch.ones(32).long()),
    "a moment in float16": swapped(M, torch.ones(32).half()), "NaN in a weight": swapped(W, torch.full((32,), NAN)),
    "NaN in a moment": swapped(M, torch.full((32,), NAN)), "infinite moments": swapped(V, torch.full((32,), INF)),
    "negative squares": swapped(V, -torch.ones(32)), "a weight that is too long": swapped(W, torch.ones(33)),
    "a weight that is too short": swapped(W, torch.ones(31)), "an empty weight": swapped(W, torch.ones(0)),
    "a weight of two dimensions": swapped(W, torch.ones(4, 8)), "a scalar": swapped(W, torch.tensor(1.0)),
    "a moment that is too short": swapped(M, torch.ones(31)), "a moment that is too long": swapped(M, torch.ones(3200)),
    "overlapping stretches": parts(lambda s: s | {W: torch.ones(20), f"weight/{NORM}/12": torch.ones(12)}),
    "a hole and an overlap": parts(lambda s: s | {W: torch.ones(10), f"weight/{NORM}/20": torch.ones(12),
    f"weight/{NORM}/22": torch.ones(10)}),
    "a start beyond the end": renamed(W, f"weight/{NORM}/{10**18}"), "a negative start": renamed(W,
    f"weight/{NORM}/-1"),
    "a start of text": renamed(W, f"weight/{NORM}/x"), "a start with a sign": renamed(M, f"exp_avg/{NORM}/+0"),
    "no start": renamed(W, f"weight/{NORM}"), "a part more": renamed(W, f"weight/a/{NORM}/0"),
    "an unknown kind": renamed(M, f"exp_max/{NORM}/0"),
    "a kind more": parts(lambda s: s | {f"max_exp_avg_sq/{NORM}/0": torch.ones(32)}),
    "an unknown parameter": renamed(W, "weight/no.such/0"),
    "a parameter more": parts(lambda s: s | {"weight/no.such/0": torch.ones(3)}), "an empty name": renamed(W, ""),
    "an escape in a name": renamed(W, "weight/\x1b[2J/0"), "a moment of nothing": parts(lambda s: s
    | {"exp_avg/no.such/0": torch.ones(3)}),
}  # fmt: skip
HEADER = (
    "overlapping",
    "negative offsets",
    "offsets that fall",
    "a shape beyond its bytes",
    "no such dtype",
    "deep",
    "a hole",
)


def placed(edit, key: str):
    """An edit of a header, made for the weights of a model, on the entry `key`."""
    names = {"model.norm.weight": key, "model.layers.0.mlp.up_proj.weight": M, "model.layers.1.mlp.up_proj.weight": V}

    def change(found: dict):
        inner = {name: found[other] for name, other in names.items()}
        given = edit(inner)
        for name, other in names.items():
            found.pop(other)
            if name in inner:
                found[other] = inner[name]
        return given if given is not None else None

    return change


STATE_FILE, MANIFEST_FILE, SECOND = f"{STEP}/state.json", f"{STEP}/manifest.json", f"{STEP}/model-rank1.safetensors"


def second(change: Change) -> Change:
    """One more file of weights, which the manifest names rightly."""
    return all_of(change, lambda folder: named_too("model-rank1.safetensors")(folder / STEP), again)


def copied(folder: Path) -> None:
    (folder / SECOND).write_bytes((folder / MODEL).read_bytes())


def moved(folder: Path) -> None:
    (folder / STEP).rename(folder / "moved")


FILES = {
    "a file that the manifest does not name": holding(SECOND, b"x" * 99),
    "a second copy of the weights": second(copied),
    "a foreign file, named": second(holding(SECOND, b"x" * 99)),
    "no weights": all_of(without(MODEL), manifest("model-rank0.safetensors", REMOVED)),
    "a FIFO as weights": in_place(MODEL, fifo), "a folder as weights": in_place(MODEL, lambda path: path.mkdir()),
    "a FIFO as streams": in_place(f"{STEP}/random-rank0.json", fifo), "a FIFO as checkpoint": all_of(moved,
    lambda f: fifo(f / STEP)),
    "a file as checkpoint": all_of(moved, holding(STEP, "x")), "an empty state": all_of(holding(STATE_FILE, ""), again),
    "step_7 with the state of step 1": lambda f: (f / STEP).rename(f / "checkpoints/step_7"),
    "a folder step_999… of 200 digits": lambda f: (f / "checkpoints" / ("step_" + "9" * 200)).mkdir(),
    "a deep state": all_of(holding(STATE_FILE, nested(100_000)), again), "an empty manifest": holding(MANIFEST_FILE,
    ""),
    "a state that is not UTF-8": all_of(holding(STATE_FILE, b'{"step": 1, "x": "\xff"}'), again),
    "a deep manifest": holding(MANIFEST_FILE, nested(100_000)),
}  # fmt: skip
FILES |= {f"{title} as state": in_place(STATE_FILE, build) for title, build in PLACES.items()}
FILES |= {f"{title} as manifest": in_place(MANIFEST_FILE, build) for title, build in PLACES.items()}
MAY_TENSORS = {
    "another step": "a step of a run makes several steps of the optimizer",
    "a start with a sign": "it is the same number",
}
UNNAMED = "what the manifest does not name is not read"
MAY_FILES = {
    "a folder step_999… of 200 digits": "an older checkpoint is intact",
    "a file that the manifest does not name": UNNAMED,
}
IN_HEADER = {title: all_of(header(MODEL, placed(WEIGHT_HEADERS[title], W)), again) for title in HEADER}
ENTRIES = {f"{key or 'all'} = {shown(x)}": manifest(key, x) for key, values in MANIFEST.items() for x in values}
OWN = {"random-rank0.json = left out": "a rank without streams keeps its own"}
resumed = partial(
    Case, "sft", "fit_run", flags=RUN | {"resume": "{model}/checkpoints/step_1", "model_save_path": "{folder}/out"}
)
OF_RESUME = ("a FIFO as state", "a FIFO as manifest", "no weights", "a deep state", "a file as checkpoint")
CASES = (
    table("state.json", STATE, fit, MAY)
    | named("PPO's {}", table("state.json", PPO_STATE, ppo, MAY_PPO), kept)
    | table("random-rank0.json", STREAMS, fit, MAY_STREAMS)
    | named("manifest.json: {}", ENTRIES, fit, OWN)
    | named("checkpoint: {}", TENSORS, fit, MAY_TENSORS)
    | named("checkpoint: header: {}", IN_HEADER, fit)
    | named("checkpoint: {}", FILES, fit, MAY_FILES)
    | named("--resume: {}", some(FILES, *OF_RESUME), resumed)
)
