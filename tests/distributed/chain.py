"""Hands one engine's state from process group to process group:   python -m tests.distributed.chain DTYPE FOLDER …

DTYPE: that of the weights, or also that in which gradients add up (bf16-fp32). Each further argument is
RANKS:ZERO_STAGE or RANKS:ZERO_STAGE:offload. The first group makes two steps and saves; each further one takes over
from the group before and saves at once; the last then makes a step. FOLDER/0, /1, … hold it.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from safetensors.torch import save_file

from tests.faults.kill import start, wait
from tests.helpers.parts import ppo_config, tiny_policy
from utils.distributed import is_main
from utils.engine.engine import DTYPES, TrainEngine, init_distributed, shutdown_distributed
from utils.run.checkpoint import CheckpointWriter
from utils.run.restore import named, restore


def train(engine: TrainEngine) -> None:
    """One step on the same sequences, whatever the number of ranks."""
    sequences = torch.arange(2, 22).view(2, 10)
    engine.module.train()
    logprobs, _ = engine(sequences, sequences % 10 > 4, 1.0)
    engine.backward(-logprobs.sum() / 10 / torch.distributed.get_world_size())
    engine.step(1e-3)


def group(folder: str, number: int, last: bool, dtype: str, stage: int, offload: bool) -> None:
    """What one process of the group `number` does."""
    init_distributed(60)
    dtype, _, in_sum = dtype.partition("-")
    options = {"grad_accum_dtype": in_sum} if in_sum else {}
    config = ppo_config(zero_stage=stage, dtype=dtype, offload_optimizer=offload, **options)
    engine = TrainEngine(tiny_policy(seed=number).to(DTYPES[dtype]), config, "policy")
    if number:
        restore(named(f"{folder}/{number - 1}/step_2"), {"policy": engine})
    else:
        train(engine)
        train(engine)
    CheckpointWriter(f"{folder}/{number}", {"policy": engine}, 1).save({"step": 2}, print)
    if last:
        train(engine)
        weights = engine.full_state_dict()
        if is_main():
            save_file(weights, f"{folder}/trained.safetensors")
    shutdown_distributed()


def main() -> None:
    """Forks the groups, one after the other."""
    torch.set_num_threads(1)  # before the first tensor: a process that has threads must not be forked
    dtype, folder, *groups = sys.argv[1:]
    for number, text in enumerate(groups):
        ranks, stage, *offload = text.split(":")
        codes = wait(
            start(
                lambda n=number, s=stage, o=offload: group(folder, n, n == len(groups) - 1, dtype, int(s), bool(o)),
                int(ranks), f"{folder}/log",
            )
        )  # fmt: skip
        assert codes == [0] * int(ranks), Path(f"{folder}/log").read_text()[-3000:]


if __name__ == "__main__":
    main()
