"""`sft.train` under the deepspeed launcher: two ranks, packed, make the numbers, texts and weights of one, unpacked."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from sft.train import main
from tests.ranks import launch
from tests.tiny import SAMPLES, tiny_llama_folder
from tests.tiny_run import read_lines, read_metrics


def flags(base: Path, out: Path, **changes) -> list[str]:
    dialogues = SAMPLES / "en" / "dialogues"
    values = {
        "hf_model_name_or_path": base, "data_path": f"{dialogues} {dialogues / 'train.json'}", "data_weights": "2 1",
        "model_save_path": out, "train_steps": 3, "warmup_steps": 1, "batch_size": 7, "context_truncate": 256,
        "lr": 1e-3, "save_per_step": 2, "dtype": "fp32", "num_valid": 3, "maxlen_res": 12,
    } | changes  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", *str(value).split())]


def test_two_ranks_equal_one(tmp_path):
    """Under ZeRO-3 without room for whole weights, in micro-batches of which the ranks need different numbers."""
    base, one, two = tiny_llama_folder(tmp_path / "base"), tmp_path / "one", tmp_path / "two"
    main(flags(base, one, packing=False))
    done = launch(flags(base, two, zero_stage=3, micro_batch_tokens=200), "tests/distributed/no_room.py")
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = read_metrics(two), read_metrics(one)
    assert [set(row) for row in ours] == [set(row) for row in theirs]
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert read_lines(two / "samples.jsonl") == read_lines(one / "samples.jsonl")
    weights, expected = (load_file(folder / "final" / "model.safetensors") for folder in (two, one))
    assert set(weights) == set(expected)
    for name, tensor in weights.items():
        assert (tensor - expected[name]).abs().max() < 1e-4, name
