"""Memory that vLLM gets on each GPU, beside what training holds there during a rollout.

vLLM's gpu_memory_utilization is a share of the GPU's whole memory, for all that it allocates after its start: weights,
the peak of a trial forward over max_num_batched_tokens, CUDA graphs, and a cache that takes the rest. The CUDA context
and NCCL's buffers exist before, and drawing tokens comes later: both are not part of it. Asleep, it keeps its graphs.
Source: determine_available_memory in vllm/v1/worker/gpu_worker.py of vLLM 0.32.
"""

from dataclasses import dataclass

from ppo.config import PPOConfig
from ppo.decoding.kv_cache import slots_for
from ppo.planning.shapes import LOGIT, Shapes, cache_bytes, tokens_of
from ppo.vllm_sampler import AUTO_SLOTS, BLOCK
from utils.engine.engine import DTYPES
from utils.engine.memory import ROOM
from utils.errors import UserError
from utils.memory.activation_peak import peak_bytes

GRAPH_BYTES = 1 << 30  # an estimate
PHASES = ("rollout", "score", "backward", "step")
GIB = 2**30
Rows = dict[str, list[int]]  # name -> bytes in each of PHASES
GRAPHS, DRAWING, MOVED = "vLLM: CUDA graphs", "vLLM: drawing of tokens", "optimizer during rollouts"


@dataclass(frozen=True)
class VLLMSizes:
    """Bytes on each GPU while vLLM is awake, by name.

    slots: sequences of full length that the cache holds, of all GPUs that share the weights. offload_states: optimizer
    states are in host memory during rollouts. missing: bytes that the GPU lacks.
    """

    awake: dict[str, int]
    slots: int
    offload_states: bool
    missing: int

    @property
    def budget(self) -> int:
        """Bytes that --vllm_gpu_memory_utilization stands for."""
        return sum(self.awake.values()) - self.awake[DRAWING]

    def beside(self, rows: Rows) -> tuple[Rows, dict[str, int]]:
        """Returns training's rows with vLLM's, and what moves to host memory."""
        own = {name: [size, *[size if name == GRAPHS else 0] * 3] for name, size in self.awake.items()}
        if not self.offload_states:
            return rows | own, {}
        moved = _states(rows)
        emptied = {name: [0, *rows[name][1:]] for name in moved}
        return rows | emptied | own, {MOVED: sum(moved.values())}


def sizes_beside(rows: Rows, config: PPOConfig, policy: Shapes, gpus: int, memory: float) -> VLLMSizes:
    """Returns vLLM's sizes on GPUs of `memory` bytes: a cache for all sequences, or for as many as fit.

    If that is less than half of them, optimizer states go to host memory. rows: of training.
    """
    size, text, element = config.vllm_tensor_parallel_size, policy.text, DTYPES[config.dtype].itemsize
    columns, drawn = -(-config.maxlen_prompt // BLOCK) * BLOCK, LOGIT * text.vocab_size
    token = cache_bytes(text, element, size)
    fixed = {
        "vLLM: weights": -(-element * policy.numel // size),
        "vLLM: activations": peak_bytes(policy.decoder, 1, tokens_of(config), backward=False),
        GRAPHS: GRAPH_BYTES,
    }
    prompts = size * -(-max(config.num_rollouts, config.num_eval_prompts) // gpus)
    wanted = min(prompts, AUTO_SLOTS if config.rollout_batch_size == "auto" else config.rollout_batch_size)
    wanted, states = slots_for(wanted, columns, config.rollout_cache_tokens), sum(_states(rows).values())
    free = int(ROOM * memory) - sum(row[0] for row in rows.values()) - sum(fixed.values())

    def fitting(more: int) -> int:
        return min(wanted, max(0, free + more - BLOCK * token) // (columns * token + drawn))

    if config.vllm_gpu_memory_utilization == "auto":
        offload = states > 0 and 2 * fitting(0) < wanted  # moving them takes less time than decoding in more turns
        slots = max(1, fitting(states if offload else 0))
        cache = (slots * columns + BLOCK) * token
    else:
        least = (columns + BLOCK) * token
        cache = max(least, int(config.vllm_gpu_memory_utilization * memory) - sum(fixed.values()))
        slots = min(wanted, (cache // token - BLOCK) // columns)
        offload = states > 0 and free < cache + slots * drawn
    awake = fixed | {"vLLM: key-value cache": cache, DRAWING: slots * drawn}
    missing = cache + slots * drawn - free - (states if offload else 0)
    return VLLMSizes(awake, slots, offload, max(0, missing))


def share_of(sizes: VLLMSizes, config: PPOConfig, memory: float) -> float:
    """Returns vLLM's gpu_memory_utilization: the flag's, or that of `sizes`. Raises UserError if these do not fit."""
    if config.vllm_gpu_memory_utilization != "auto":
        return config.vllm_gpu_memory_utilization
    if sizes.missing:
        raise UserError(
            f"--rollout_engine vllm: the policy's weights and a cache for one response take {sizes.budget / GIB:.1f} "
            f"GiB of each GPU, {sizes.missing / GIB:.1f} more than training leaves of {memory / GIB:.1f}. Split the "
            "weights over GPUs (--vllm_tensor_parallel_size), reduce what training holds (--zero_stage 3, "
            "--offload_optimizer, --offload_frozen), set --vllm_gpu_memory_utilization if this prediction is too high, "
            "or pass --rollout_engine own"
        )
    return sizes.budget / memory


def _states(rows: Rows) -> dict[str, int]:
    """Returns the rows that `TrainEngine.states_offloaded` empties during a rollout, and their bytes then."""
    return {name: row[0] for name, row in rows.items() if name.startswith(("optimizer of", "gradients of policy"))}
