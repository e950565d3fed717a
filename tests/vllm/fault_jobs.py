"""Faults injected into vLLM's weights, or into the way to them; what the next call of the sampler says to each."""

import collections
import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import train_ppo
from ppo.decoding.vllm_engine import VLLMEngine
from ppo.sampler_gap import sampler_problem
from ppo.types import SampledRollout, Scores
from ppo.vllm_sampler import VLLMSampler
from tests.helpers.parts import scores_of
from tests.vllm import models
from tests.vllm.proof_jobs import SAMPLED
from utils.distributed import rank
from utils.engine.engine import init_distributed
from utils.errors import UserError

Weights = Iterator[tuple[str, torch.Tensor]]
DOWN = "model.layers.0.mlp.down_proj.weight"
LAYER = "model.layers.1."


def without(*starts: str) -> Callable[[Weights], Weights]:
    """Leaves out the tensors whose names begin so."""
    return lambda weights: ((name, x) for name, x in weights if not name.startswith(starts))


def through(*dtypes: torch.dtype) -> Callable[[Weights], Weights]:
    """Casts each tensor to these dtypes and back."""

    def cast(x: torch.Tensor) -> torch.Tensor:
        for dtype in (*dtypes, x.dtype):
            x = x.to(dtype)
        return x

    return lambda weights: ((name, cast(x)) for name, x in weights)


def shuffled(weights: Weights) -> Weights:
    """The rows of one matrix in another order."""
    return ((name, x.flip(0) if name == DOWN else x) for name, x in weights)


# What reaches vLLM. Each is a fault of its own: all weights are delivered before.
DELIVERED = {
    "one layer stale": without(LAYER),
    "head stale": without("lm_head.weight"),
    "rows shuffled": shuffled,
    "through float16": through(torch.float16),
    "through bfloat16": through(torch.bfloat16),
    "through float8": through(torch.float8_e5m2),
}


@contextlib.contextmanager
def replaced(owner: object, name: str, function: Callable) -> Iterator[None]:
    """Context in which an object's method is another function, which gets the method as its first argument."""
    method = getattr(owner, name)
    setattr(owner, name, lambda *args: function(method, *args))
    yield
    delattr(owner, name)


def outcome(sampler: VLLMSampler) -> str:
    """Samples a buffer as a run does: the error that stops it, "" if there is none."""
    try:
        return problem(sampler, sampler(models.prompts(), SAMPLED, 5)) or ""
    except (UserError, RuntimeError) as error:
        assert not sampler.engine.awake, "optimizer states came back beside vLLM"
        return f"{type(error).__name__}: {error}"


@torch.no_grad()
def problem(sampler: VLLMSampler, rollout: SampledRollout) -> str | None:
    """What the comparison with the policy's own forward finds."""
    logprobs, _ = sampler.policy(rollout.sequences, rollout.response_mask, 1.0)
    scores: Scores = scores_of(rollout, [0.0] * len(rollout), logprobs)
    return sampler_problem(rollout, scores, sampler, sampler.config, 1.0)


def inject(folder: str, dtype: str, lr: float, stage: int) -> dict[str, list[str]]:
    """Fault -> [the error, what differs by a plain comparison with what was delivered: its first tensor's name]."""
    init_distributed()
    sampler = models.start(models.flags(folder, dtype=dtype, zero_stage=stage))
    engine, policy, found = sampler.engine, sampler.policy, {}
    found["none"] = [outcome(sampler), ""]
    old = {name: x.clone() for name, x in sampler.weights()}
    models.train(policy, lr)
    new = {name: x.clone() for name, x in sampler.weights()}

    def expected(delivered: dict[str, torch.Tensor]) -> str:
        held = old | delivered
        return next((name for name, x in new.items() if not torch.equal(held[name], x)), "")

    with replaced(engine, "load", lambda load, weights: collections.deque(weights, maxlen=0)):
        found["nothing delivered"] = [outcome(sampler), expected({})]
    for name, change in DELIVERED.items():
        engine.wake("weights")
        engine.load(iter(old.items()))
        with replaced(engine, "load", lambda load, weights, change=change: load(change(weights))):
            found[name] = [outcome(sampler), expected(dict(change(iter(new.items()))))]
    with replaced(policy, "weights", lambda weights: without(f"lm.{DOWN}")(weights())):
        found["neither sent nor compared"] = [outcome(sampler), DOWN]
    garbage = [(name, torch.full_like(x, 1e-3)) for name, x in new.items()]

    def lose(load: Callable, weights: Weights) -> None:
        load(iter(garbage))  # as memory is after it was given back
        load(without(LAYER)(weights))

    with replaced(engine, "load", lose):
        found["lost in sleep"] = [outcome(sampler), next(name for name in new if name.startswith(LAYER))]
    buffer = next(x for name, x in engine.model.named_buffers() if "cos_sin" in name)
    buffer.mul_(0.5)
    found["a buffer lost in sleep"] = [outcome(sampler), "model.layers.0.self_attn.rotary_emb.cos_sin_cache"]
    buffer.mul_(2.0)
    found["repaired"] = [outcome(sampler), ""]

    with replaced(sampler, "sync", lambda sync: None):
        found["sync left out"] = [outcome(sampler), ""]

    sampler.offloaded = ()  # for steps while vLLM is awake

    def step(wake: Callable, part: str) -> None:
        wake(part)
        if part == "kv_cache":
            models.train(policy, lr)

    with replaced(engine, "wake", step):
        found["a step after the sync"] = [outcome(sampler), ""]
    engine.sleep()
    found["asleep: sync"] = [failure(sampler.sync), ""]
    found["asleep: generate"] = [failure(lambda: engine.generate([[5]], [0], 4, SAMPLED, 1, (2,))), ""]
    engine.wake("weights")
    found["no cache: generate"] = [failure(lambda: engine.generate([[5]], [0], 4, SAMPLED, 1, (2,))), ""]

    def edit(wake: Callable, part: str) -> None:
        wake(part)
        if part == "kv_cache":
            dict(policy.weights())[f"lm.{DOWN}"].mul_(1.5)

    if stage < 3:  # the only place of the weights
        with replaced(engine, "wake", edit):
            found["policy changed behind the sync"] = [outcome(sampler), DOWN]
        found["changed before the sync"] = [outcome(sampler), ""]
    return found


def stale_run(argv: list[str]) -> None:
    """A run whose third sync leaves out a layer on rank 1."""
    load, calls = VLLMEngine.load, itertools.count(1)

    def stale(engine: VLLMEngine, weights: Weights) -> None:
        load(engine, without(LAYER)(weights) if next(calls) > 2 and rank() == 1 else weights)

    VLLMEngine.load = stale
    train_ppo.main(argv)


def failure(call: Callable) -> str:
    """The error of a call, "" if there is none."""
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def other_config(folder: str, copy: str, changes: dict) -> list[str]:
    """Samples with a vLLM whose config is another one; all weights are the policy's. Returns what the run says."""
    init_distributed()
    shutil.copytree(folder, copy)
    config = Path(copy, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    sampler = models.start(models.flags(folder), copy)
    return [outcome(sampler)]
