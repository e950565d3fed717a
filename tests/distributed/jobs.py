"""What each process of a group does in tests of this folder; started by tests/faults/scenarios.py."""

import json
import os
import time

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from ppo.models import PolicyModel
from tests.architectures.configs import tiny_config
from tests.helpers.parts import ppo_config, tiny_policy
from tests.helpers.tiny import tiny_llama
from utils.distributed import gather_objects, is_main, rank
from utils.engine.engine import DTYPES, TrainEngine, init_distributed, shutdown_distributed
from utils.engine.split import shard_frozen
from utils.engine.state import same_weights
from utils.run import fingerprints
from utils.run.checkpoint import CheckpointWriter
from utils.run.restore import named, restore
from utils.run.together import once_per_node
from utils.watchdog import Watchdog, report_progress

SHAPE = {"vocab": 1000, "hidden_size": 128, "intermediate_size": 200}
TOKENS = 64  # at most, in a forward


def hand_over(folder: str, number: int, last: bool, dtype: str, in_sum: str, stage: int, offload: bool) -> None:
    """Group 0 makes two steps and saves; the others take over from the one before and save at once; the last trains."""
    init_distributed(60)
    config = ppo_config(zero_stage=stage, dtype=dtype, offload_optimizer=offload, grad_accum_dtype=in_sum)
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


def train(engine: TrainEngine) -> None:
    """One step on the same sequences, whatever the number of ranks."""
    sequences = torch.arange(2, 22).view(2, 10)
    engine.module.train()
    logprobs, _ = engine(sequences, sequences % 10 > 4, 1.0)
    engine.backward(-logprobs.sum() / 10 / torch.distributed.get_world_size())
    engine.measure()
    engine.apply(1e-3)


def offload_between_steps(file: str, stage: int, dtype: str) -> None:
    """Three steps, with and without states in host memory between them; `file` gets what differs on each rank."""
    init_distributed(60)
    ours, plain = (
        TrainEngine(tiny_policy().to(DTYPES[dtype]), ppo_config(zero_stage=stage, dtype=dtype), "policy")
        for _ in range(2)
    )
    for _ in range(3):
        with ours.states_offloaded():
            ours.full_state_dict()  # a collective in between
        train(ours)
        train(plain)
    found, wanted = (engine.state_tensors() | engine.full_state_dict() for engine in (ours, plain))
    differing = [name for name, x in wanted.items() if not torch.equal(x, found[name])]
    everyone = gather_objects({"tensors": len(wanted), "differing": differing})
    if is_main():
        with open(file, "w") as out:
            json.dump(everyone, out)
    shutdown_distributed()


@torch.no_grad()
def score_with_frozen(file: str, family: str, stage: int, offload: bool) -> None:
    """Compares a frozen model that is split over the ranks with the whole one; `file` gets a list of each rank's."""
    init_distributed(60)
    whole, linear = tiny_model(family).eval(), torch.nn.functional.linear
    split = shard_frozen(tiny_model(family), ppo_config(zero_stage=stage), offload)
    for parameter in split.parameters():  # NaN in the padding behind the elements that this rank holds
        parameter.ds_tensor[max(0, parameter.ds_numel - rank() * parameter.ds_tensor.ds_numel) :] = float("nan")
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
        with open(file, "w") as out:
            json.dump(everyone, out)
    shutdown_distributed()


def tiny_model(family: str) -> PolicyModel:
    """The same at every call."""
    if family == "llama":
        return PolicyModel(tiny_llama(**SHAPE), even_tokens=TOKENS)
    torch.manual_seed(0)
    return PolicyModel(AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32), even_tokens=TOKENS)


def held_elements(module: torch.nn.Module) -> int:
    """Elements of weights in this rank's memory: of its shards, and of what is whole at the moment."""
    return sum(p.ds_tensor.numel() + p.data.numel() for p in module.parameters())


def fingerprint_inputs(policy: str, prompts: str) -> None:
    """Prints which files a rank hashes, and the fingerprints that it gets. The ranks name the files differently."""
    original = fingerprints._hash

    def noted(stamp: fingerprints.Stamp) -> tuple[str, bool]:
        os.write(1, f"hashed {stamp.path}\n".encode())  # at once: threads of both ranks write
        return original(stamp)

    fingerprints._hash = noted
    init_distributed(60)
    os.chdir((policy, prompts)[rank()])
    paths = {0: {"policy_model_path": ".", "data_path": prompts}, 1: {"policy_model_path": policy, "data_path": "."}}
    found = fingerprints.fingerprints(ppo_config(**paths[rank()]), print)
    os.write(1, f"found {json.dumps(found, sort_keys=True)}\n".encode())
    shutdown_distributed()


def read_apart(file: str, seconds: float) -> None:
    """Rank 0 reads for both, for longer than the watchdog waits for progress; `file` gets what the ranks have then."""
    calls = []

    def read() -> list[str]:
        for _ in range(int(4 * seconds)):
            time.sleep(0.25)
            report_progress("reading")
        calls.append(rank())
        return [f"read by {rank()}"]

    with Watchdog(seconds / 2):
        init_distributed(60)
        found = once_per_node(read)
        everyone = gather_objects((found, calls))
    if is_main():
        with open(file, "w") as out:
            json.dump(everyone, out)
    shutdown_distributed()
