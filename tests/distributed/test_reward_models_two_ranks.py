"""Several reward models, split over two ranks, one of them with a tokenizer of its own: as on one process."""

import json

import pytest
import torch

from reward.model import load_scalar_model, save_scalar_model
from tests.faults.scenarios import finished, run_forked
from tests.helpers.tiny import tiny_llama_folder, tiny_tokenizer_folder
from tests.helpers.tiny_run import SIZES, read_metrics, run_flags
from train_ppo import main
from utils.tokenizer import load_tokenizer


def test_two_ranks_equal_one_process(inputs, tmp_path):
    """So few tokens a micro-batch that ranks plan different numbers of them, and other ones for the other tokenizer."""
    base = tiny_llama_folder(tmp_path / "base", 370, seed=9, tokenizer=False, **SIZES)
    tokenizer = load_tokenizer(str(tiny_tokenizer_folder(tmp_path / "tokenizer", 370)), "moss_en")
    other = load_scalar_model(str(base), torch.float32, torch.device("cpu"), say=str)
    save_scalar_model(other, str(tmp_path / "other"), tokenizer=tokenizer)
    flags = {"reward_model_path": [inputs.reward, tmp_path / "other"], "reward_ensemble": "mean_minus_std"}
    flags |= {"train_steps": 1, "micro_batch_tokens": 45, "maxlen_res": 16}
    main(run_flags(inputs, tmp_path / "one", zero_stage=3, **flags))
    (expected,) = read_metrics(tmp_path / "one")
    assert expected["eval_score_disagreement"] > 0
    stages = {
        f"stage{stage}": run_flags(inputs, tmp_path / f"stage{stage}", zero_stage=stage, **flags) for stage in (2, 3)
    }
    for out in finished(run_forked(tmp_path, {name: {"argv": argv} for name, argv in stages.items()})).values():
        assert json.loads((out / "config.json").read_text())["world_size"] == 2
        (row,) = read_metrics(out)
        assert row == pytest.approx(expected, rel=1e-5, abs=5e-6)
