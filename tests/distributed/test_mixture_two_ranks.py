"""The load-balancing loss on two ranks. Where each sequence is a forward of its own, it is that of one process."""

import pytest

from sft.train import main as sft_main
from tests.faults.scenarios import finished, run_forked
from tests.helpers.mixtures import mixture_folder
from tests.helpers.tiny_run import as_argv, read_metrics, run_flags
from train_ppo import main
from utils.models.routers import ROUTER_METRICS

SETTINGS = {"router_aux_loss_coef": 1, "micro_batch_tokens": 1, "lr": 1e-3}


def test_two_ranks_equal_one(inputs, tmp_path):
    mixture = mixture_folder(tmp_path / "mixture")

    def sft(out: str, zero_stage: int) -> list[str]:
        flags = {
            "hf_model_name_or_path": mixture, "data_path": inputs.dialogues, "model_save_path": tmp_path / out,
            "train_steps": 2, "warmup_steps": 1, "batch_size": 5, "context_truncate": 128, "dtype": "fp32",
            "num_valid": 0, "packing": False, "zero_stage": zero_stage,
        }  # fmt: skip
        return as_argv(flags | SETTINGS)

    def ppo(out: str, zero_stage: int) -> list[str]:
        flags = {"policy_model_path": mixture, "num_eval_prompts": 0, "zero_stage": zero_stage, "train_steps": 1}
        return run_flags(inputs, tmp_path / out, **flags | SETTINGS)

    sft_main(sft("sft", 2))
    main(ppo("ppo", 2))
    rows = {f"sft{stage}": {"module": "sft.train", "argv": sft(f"sft{stage}", stage)} for stage in (2, 3)}
    rows |= {f"ppo{stage}": {"argv": ppo(f"ppo{stage}", stage)} for stage in (2, 3)}
    for name, out in finished(run_forked(tmp_path, rows)).items():
        found, expected = read_metrics(out), read_metrics(tmp_path / name[:3])
        assert set(ROUTER_METRICS) < set(found[-1])
        for row, one in zip(found, expected, strict=True):
            assert row == pytest.approx(one, rel=1e-3, abs=1e-4), name
