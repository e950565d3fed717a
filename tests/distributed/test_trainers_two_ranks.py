"""sft.train, reward.train and training of mixtures of experts: two ranks make the numbers and weights of one process.

Batches do not divide by two, and micro-batches are so small that the ranks need different numbers of them.
"""

import importlib
from pathlib import Path

import pytest
import torch

from tests.faults.scenarios import finished, run_forked
from tests.helpers.mixtures import mixture_folder
from tests.helpers.tiny import SAMPLES, tiny_llama_folder
from tests.helpers.tiny_run import assert_close, final_weights, fit_flags, read_lines, read_metrics, run_flags
from utils.models.routers import ROUTER_METRICS

SFT = {"batch_size": 7, "context_truncate": 256, "save_per_step": 2, "num_valid": 3, "maxlen_res": 12}
REWARD = {
    "train_steps": 4, "batch_size": 5, "context_truncate": 256, "save_per_step": 2, "reward_lm_loss_factor": 0.5,
    "use_margin": True, "label_smoothing": 0.1, "center_scores": True, "simcse_temperature": 0.5,
    "simcse_coef": 0.5,  # its negatives are the pairs of both ranks
    "simcse_dropout": 1e-9,  # the views' noise is each rank's own: next to none, or nothing would be equal
}  # fmt: skip
# Where each sequence is a forward of its own, the load-balancing loss on two ranks is that of one process.
MIXTURE = {"router_aux_loss_coef": 1, "micro_batch_tokens": 1, "lr": 1e-3}
ALONE = {"sft": {"packing": False}}
TOGETHER = {name: {"micro_batch_tokens": 200} for name in ("sft", "reward")}


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory) -> dict[str, Path]:
    """ "NAME STAGE" -> folder of a run on two ranks; "NAME alone": of one process, whose dialogues are not packed."""
    folder = tmp_path_factory.mktemp("trainers")
    base, mixture = tiny_llama_folder(folder / "base"), mixture_folder(folder / "mixture")
    dialogues, pairs = SAMPLES / "en" / "dialogues", SAMPLES / "en" / "preferences"
    both = {"data_path": [dialogues, 2, dialogues / "train.json", 1]}
    few = MIXTURE | {"train_steps": 2, "batch_size": 5, "num_valid": 0, "packing": False}
    ppo = MIXTURE | {"policy_model_path": mixture, "num_eval_prompts": 0, "train_steps": 1}
    commands = {
        "sft": ("sft.train", lambda out, **more: fit_flags(base, dialogues, out, **SFT | both | more)),
        "reward": ("reward.train", lambda out, **more: fit_flags(base, pairs, out, **REWARD | more)),
        "mixture": ("sft.train", lambda out, **more: fit_flags(mixture, inputs.dialogues, out, **few | more)),
        "ppo": ("train_ppo", lambda out, **more: run_flags(inputs, out, **ppo | more)),
    }
    rows = {}
    for name, (module, flags) in commands.items():
        importlib.import_module(module).main(flags(folder / f"{name} alone", **ALONE.get(name, {})))
        for stage in (2, 3):
            own = {"fault": "no room"} if (name, stage) == ("sft", 3) else {}
            argv = flags(folder / f"{name} {stage}", zero_stage=stage, **TOGETHER.get(name, {}))
            rows[f"{name} {stage}"] = own | {"module": module, "argv": argv}
    return finished(run_forked(folder, rows)) | {f"{name} alone": folder / f"{name} alone" for name in commands}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["sft", "reward"])
def test_two_ranks_equal_one_process(runs, name, stage):
    one, two = runs[f"{name} alone"], runs[f"{name} {stage}"]
    assert_close(two, one, rel=1e-4, abs=1e-5)
    if name == "sft":
        assert read_lines(two / "samples.jsonl") == read_lines(one / "samples.jsonl")
    weights, expected = final_weights(two), final_weights(one)
    assert weights.keys() == expected.keys()
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["mixture", "ppo"])
def test_two_ranks_balance_the_load_of_experts_as_one_process(runs, name, stage):
    assert set(ROUTER_METRICS) < set(read_metrics(runs[f"{name} {stage}"])[-1])
    assert_close(runs[f"{name} {stage}"], runs[f"{name} alone"], rel=1e-3, abs=1e-4)
