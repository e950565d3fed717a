"""Several reward models under ZeRO-3 on two ranks, one of them with a tokenizer of its own: as on one process."""

import json

import pytest
import torch

from reward.model import load_scalar_model, save_scalar_model
from tests.faults.scenarios import finished, run_forked
from tests.tiny import tiny_llama_folder, tiny_tokenizer_folder
from tests.tiny_run import SIZES, read_metrics, run_flags
from train_ppo import main
from utils.tokenizer import load_tokenizer


def test_two_ranks_equal_one_process(inputs, tmp_path):
    """So few tokens a micro-batch that ranks plan different numbers of them, and other ones for the other tokenizer."""
    base = tiny_llama_folder(tmp_path / "base", 370, seed=9, tokenizer=False, **SIZES)
    tokenizer = load_tokenizer(str(tiny_tokenizer_folder(tmp_path / "tokenizer", 370)), "moss_en")
    other = load_scalar_model(str(base), torch.float32, torch.device("cpu"), say=str)
    save_scalar_model(other, str(tmp_path / "other"), tokenizer=tokenizer)
    flags = {"reward_model_path": [inputs.reward, tmp_path / "other"], "reward_ensemble": "mean_minus_std"}
    flags |= {"zero_stage": 3, "train_steps": 1, "micro_batch_tokens": 45, "maxlen_res": 16}
    main(run_flags(inputs, tmp_path / "one", **flags))
    finished(run_forked(tmp_path, {"two": {"argv": run_flags(inputs, tmp_path / "two", **flags)}}))
    (row,), (expected,) = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    assert json.loads((tmp_path / "two" / "config.json").read_text())["world_size"] == 2
    assert expected["eval_score_disagreement"] > 0
    assert row == pytest.approx(expected, rel=1e-5, abs=5e-6)
