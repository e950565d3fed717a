"""Predicts the memory of a run from shapes alone, without reading weights.

Assumptions: GPUs; a run after its first optimizer step; attention that keeps no [length, length] scores; prompts and
responses of full length; reward models that read the policy's ids. Activations are counted on the meta device. Not
counted: the CUDA context, libraries, fragmentation; so a plan fits if it leaves a tenth of the memory.
"""

from copy import copy
from dataclasses import dataclass
from itertools import repeat

from torch import nn

from ppo.config import PPOConfig
from ppo.decoding.kv_cache import AUTO_SLOTS, columns_for, slots_for, slots_in
from ppo.models import CHUNK_ELEMENTS, Models
from ppo.planning.shapes import Shapes, cache_bytes, models_of, sharing, slot_bytes, tokens_of
from ppo.planning.step_time import CARDS
from ppo.planning.vllm_memory import GIB, PHASES, Rows, VLLMSizes, share_of, sizes_beside
from utils.device import on_gpu
from utils.distributed import world_size
from utils.engine.engine import DTYPES
from utils.engine.memory import ROOM, device_memory, device_room
from utils.engine.settings import trained_as
from utils.engine.split import splits_frozen
from utils.errors import Say
from utils.memory.activation_peak import peak_bytes
from utils.memory.recompute import layers_kept, num_layers, predicted, recompute_fewest, refuse_eager, training_peak
from utils.memory.zero_bytes import backward_bytes, gathered_bytes, moment_bytes, optimizer_bytes, weight_bytes
from utils.models.chunked_logprobs import logits_bytes

TOKEN = 8 + 2 + 7 * 4  # bytes per token of the buffer: id, two masks, seven float32 columns


@dataclass(frozen=True)
class Sizes:
    """Slots of the rollout on each GPU; per trained model, the layers that keep their activations."""

    slots: int
    kept: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """Bytes on each GPU in each of PHASES, bytes of host memory per process, and the sizes they are for.

    vllm: of --rollout_engine vllm; None: the policy's own engine samples.
    """

    rows: Rows
    host: dict[str, int]
    sizes: Sizes
    vllm: VLLMSizes | None

    @property
    def totals(self) -> list[int]:
        """Bytes on each GPU in each of PHASES."""
        return [sum(column) for column in zip(*self.rows.values(), strict=True)]


def plan(config: PPOConfig, gpus: int) -> Plan:
    """Returns the plan of a run on `gpus` GPUs of --plan_gpu."""
    config.check_world(gpus, models_of(config)[0]["policy"].decoder.config.vocab_size)
    config, memory = with_gathering(config, gpus, gpu_bytes(config)), gpu_bytes(config)
    rows, host = fixed_rows(config, gpus)
    vllm = vllm_sizes(config, gpus, memory) if config.rollout_engine == "vllm" else None
    if vllm:
        rows, moved = vllm.beside(rows)
        host |= moved
    free = int(ROOM * memory) - sum(map(min, rows.values()))
    sizes = choose_sizes(config, gpus, rows, free, vllm)
    return Plan(rows | pass_rows(config, sizes), host, sizes, vllm)


def vllm_sizes(config: PPOConfig, gpus: int, memory: float) -> VLLMSizes:
    """Returns what vLLM gets on each GPU of `memory` bytes beside the training of `gpus` GPUs."""
    return sizes_beside(fixed_rows(config, gpus)[0], config, models_of(config)[0]["policy"], gpus, memory)


def vllm_room(config: PPOConfig, gpus: int) -> tuple[float, bool]:
    """Returns (vLLM's gpu_memory_utilization on this GPU, whether optimizer states leave it during rollouts).

    On a CPU they stay, and the share has no effect. Raises UserError if training leaves too little for auto.
    """
    if not on_gpu():
        return 1.0, False
    memory = device_memory()
    sizes = vllm_sizes(config, gpus, memory)
    return share_of(sizes, config, memory), sizes.offload_states


def with_gathering(config: PPOConfig, gpus: int, memory: float) -> PPOConfig:
    """Returns the flags with --gather_for_generation auto decided as the run does: always if 1.5 times the weights fit.

    memory: bytes of each GPU.
    """
    if config.zero_stage < 3 or config.gather_for_generation != "auto" or config.rollout_engine == "vllm":
        return config
    decided, policy = copy(config), models_of(config)[0]["policy"]
    decided.gather_for_generation = "never"
    free = memory - sum(map(min, fixed_rows(decided, gpus)[0].values()))
    if 1.5 * DTYPES[config.dtype].itemsize * policy.numel <= free:
        decided.gather_for_generation = "always"
    return decided


