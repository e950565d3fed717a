"""vLLM in this process: starts it, generates with it, loads weights into it and compares them.

No other module imports vllm. Weights start as random numbers, so that one which is never loaded cannot go unnoticed.
"""

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ppo.decoding.sampling import Sampling
from ppo.decoding.vllm_draw import Draw, Draws
from ppo.decoding.vllm_weights import Part, difference, first_difference
from utils.device import device, on_gpu
from utils.distributed import any_of_group
from utils.run.random_state import random_state, set_random_state

# The scheduler runs in this process, and calls logits processors of its first model runner.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_NO_USAGE_STATS": "1"}
os.environ.setdefault("FLASHINFER_CUBINS_REPOSITORY", "none")  # else kernels are downloaded without being asked for
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# As `disable_custom_all_reduce` below, so that NCCL alone sums over ranks: the other ways end the process with
# expandable segments (vLLM issue 42609), or fail if each task of srun sees one GPU only.
os.environ.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else it binds threads to cores that other ranks use

import vllm
from vllm.distributed import get_tp_group
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import LogitsProcessor

warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # of vLLM's collectives
# Not through shared memory: on a host all runs use the same name for it, and a run that is killed leaves it behind.
CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False
# Variables, by their beginnings, that vLLM sets and others read: processes of a --reward_fn, this toolkit, NCCL.
SHARED = ("LD_PRELOAD", "LOCAL_WORLD_SIZE", "NCCL_")
STOP_INTERVAL = 8  # steps between questions whether to stop: ranks that share a model have to agree
# Classes whose weights sleep discards; others are copied to host memory. A test loads each of these completely.
DISCARDED = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM",
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GraniteForCausalLM",
)  # fmt: skip


