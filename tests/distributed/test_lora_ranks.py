"""Adapters on two ranks: the numbers of one process."""

import pytest

from tests.helpers.tiny_run import assert_close
from tests.helpers.two_ranks import alone_and_on_two_ranks

FLAGS = {"lora_rank": 4, "lr": 1e-2, "critic_pretrain_steps": 1, "export": "both"}


@pytest.mark.slow
def test_two_ranks_equal_one_process(inputs, tmp_path):
    stages = (0, 1, 2)
    runs = alone_and_on_two_ranks(inputs, tmp_path, {"lora": ("train_ppo", FLAGS)}, stages)
    for stage in stages:
        assert_close(runs[f"lora {stage}"], runs["lora alone"], rel=1e-4, abs=1e-5)