def fixed_rows(config: PPOConfig, gpus: int) -> tuple[Rows, dict[str, int]]:
    """Returns rows and host memory of a plan without key-value cache and activations, which depend on `Sizes`.

    config: with --gather_for_generation decided by `with_gathering`.
    """
    stage, dtype = config.zero_stage, DTYPES[config.dtype]
    element = dtype.itemsize
    models, rewards = models_of(config)
    policy, names, numels = models["policy"], " and ".join(models), [model.trained for model in models.values()]
    frozen, split = [policy, *rewards], splits_frozen(stage, gpus)
    rows: Rows = {}

    def add(what: str, rollout: int = 0, score: int = 0, backward: int = 0, step: int = 0) -> None:
        rows[what] = [rollout, score, backward, step]

    def add_always(what: str, size: int) -> None:
        add(what, *[size] * len(PHASES))

    def weights(model: Shapes, stage: int, is_shared: bool) -> int:
        return 0 if is_shared else weight_bytes(model.numels, stage, gpus, element)

    trained_share, frozen_share = sharing(config, models, rewards)
    for name, model in models.items():
        add_always(f"weights of the {name}", weights(model, stage, trained_share[name]))
    if config.lora_rank:
        add_always(f"adapters of {names}", 4 * sum(map(sum, numels)))
    frozen_weights = [weights(*pair) for pair in zip(frozen, repeat(3 if split else 0), frozen_share, strict=False)]
    if not config.offload_frozen:
        add_always("weights of the reference", frozen_weights[0])
        add_always(f"weights of {len(rewards)} reward model(s)", sum(frozen_weights[1:]))
    elif not split:
        add("one frozen model at a time", score=max(frozen_weights))
    averages = average_bytes(config, gpus, policy.numel)
    rows |= {"averages of the policy": [averages] * len(PHASES)} if averages and not config.offload_optimizer else {}
    states = sum(optimizer_bytes(x, stage, gpus) for x in numels)
    add_always(f"optimizer of {names}", 0 if config.offload_optimizer else states)
    gradients, buckets, live = backward_bytes(numels, trained_as(config), gpus)
    held = (gradients, buckets) if stage == 3 else (0, 0)  # ZeRO-3 keeps them allocated
    add(f"gradients of {names}", held[0], held[0], gradients, gradients)
    in_float32 = 4 * max(-(-sum(x) // gpus) for x in numels) if stage else 0
    add("gradients of one in float32", step=0 if config.offload_optimizer else in_float32)
    if buckets:
        add("communication buckets", held[1], held[1], buckets, buckets)
    if split:
        gathered = gathered_in_rollouts(config, policy, live) if stage == 3 else 0
        add("weights gathered from all GPUs", gathered, gathered_bytes(policy.numel, element), live)
    add("logits", 0, *logits_bytes(CHUNK_ELEMENTS, element, tokens_of(config) * policy.text.vocab_size))
    buffer = config.num_rollouts * config.maxlen_prompt * TOKEN
    add("experience buffer", score=buffer, backward=buffer, step=buffer)
    exported = 4 * sum(policy.adapters) if config.export == "adapter" else element * policy.numel
    return rows, host_bytes(config, states, sum(frozen_weights), exported, averages)


def gathered_in_rollouts(config: PPOConfig, policy: Shapes, live: int) -> int:
    """Returns the bytes of weights that ZeRO-3 gathers on each GPU in rollouts. live: in each forward pass."""
    element = DTYPES[config.dtype].itemsize
    if config.rollout_engine == "vllm":  # which gets copies of one layer at a time
        return 2 * element * max(policy.work.body // policy.work.layers, policy.work.head)
    return live if config.gather_for_generation == "never" else element * policy.numel


def average_bytes(config: PPOConfig, gpus: int, numel: int) -> int:
    """Returns the bytes on each GPU of a moving reference and of --policy_ema, which hold float32 weights."""
    count = (config.reference != "frozen") + bool(config.policy_ema)
    return 4 * count * -(-numel // (gpus if config.zero_stage else 1))


def choose_sizes(config: PPOConfig, gpus: int, rows: Rows, free: int, vllm: VLLMSizes | None = None) -> Sizes:
    """Returns the sizes that the flags give or, if they are auto, the largest that fit in memory.

    free: bytes of GPU memory that `rows`, of `fixed_rows`, leave in every phase. vllm: what samples; None: the policy.
    """
    models, rewards = models_of(config)

    def free_in(phase: str) -> int:
        return free - sum(row[PHASES.index(phase)] - min(row) for row in rows.values())

    def kept(decoder: nn.Module) -> int:
        if config.gradient_checkpoint == "auto":
            return layers_kept(decoder, tokens_of(config), free_in("backward"))
        return 0 if config.gradient_checkpoint else num_layers(decoder)

    slots = vllm.slots if vllm else own_slots(config, gpus, models["policy"], free_in("rollout"))
    found = {name: kept(model.decoder) for name, model in models.items()}
    if any(sharing(config, models, rewards)[0].values()):  # the same layers
        found = dict.fromkeys(found, min(found.values()))
    return Sizes(slots, found)


def own_slots(config: PPOConfig, gpus: int, policy: Shapes, free: int) -> int:
    """Returns the slots of the policy's own engine that fit in `free` bytes, or those of --rollout_batch_size."""
    prompts, columns = -(-config.num_rollouts // gpus), columns_for(config.maxlen_prompt)
    wanted = config.rollout_batch_size
    if wanted == "auto":
        prompts = max(prompts, -(-config.num_eval_prompts // gpus))
        left = free - prefill_peak(config, policy, prompts)
        wanted = slots_in(left, slot_bytes(config, policy.decoder.config), prompts)
    return slots_for(min(wanted, prompts), columns, config.rollout_cache_tokens)


def fit_to_memory(config: PPOConfig, models: Models, say: Say) -> None:
    """Chooses sizes that are auto, after models are loaded and before the first forward. Collective."""
    free = device_room() if "auto" in (config.rollout_batch_size, config.gradient_checkpoint) else None
    if free is not None:
        safe = Sizes(AUTO_SLOTS, dict.fromkeys(models.engines(), 0))
        apply_sizes(config, models, predicted(lambda: measured_sizes(config, models, free), safe, say), say)


def measured_sizes(config: PPOConfig, models: Models, free: int) -> Sizes:
    """Returns the sizes for a GPU with `free` bytes before the first optimizer step, which allocates Adam's moments."""
    refuse_eager(models.policy.module.lm.config)
    gpus, trained = world_size(), [model.trained for model in models_of(config)[0].values()]
    config = with_gathering(config, gpus, device_memory())
    rows, _ = fixed_rows(config, gpus)
    vllm = vllm_sizes(config, gpus, device_memory()) if config.rollout_engine == "vllm" else None
    return choose_sizes(config, gpus, rows, free - moment_bytes(trained, config, gpus), vllm)


def apply_sizes(config: PPOConfig, models: Models, sizes: Sizes, say: Say) -> None:
    """Sets automatic sizes on the models and prints them."""
    if config.rollout_batch_size == "auto" and config.rollout_engine != "vllm":
        models.policy.module.slots = sizes.slots
        say(f"--rollout_batch_size auto: {sizes.slots} sequences are decoded at once on each GPU")
    if config.gradient_checkpoint == "auto":
        part = {"policy": "lm", "critic": "backbone"}
        for name, engine in models.engines().items():
            recompute_fewest(getattr(engine.module, part[name]), sizes.kept[name], name, say)


def pass_rows(config: PPOConfig, sizes: Sizes) -> Rows:
    """Returns the rows of key-value cache and activations."""
    models, rewards = models_of(config)
    policy = models["policy"]
    cache = cache_bytes(policy.decoder.config, DTYPES[config.dtype].itemsize) * columns_for(config.maxlen_prompt)
    tokens = tokens_of(config)
    scored = max(peak_bytes(model.decoder, 1, tokens, backward=False) for model in [*models.values(), *rewards])
    trained = max(training_peak(model.decoder, tokens, sizes.kept[name]) for name, model in models.items())
    if config.rollout_engine == "vllm":
        return {"activations": [0, scored, trained, 0]}
    activations = [prefill_peak(config, policy, sizes.slots), scored, trained, 0]
    return {"key-value cache": [sizes.slots * cache, 0, 0, 0], "activations": activations}


def prefill_peak(config: PPOConfig, policy: Shapes, slots: int) -> int:
    """Returns the bytes of activations in a forward over prompts."""
    length = config.maxlen_prompt - config.maxlen_res
    return peak_bytes(policy.decoder, min(slots, max(1, config.micro_batch_tokens // length)), length, backward=False)


def gpu_bytes(config: PPOConfig) -> float:
    """Returns the bytes of memory of the GPU that the plan is for."""
    return GIB * (config.plan_gpu_memory or CARDS[config.plan_gpu].memory)


def host_bytes(config: PPOConfig, states: int, frozen: int, exported: int, averages: int) -> dict[str, int]:
    """Returns the bytes of host memory per process, without Python and libraries."""
    rows = {"final/ being written (first process only)": exported}
    if config.offload_optimizer:
        rows["optimizer, with float32 gradients"] = states + states // 3
        rows |= {"averages of the policy": averages} if averages else {}
    if config.offload_frozen:
        rows["reference and reward models"] = frozen
    return rows