class VLLMEngine:
    """vLLM with the weights of a model on this rank, or split over `tensor_parallel` neighbouring ranks."""

    def __init__(
        self, folder: str, dtype: torch.dtype, vocabulary: int, max_tokens: int, max_slots: int, prefill_tokens: int,
        tensor_parallel: int = 1, memory_share: float = 0.9, cache: int | None = None, timeout: int | None = None,
    ):  # fmt: skip
        """folder: of the model; only its config.json is read. vocabulary: rows of the embedding. Collective.

        max_tokens: longest prompt and response together; max_slots: sequences at once; prefill_tokens: tokens of a
        forward over prompts; memory_share: of the GPU's memory; cache: bytes of the key-value cache, None: what is
        left of this share; timeout: seconds, of its process groups. Raises what vLLM raises.
        """
        if current_platform.is_cpu() == on_gpu():
            raise ValueError(f"it is built for {current_platform.device_name}, which this run does not use")
        self.sleeps, self.awake = on_gpu(), {"weights", "kv_cache"}
        processor = type("Processor", (Draw, LogitsProcessor), {"made": []})  # vLLM makes the instance
        with _restored():
            self.llm = vllm.LLM(
                folder, skip_tokenizer_init=True, load_format="dummy", dtype=dtype, generation_config="vllm",
                hf_overrides={"vocab_size": vocabulary}, max_model_len=max_tokens, max_num_seqs=max_slots,
                max_num_batched_tokens=max(prefill_tokens, max_tokens, max_slots), gpu_memory_utilization=memory_share,
                kv_cache_memory_bytes=cache, tensor_parallel_size=tensor_parallel,
                distributed_executor_backend="external_launcher", distributed_timeout_seconds=timeout,
                cpu_distributed_timeout_seconds=timeout, disable_custom_all_reduce=True, enable_sleep_mode=self.sleeps,
                enforce_eager=not self.sleeps, async_scheduling=False, disable_log_stats=True,
                use_tqdm_on_load=False, logits_processors=[processor],
            )  # fmt: skip
        [self.draw] = processor.made
        self.llm.llm_engine.engine_core._finalizer.detach()  # else it ends, at exit, groups that have ended
        [self.model] = self.llm.apply_model(lambda model: model)
        self.parts, self.group = dict(_parts(self.model)), get_tp_group()
        self.group.mq_broadcaster = None  # no other process asks for it, and its shared memory would outlive a kill
        # Computed from the config, such as rotary frequencies: as they are before the first sleep, which discards them.
        self.buffers: dict[str, torch.Tensor] = {}

    def sleep(self) -> None:
        """Frees the weights and the key-value cache. On a CPU, where vLLM keeps them, nothing may be generated."""
        self.awake = set()
        self.buffers = self.buffers or {name: x.to("cpu", copy=True) for name, x in self.model.named_buffers()}
        if self.sleeps:
            self.llm.sleep(level=2 if type(self.model).__name__ in DISCARDED else 1)

    def wake(self, *parts: str) -> None:
        """Allocates "weights", whose content is then undefined, or "kv_cache"."""
        self.awake |= set(parts)
        if self.sleeps:
            self.llm.wake_up(list(parts))

    @property
    def is_readable(self) -> bool:
        """Whether `first_difference` can read the weights."""
        return "weights" in self.awake or not self.sleeps

    def load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Replaces the weights. Their loss in sleep would not be noticed, so that loading then is an error."""
        if "weights" not in self.awake:
            raise RuntimeError("weights cannot be loaded into vLLM while it sleeps")
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept keys and values of old weights")

    def first_difference(self, weights: Iterator[tuple[str, torch.Tensor]]) -> tuple[str, float] | None:
        """`first_difference` for vLLM's weights, then for its buffers, with what they were before it slept."""
        if found := first_difference(self.parts, weights):
            return found
        buffers = dict(self.model.named_buffers())
        for name, x in self.buffers.items():  # vLLM restores them
            if gap := difference(buffers[name].cpu(), x):
                return name, gap
        return None

    def generate(
        self, prompts: list[list[int]], places: list[int], limit: int, sampling: Sampling, seed: int,
        stops: tuple[int, ...], stopped: Callable[[], bool] = lambda: False,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:  # fmt: skip
        """Returns each response's tokens, of which there are at most `limit`, and their log-probabilities, float32.

        stopped: asked every few steps. If it is True on one of the ranks that share the model, all of them return, and
        responses may be incomplete.
        """
        if len(self.awake) < 2:
            raise RuntimeError("vLLM cannot generate while it sleeps")
        shape, place, engine = (len(prompts), limit), device(), self.llm.llm_engine
        self.draw.draws = draws = Draws(
            torch.tensor(places, device=place), sampling, seed, torch.zeros(shape, dtype=torch.int64, device=place),
            torch.zeros(shape, device=place),
        )  # fmt: skip
        names = list(map(str, range(len(prompts))))
        for row, name in enumerate(names):
            params = vllm.SamplingParams(
                temperature=0.0, max_tokens=limit, ignore_eos=True, stop_token_ids=list(stops), detokenize=False,
                extra_args={"row": row}, output_kind=RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip
            engine.add_request(name, {"prompt_token_ids": prompts[row]}, params)
        responses, steps, is_stopped = dict.fromkeys(names, stops[:1]), itertools.count(), False
        while engine.has_unfinished_requests() and not is_stopped:
            responses |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
            is_stopped = next(steps) % STOP_INTERVAL == 0 and any_of_group(stopped(), self.group.cpu_group)
        if is_stopped:
            engine.abort_request(names)
        lengths = [len(responses[name]) for name in names]
        tokens, logprobs = (
            [row[:length] for row, length in zip(x, lengths, strict=True)] for x in (draws.tokens, draws.logprobs)
        )
        if not is_stopped and torch.cat(tokens).tolist() != [i for name in names for i in responses[name]]:
            raise RuntimeError("vLLM returned other tokens than were drawn")
        return tokens, logprobs


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Context that restores what vLLM's start changes in the process: random streams, threads, stream, variables."""
    random, precision = random_state(), torch.get_float32_matmul_precision()
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    stream = torch.cuda.current_stream() if on_gpu() else None
    variables = {name: value for name, value in os.environ.items() if name.startswith(SHARED)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        set_random_state(random)
        torch.set_num_threads = set_threads  # on a CPU vLLM replaces it, on a GPU it may set one thread
        torch.set_num_threads(threads)
        if stream is not None:  # with ranks that share the model, vLLM makes another one current
            stream.wait_stream(torch.cuda.current_stream())
            torch.cuda.set_stream(stream)
        torch.set_float32_matmul_precision(precision)
        for name in [name for name in os.environ if name.startswith(SHARED)]:
            del os.environ[name]
        os.environ |= variables


def _parts(model: nn.Module) -> Iterator[tuple[str, Part]]:
    """Yields the name that each weight and bias of vLLM's model has in the policy, and where vLLM holds it."""
    packed = getattr(model, "packed_modules_mapping", {})
    for path, module in model.named_modules():
        parent, _, last = path.rpartition(".")
        names, shares = [last], [(0, None, getattr(module, "tp_rank", 0))]  # start, size, index
        if isinstance(module, QKVParallelLinear):
            query, key, value = (
                module.num_heads * module.head_size, module.num_kv_heads * module.head_size,
                module.num_kv_heads * module.v_head_size,
            )  # fmt: skip
            copied = module.tp_rank // module.num_kv_head_replicas
            shares = [(0, query, module.tp_rank), (query, key, copied), (query + key, value, copied)]
            names = packed.get(last, names)
        elif isinstance(module, MergedColumnParallelLinear):
            sizes = [size // module.tp_size for size in module.output_sizes]
            shares = [(sum(sizes[:i]), size, module.tp_rank) for i, size in enumerate(sizes)]
            names = packed.get(last, names)
        elif isinstance(module, VocabParallelEmbedding) and module.tp_size == 1:
            shares = [(0, module.org_vocab_size, 0)]  # padding behind it
        if len(names) != len(shares):  # the policy has one tensor for all
            names, shares = [last], [(0, None, 0)]
        is_split = isinstance(module, LinearBase | VocabParallelEmbedding) and module.tp_size > 1
        for name, _ in module.named_parameters(recurse=False):
            dim = 0 if is_split else None
            if isinstance(module, RowParallelLinear) and is_split:
                dim = 1 if name == "weight" else None
            for own, (start, size, index) in zip(names, shares, strict=True):
                yield ".".join(filter(None, (parent, own, name))), Part(
                    module, name, start, size, dim, index, isinstance(module, VocabParallelEmbedding)
                )  # fmt: skip
