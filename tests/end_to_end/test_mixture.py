"""Runs with a mixture of experts: the load-balancing loss evens the load out, in PPO and in SFT."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft.train import main as sft_main
from tests.helpers.mixtures import mixture_folder
from tests.helpers.tiny_run import as_argv, read_metrics, run_flags
from train_ppo import main
from utils.models.routers import ROUTER_METRICS


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return mixture_folder(tmp_path_factory.mktemp("mixture"))


def names(rows: list[dict]) -> set[str]:
    return {name for row in rows for name in row}


def test_ppo_moves_the_metric(inputs, mixture, tmp_path, capsys):
    rows = {}
    for coef in (None, 0, 5):
        flags = {"policy_model_path": mixture, "train_steps": 3, "lr": 1e-3, "router_aux_loss_coef": coef}
        flags |= {"critic_pretrain_steps": 1, "num_eval_prompts": 0, "gradient_checkpoint": True}
        main(run_flags(inputs, tmp_path / str(coef), **flags))
        rows[coef] = read_metrics(tmp_path / str(coef))
    assert "load-balancing loss of its routers with weight 0.001" in capsys.readouterr().out
    assert names(rows[None]) - names(rows[0]) == set(ROUTER_METRICS)
    assert set(ROUTER_METRICS) & set(rows[None][0]) == set()  # while only the critic learns
    before, after = (rows[5][i]["router_aux_loss"] for i in (1, 3))
    assert after < before - 0.02
    assert rows[None][3]["router_aux_loss"] > after + 0.02
    assert rows[0][1]["grad_norm_policy"] < rows[5][1]["grad_norm_policy"]
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "5" / "final")
    assert policy.config.router_aux_loss_coef == 0.001 and bool(torch.isfinite(policy.lm_head.weight).all())


def test_sft_moves_the_metric(inputs, mixture, tmp_path):
    rows = {}
    for coef in (0, 1):
        flags = {
            "hf_model_name_or_path": mixture, "data_path": inputs.dialogues, "model_save_path": tmp_path / str(coef),
            "train_steps": 6, "warmup_steps": 1, "batch_size": 4, "lr": 1e-3, "context_truncate": 128, "dtype": "fp32",
            "num_valid": 2, "save_per_step": 6, "maxlen_res": 4, "router_aux_loss_coef": coef,
            "micro_batch_tokens": 100, "zero_stage": 3 if coef else 2,
        }  # fmt: skip
        sft_main(as_argv(flags))
        rows[coef] = read_metrics(tmp_path / str(coef))
    assert names(rows[1]) - names(rows[0]) == {"lm_loss", *ROUTER_METRICS}
    first, *_, last = rows[1]
    assert first["loss"] == pytest.approx(first["lm_loss"] + first["router_aux_loss"])
    assert first["lm_loss"] == pytest.approx(rows[0][0]["loss"], rel=1e-5)
    assert last["router_aux_loss"] < first["router_aux_loss"] - 0.02
    assert last["eval_perplexity"] == pytest.approx(torch.tensor(last["eval_loss"]).exp().item(), rel=1e-4)


def test_a_weight_without_routers_stops_the_run(inputs, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(run_flags(inputs, tmp_path / "run", router_aux_loss_coef=0.1))
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"--router_aux_loss_coef 0.1: --policy_model_path {inputs.policy}, a LlamaForCausalLM" in error
    assert not (tmp_path / "run").exists()
