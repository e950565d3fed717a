"""`sft.train`: two ranks, packed, make the numbers, texts and weights of one, unpacked."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from sft.train import main
from tests.faults.scenarios import finished, run_forked
from tests.helpers.tiny import SAMPLES, tiny_llama_folder
from tests.helpers.tiny_run import read_lines, read_metrics


def flags(base: Path, out: Path, **changes) -> list[str]:
    dialogues = SAMPLES / "en" / "dialogues"
    values = {
        "hf_model_name_or_path": base, "data_path": f"{dialogues} {dialogues / 'train.json'}", "data_weights": "2 1",
        "model_save_path": out, "train_steps": 3, "warmup_steps": 1, "batch_size": 7, "context_truncate": 256,
        "lr": 1e-3, "save_per_step": 2, "dtype": "fp32", "num_valid": 3, "maxlen_res": 12,
    } | changes  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", *str(value).split())]


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> tuple[Path, Path]:
    """(a model, the run of one process that starts from it)."""
    folder = tmp_path_factory.mktemp("single")
    base = tiny_llama_folder(folder / "base")
    main(flags(base, folder / "run", packing=False))
    return base, folder / "run"


@pytest.fixture(scope="module")
def double(single, tmp_path_factory) -> dict[int, Path]:
    """ZeRO stage -> the run of two; under ZeRO-3 without room for whole weights.

    In micro-batches of which the ranks need different numbers.
    """
    folder, (base, _) = tmp_path_factory.mktemp("double"), single
    rows = {
        stage: {
            "module": "sft.train", "fault": "no room" if stage == 3 else None,
            "argv": flags(base, folder / str(stage), zero_stage=stage, micro_batch_tokens=200),
        }
        for stage in (2, 3)
    }  # fmt: skip
    return finished(run_forked(folder, rows))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_ranks_equal_one(single, double, zero_stage):
    one, two = single[1], double[zero_stage]
    ours, theirs = read_metrics(two), read_metrics(one)
    assert [set(row) for row in ours] == [set(row) for row in theirs]
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert read_lines(two / "samples.jsonl") == read_lines(one / "samples.jsonl")
    weights, expected = (load_file(folder / "final" / "model.safetensors") for folder in (two, one))
    assert set(weights) == set(expected)
    for name, tensor in weights.items():
        assert (tensor - expected[name]).abs().max() < 1e-4, name
