"""`reward.train`: two ranks make the numbers and the weights of one process."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from reward.train import main
from tests.faults.scenarios import finished, run_forked
from tests.helpers.tiny import SAMPLES, tiny_llama_folder
from tests.helpers.tiny_run import read_lines


def flags(base: Path, out: Path, **changes) -> list[str]:
    values = {
        "hf_model_name_or_path": base,
        "data_path": SAMPLES / "en" / "preferences",
        "model_save_path": out,
        "train_steps": 4,
        "warmup_steps": 1,
        "batch_size": 5,  # an odd number: the ranks' shares differ, and so do their numbers of micro-batches
        "context_truncate": 256,
        "lr": 1e-3,
        "save_per_step": 2,
        "dtype": "fp32",
        "micro_batch_tokens": 200,
        "reward_lm_loss_factor": 0.5,
        "use_margin": True,
        "label_smoothing": 0.1,
        "simcse_coef": 0.5,  # its negatives are the pairs of both ranks
        "simcse_dropout": 1e-9,  # the views' noise is each rank's own: next to none, or nothing would be equal
        "simcse_temperature": 0.5,
        "center_scores": True,
    }
    return [word for name, value in (values | changes).items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def single(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("single") / "run"
    main(flags(base, out, micro_batch_tokens=8192))
    return out


@pytest.fixture(scope="module")
def double(base, tmp_path_factory) -> dict[int, Path]:
    """ZeRO stage -> the run of two."""
    folder = tmp_path_factory.mktemp("double")
    rows = {
        stage: {"module": "reward.train", "argv": flags(base, folder / str(stage), zero_stage=stage)}
        for stage in (2, 3)
    }
    return finished(run_forked(folder, rows))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_ranks_equal_one(single, double, zero_stage):
    out = double[zero_stage]
    ours, theirs = (read_lines(run / "metrics.jsonl") for run in (out, single))
    assert len(ours) == len(theirs) == 4
    for row, expected in zip(ours, theirs, strict=True):
        assert set(row) == set(expected)
        for key in set(row) - {"tokens_per_second"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), key
    weights, expected = (load_file(folder / "final" / "model.safetensors") for folder in (out, single))
    assert set(weights) == set(expected)
    for name, tensor in weights.items():
        assert (tensor - expected[name]).abs().max() < 1e-4, name
