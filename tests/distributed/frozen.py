"""What ranks find of a frozen model that is split over them:   python -m tests.distributed.frozen FOLDER

Writes FOLDER/NAME.json, a list of one object per rank, for each of CASES.
"""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from transformers import AutoModelForCausalLM

from ppo.models import PolicyModel
from tests.architectures.configs import tiny_config
from tests.faults.kill import start, wait
from tests.helpers.parts import ppo_config
from tests.helpers.tiny import tiny_llama
from utils.distributed import gather_objects, is_main, rank
from utils.engine.engine import init_distributed, shard_frozen, shutdown_distributed
from utils.engine.state import same_weights

# (family, stage of what is trained, offload). LongCat's experts are called one by one, those that a rank's tokens need.
CASES = {"ZeRO-1": ("llama", 1, False), "ZeRO-2, offloaded": ("llama", 2, True), "experts": ("longcat_flash", 2, False)}
RANKS = 3  # do not divide the sizes of the matrices, so that the last rank's shards are padded
SHAPE = {"vocab": 1000, "hidden_size": 128, "intermediate_size": 200}
TOKENS = 64  # at most, in a forward


def tiny_model(family: str) -> PolicyModel:
    """The same at every call."""
    if family == "llama":
        return PolicyModel(tiny_llama(**SHAPE), even_tokens=TOKENS)
    torch.manual_seed(0)
    return PolicyModel(AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32), even_tokens=TOKENS)


def held_elements(module: torch.nn.Module) -> int:
    """Elements of weights in this rank's memory: of its shards, and of what is whole at the moment."""
    return sum(p.ds_tensor.numel() + p.data.numel() for p in module.parameters())


def spoil_padding(module: torch.nn.Module) -> None:
    """Writes NaN behind the elements that this rank holds of each parameter."""
    for parameter in module.parameters():
        start_of_shard = rank() * parameter.ds_tensor.ds_numel
        parameter.ds_tensor[max(0, parameter.ds_numel - start_of_shard) :] = float("nan")


@torch.no_grad()
def look(file: Path, family: str, stage: int, offload: bool) -> None:
    """What each rank does."""
    init_distributed(60)
    whole, linear = tiny_model(family).eval(), torch.nn.functional.linear
    split = shard_frozen(tiny_model(family), ppo_config(zero_stage=stage), offload)
    spoil_padding(split)
    found = {"linear": torch.nn.functional.linear is linear, "held": [held_elements(split)], "off": []}
    for length in (20, 31, 43, TOKENS):  # from the third forward on, weights are fetched ahead
        ids = torch.arange(3, 3 + length - 5 * rank())[None]
        pairs = zip(split(ids, ids > 8), whole(ids, ids > 8), strict=True)
        found["off"] += [float((a - b).abs().max()) for a, b in pairs]
        found["held"].append(held_elements(split))
    found["same"] = [same_weights(*pair) for pair in ((whole, split), (split, whole), (split, split))]
    whole.lm.lm_head.weight[-1, -1] += 1  # of what the last rank holds
    found["changed"] = [same_weights(*pair) for pair in ((whole, split), (split, whole))]
    everyone = gather_objects(found)
    if is_main():
        file.write_text(json.dumps(everyone))
    shutdown_distributed()


def main() -> None:
    """Forks the ranks of each case."""
    torch.set_num_threads(1)  # before the first tensor: a process that has threads must not be forked
    folder = Path(sys.argv[1])
    for name, case in CASES.items():
        log = folder / f"{name}.log"
        codes = wait(start(lambda n=name, c=case: look(folder / f"{n}.json", *c), RANKS, log))
        assert codes == [0] * RANKS, log.read_text()[-3000:]


if __name__ == "__main__":
    main()
