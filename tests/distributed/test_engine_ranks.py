"""Engines on several ranks: state that changes hands, gradients summed in float32, frozen models that are split."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.jobs import SHAPE
from tests.faults.scenarios import finished, run_forked
from tests.helpers.accumulation import error
from tests.helpers.tiny import tiny_llama
from utils.engine.settings import PERSISTENT

# (dtype of the weights, dtype in which gradients add up): groups that hand over, RANKS:ZERO_STAGE[:offload].
CHAINS = {
    ("fp32", "bf16"): ["2:2", "1:0", "3:1", "1:3", "2:3", "1:2", "3:3", "2:2:offload", "1:0"],
    ("bf16", "bf16"): ["2:3", "3:2", "1:3", "2:1", "3:3"],
    ("bf16", "fp32"): ["2:2", "1:2", "2:3", "1:3"],
}


def whole(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """(kind, parameter) -> all its elements, put together from all files; and ("step", "") -> Adam's steps."""
    parts = defaultdict(list)
    for path in checkpoint.glob("policy-rank*.safetensors"):
        for key, tensor in load_file(path).items():
            if key == "step":
                parts["step", ""] = [(0, tensor.float().view(1))]
            else:
                kind, name, start = key.split("/")
                parts[kind, name].append((int(start), tensor))
    return {key: torch.cat([x for _, x in sorted(found, key=lambda part: part[0])]) for key, found in parts.items()}


SLOW = [pytest.param(dtypes, marks=pytest.mark.slow) if dtypes == ("bf16", "bf16") else dtypes for dtypes in CHAINS]


@pytest.mark.parametrize("dtypes", SLOW, ids="-".join)
def test_the_state_survives_every_change_of_ranks_and_stage(dtypes, tmp_path):
    chain, rows = CHAINS[dtypes], {}
    for i, text in enumerate(chain):
        ranks, stage, *offload = text.split(":")
        words = [str(tmp_path), i, i == len(chain) - 1, *dtypes, int(stage), bool(offload)]
        row = {"module": "tests.distributed.jobs", "function": "hand_over", "argv": words, "ranks": int(ranks)}
        rows[f"{i}: {text}"] = row
    finished(run_forked(tmp_path, rows))
    first = whole(tmp_path / "0" / "step_2")
    assert {kind for kind, _ in first} == {"weight", "exp_avg", "exp_avg_sq", "step"}
    assert float(first["step", ""]) == 2 and all(x.dtype == torch.float32 for x in first.values())
    for number in range(1, len(chain)):
        other = whole(tmp_path / str(number) / "step_2")
        assert other.keys() == first.keys()
        assert [key for key, tensor in first.items() if not torch.equal(tensor, other[key])] == [], chain[number]
    before = {name: tensor for (kind, name), tensor in first.items() if kind == "weight"}
    after = load_file(tmp_path / "trained.safetensors")
    assert after.keys() == before.keys()
    moved = torch.cat([(after[name].float().flatten() - before[name]).abs() for name in before])
    assert 5e-4 < float(moved.mean()) < 2e-3  # Adam goes on: about lr per element, from the moments of three steps


def test_two_ranks_add_gradients_up_in_float32(tmp_path):
    """They exchange gradients in bf16: the float32 sum is the closer one by far."""
    rows, errors = {}, {}
    for case in ((2, "bf16"), (2, "fp32"), (3, "bf16"), (3, "fp32")):
        (folder := tmp_path / str(case)).mkdir()
        rows[str(case)] = {"module": "tests.helpers.accumulation", "function": "one_rank", "argv": [str(folder), *case]}
    finished(run_forked(tmp_path, rows))
    for case in rows:
        files = sorted((tmp_path / case).glob("*.safetensors"))
        assert len(files) == 2
        errors[case] = error({key: x for file in files for key, x in load_file(file).items()})
    assert max(errors.values()) < 0.1  # nothing is left of the gradients that were dropped before
    for stage in (2, 3):
        assert errors[str((stage, "fp32"))] < 0.25 * errors[str((stage, "bf16"))], errors


@pytest.mark.slow
def test_two_ranks_step_as_if_nothing_had_been_in_host_memory(tmp_path):
    cases = [(1, "bf16"), (2, "fp32"), (3, "bf16"), (3, "fp32")]
    files = {case: str(tmp_path / f"{case}.json") for case in cases}
    job = {"module": "tests.distributed.jobs", "function": "offload_between_steps"}
    finished(run_forked(tmp_path, {str(case): job | {"argv": [file, *case]} for case, file in files.items()}))
    for file in files.values():
        for rank in json.loads(Path(file).read_text()):
            assert rank["differing"] == [] and rank["tensors"] > 20


# (family, stage of what is trained, offload). LongCat's experts are called one by one, those that a rank's tokens need.
FROZEN = {
    "ZeRO-1": ("llama", 1, False),
    "ZeRO-2, offloaded": ("llama", 2, True),
    "experts": ("longcat_flash", 2, False),
}
RANKS = 3  # do not divide the sizes of the matrices, so that the last rank's shards are padded


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> dict[str, list[dict]]:
    """Case -> what each rank found."""
    folder = tmp_path_factory.mktemp("frozen")
    row = {"module": "tests.distributed.jobs", "function": "score_with_frozen", "ranks": RANKS}
    rows = {name: row | {"argv": [str(folder / f"{name}.json"), *case]} for name, case in FROZEN.items()}
    finished(run_forked(folder, rows))
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in FROZEN}


@pytest.mark.parametrize("case", FROZEN)
def test_a_split_frozen_model_scores_as_the_whole_one_and_is_compared_with_it(frozen, case):
    for own in frozen[case]:
        assert max(own["off"]) < 1e-5
        assert own["linear"], "torch.nn.functional.linear is replaced for the models that are trained, too"
    assert [own["same"] for own in frozen[case]] == [[True] * 3] * RANKS
    assert [own["changed"] for own in frozen[case]] == [[True] * 2] * (RANKS - 1) + [[False] * 2]


@pytest.mark.parametrize("case", ["ZeRO-1", "ZeRO-2, offloaded"])
def test_a_rank_holds_its_share_of_a_frozen_model(frozen, case):
    numels = [p.numel() for p in tiny_llama(**SHAPE).parameters()]
    shards = sum(-(-n // RANKS) for n in numels)
    small = sum(n for n in numels if n <= PERSISTENT)
    assert shards + small < sum(numels) / 2  # norms, and of this tiny model its key and value projections
    for first, *later in (own["held"] for own in frozen[case]):
        assert first == shards and max(later) <= shards + small
