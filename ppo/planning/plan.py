"""`train_ppo.py --plan`: where the memory of a run would go, from shapes alone; no weights are read, nothing starts.

What it assumes: GPUs; `config.json`'s vocabulary (the two tags of moss_zh are not in it); a run past its first
optimizer step, when Adam's moments are there; attention that keeps no [length, length] scores (sdpa's flash kernel,
flash_attention_2); prompts and responses of full length; reward models that read the policy's ids. Activations are
counted, not guessed: the decoder's operations run on the meta device (utils/memory/activation_peak.py). Not in it: the
CUDA context, what libraries keep, fragmentation; so a plan fits when it leaves a tenth of the card.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from ppo.config import PPOConfig
from ppo.decoding.kv_cache import AUTO_SLOTS, columns_for, slots_for, slots_in
from ppo.models import CHUNK_ELEMENTS, Models
from ppo.planning.shapes import Shapes, cache_bytes, models_of
from ppo.planning.step_time import CARDS, checkpoint, phases, table
from utils.distributed import world_size
from utils.engine.engine import DTYPES, ROOM, device_room, splits_frozen
from utils.flags.checks import choose
from utils.memory.activation_peak import peak_bytes
from utils.memory.recompute import layers_kept, num_layers, predicted, recompute_fewest, refuse_eager, training_peak
from utils.memory.zero_bytes import backward_bytes, gathered_bytes, moment_bytes, optimizer_bytes, weight_bytes
from utils.models.chunked_logprobs import logits_bytes
from utils.models.load import attention_cap

PHASES = ("rollout", "score", "backward", "step")
GIB = 2**30
TOKEN = 8 + 2 + 7 * 4  # bytes of a token in the buffer: its id, two masks, seven float32 columns
LOGIT = 48  # bytes at most of a logit while a token is drawn: the copies and sorted indices of top-p sampling

Rows = dict[str, list[int]]  # what -> bytes in each of PHASES


@dataclass(frozen=True)
class Sizes:
    """Slots of the rollout on each GPU; how many layers of policy and critic keep their activations."""

    slots: int
    kept: tuple[int, int]


def plan(config: PPOConfig, gpus: int) -> tuple[Rows, dict[str, int]]:
    """({what: bytes in each of PHASES} per GPU, {what: bytes} of host memory per process)."""
    rows, host = beside_passes(config, gpus)
    return rows | pass_rows(config, planned_sizes(config, gpus)), host


def beside_passes(config: PPOConfig, gpus: int) -> tuple[Rows, dict[str, int]]:
    """The rows and host memory of `plan` without the key-value cache and activations, which depend on `Sizes`."""
    stage, dtype = config.zero_stage, DTYPES[config.dtype]
    element = dtype.itemsize
    policy, critic, rewards = models_of(config)
    config.check_world(gpus, policy.decoder.config.vocab_size)
    trained, frozen, split = [policy, critic], [policy, *rewards], splits_frozen(stage, gpus)
    rows: Rows = {}

    def add(what: str, rollout: int = 0, score: int = 0, backward: int = 0, step: int = 0) -> None:
        rows[what] = [rollout, score, backward, step]

    def always(what: str, size: int) -> None:
        add(what, *[size] * len(PHASES))

    def weights(model: Shapes, stage: int) -> int:
        return weight_bytes(model.numels, stage, gpus, element)

    always("weights of the policy", weights(policy, stage))
    always("weights of the critic", weights(critic, stage))
    frozen_weights = [weights(model, 3 if split else 0) for model in frozen]
    if not config.offload_frozen:
        always("weights of the reference", frozen_weights[0])
        always(f"weights of {len(rewards)} reward model(s)", sum(frozen_weights[1:]))
    elif not split:
        add("a frozen model at a time", score=max(frozen_weights))
    states = sum(optimizer_bytes(model.numels, stage, gpus) for model in trained)
    always("optimizer of policy and critic", 0 if config.offload_optimizer else states)
    gradients, buckets, live = backward_bytes([model.numels for model in trained], config, gpus)
    held = (gradients, buckets) if stage == 3 else (0, 0)  # ZeRO-3 keeps the room for them
    add("gradients of policy and critic", held[0], held[0], gradients, gradients)
    in_float32 = 4 * max(-(-model.numel // gpus) for model in trained) if stage else 0
    add("gradients of one in float32", step=0 if config.offload_optimizer else in_float32)
    if buckets:
        add("communication buckets", held[1], held[1], buckets, buckets)
    if split:
        gathered = live if config.gather_for_generation == "never" else element * policy.numel
        scored = gathered_bytes(policy.numel, element)
        add("weights gathered from all GPUs", gathered * (stage == 3), scored, live)
    add("logits", 0, *logits_bytes(CHUNK_ELEMENTS, element))
    buffer = config.num_rollouts * config.maxlen_prompt * TOKEN
    add("experience buffer", score=buffer, backward=buffer, step=buffer)
    return rows, host_bytes(config, states, sum(frozen_weights), element * policy.numel)


def choose_sizes(config: PPOConfig, gpus: int, rows: Rows, free: int) -> Sizes:
    """The sizes that the flags give, or where they are auto, the largest that fit in memory.

    rows: of `beside_passes`; free: bytes of the card beside what these rows take in every phase.
    """
    policy, critic, _ = models_of(config)

    def room(phase: str) -> int:
        return free - sum(row[PHASES.index(phase)] - min(row) for row in rows.values())

    prompts, columns = -(-config.num_rollouts // gpus), columns_for(config.maxlen_prompt)
    wanted = config.rollout_batch_size
    if wanted == "auto":
        prompts = max(prompts, -(-config.num_eval_prompts // gpus))
        left = room("rollout") - prefill_peak(config, policy, prompts)
        wanted = slots_in(left, slot_bytes(config, policy.decoder.config), prompts)
    slots = slots_for(min(wanted, prompts), columns, config.rollout_cache_tokens)
    kept = [0 if config.gradient_checkpoint else num_layers(model.decoder) for model in (policy, critic)]
    if config.gradient_checkpoint == "auto":
        kept = [layers_kept(model.decoder, tokens_of(config), room("backward")) for model in (policy, critic)]
    return Sizes(slots, tuple(kept))


def planned_sizes(config: PPOConfig, gpus: int) -> Sizes:
    """The sizes on the card of the plan."""
    rows, _ = beside_passes(config, gpus)
    return choose_sizes(config, gpus, rows, int(ROOM * card_bytes(config)) - sum(map(min, rows.values())))


def fit_to_memory(config: PPOConfig, models: Models, say: Callable[[str], None]) -> None:
    """Chooses what flags leave to auto, once models are loaded and before the first forward. Collective."""
    free = device_room() if "auto" in (config.rollout_batch_size, config.gradient_checkpoint) else None
    if free is not None:
        no_sizes = Sizes(AUTO_SLOTS, (0, 0))
        say_sizes(config, models, predicted(lambda: measured_sizes(config, models, free), no_sizes, say), say)


def measured_sizes(config: PPOConfig, models: Models, free: int) -> Sizes:
    """The sizes on a card with so many bytes free before the first optimizer step, which allocates Adam's moments."""
    refuse_eager(models.policy.module.lm.config)
    gpus, trained = world_size(), [model.numels for model in models_of(config)[:2]]
    rows, _ = beside_passes(config, gpus)
    return choose_sizes(config, gpus, rows, free - moment_bytes(trained, config, gpus))


def say_sizes(config: PPOConfig, models: Models, sizes: Sizes, say: Callable[[str], None]) -> None:
    """Hands the sizes to the models and prints them."""
    if config.rollout_batch_size == "auto":
        models.policy.module.slots = sizes.slots
        say(f"--rollout_batch_size auto: {sizes.slots} sequences are decoded at once on each GPU")
    if config.gradient_checkpoint == "auto":
        recompute_fewest(models.policy.module.lm, sizes.kept[0], "policy", say)
        recompute_fewest(models.critic.module.backbone, sizes.kept[1], "critic", say)


def pass_rows(config: PPOConfig, sizes: Sizes) -> Rows:
    """The rows of the key-value cache and of activations."""
    policy, critic, rewards = models_of(config)
    cache = cache_bytes(policy.decoder.config, DTYPES[config.dtype].itemsize) * columns_for(config.maxlen_prompt)
    tokens = tokens_of(config)
    scored = max(peak_bytes(model.decoder, 1, tokens, backward=False) for model in [policy, critic, *rewards])
    trained = map(training_peak, (policy.decoder, critic.decoder), (tokens, tokens), sizes.kept)
    activations = [prefill_peak(config, policy, sizes.slots), scored, max(trained), 0]
    return {"key-value cache": [sizes.slots * cache, 0, 0, 0], "activations": activations}


def tokens_of(config: PPOConfig) -> int:
    """Tokens of the largest forward."""
    return max(config.micro_batch_tokens, config.maxlen_prompt)


def prefill_peak(config: PPOConfig, policy: Shapes, slots: int) -> int:
    """Bytes of activations in a forward over prompts."""
    length = config.maxlen_prompt - config.maxlen_res
    return peak_bytes(policy.decoder, min(slots, max(1, config.micro_batch_tokens // length)), length, backward=False)


def slot_bytes(config: PPOConfig, model: PretrainedConfig) -> int:
    """Bytes of one slot: keys and values, a copy of one layer's, logits and random numbers."""
    text, element = model.get_text_config(), DTYPES[config.dtype].itemsize
    layers = text.num_hidden_layers
    cache = cache_bytes(model, element) * columns_for(config.maxlen_prompt) * (layers + 1) // layers
    return cache + LOGIT * text.vocab_size + 8 * config.maxlen_res


def card_bytes(config: PPOConfig) -> float:
    """Bytes of memory of the card that the plan is for."""
    return GIB * (config.plan_gpu_memory or CARDS[config.plan_gpu].memory)


def host_bytes(config: PPOConfig, states: int, frozen: int, policy: int) -> dict[str, int]:
    """Host memory of a process beside Python and libraries. Gradients of offloaded optimizers are float32 there."""
    rows = {"final/ being written (first process alone)": policy}
    if config.offload_optimizer:
        rows["optimizer, with float32 gradients"] = states + states // 3
    if config.offload_frozen:
        rows["reference and reward models"] = frozen
    return rows


def print_plan(config: PPOConfig) -> None:
    """Prints tables of memory and time, and whether the run fits its card. The first process alone prints."""
    if int(os.environ.get("RANK", "0")):
        return
    if config.dtype == "auto":
        choose(config, "dtype", "bf16", f"the plan is for {config.plan_gpu} GPUs")
    gpus = config.plan_gpus or int(os.environ.get("WORLD_SIZE", "1"))
    rows, host = plan(config, gpus)
    sizes, (policy, critic, rewards) = planned_sizes(config, gpus), models_of(config)
    layers = [num_layers(model.decoder) for model in (policy, critic)]
    recomputed = [each - kept for each, kept in zip(layers, sizes.kept, strict=True)]
    print(
        f"GiB on each of {gpus} GPU(s), ZeRO-{config.zero_stage}, {config.dtype}, {sizes.slots} slots, "
        f"{recomputed[0]} of {layers[0]} layers of the policy recomputed, {recomputed[1]} of {layers[1]} of the critic"
    )
    print(f"{'':36}" + "".join(f"{phase:>10}" for phase in PHASES))
    totals = [sum(column) for column in zip(*rows.values(), strict=True)]
    for what, row in [*rows.items(), ("total", totals)]:
        print(f"{what:36}" + "".join(f"{size / GIB:10.2f}" for size in row))
    print("\nGiB of host memory, each process")
    for what, size in host.items():
        print(f"{what:46}{size / GIB:10.2f}")
    print("\n" + verdict(config, gpus, totals))
    trained, judges = (policy.work, critic.work), [model.work for model in rewards]
    seconds = phases(config, gpus, *trained, judges, sizes.slots, sum(recomputed) / sum(layers))
    print("\n" + table(config, seconds, checkpoint(config, gpus, *trained)))
    if attention_cap(policy.decoder.config):
        print("Not counted: the attention scores that eager attention keeps, which this policy's cap of them needs")


def verdict(config: PPOConfig, gpus: int, totals: list[int]) -> str:
    """One line, and where it does not fit, which single flags would make it fit."""
    peak, card = max(totals) / GIB, card_bytes(config) / GIB
    where = f"{peak:.1f} of {card:g} GiB, in {PHASES[totals.index(max(totals))]}"
    if peak <= ROOM * card:
        return f"FITS: {where}"
    changes = [{"gradient_checkpoint": True}, {"zero_stage": 3}, {"offload_optimizer": True}, {"offload_frozen": True}]
    helps = []
    for change in changes:
        other = max(map(sum, zip(*plan(replace(config, **change), gpus)[0].values(), strict=True))) / GIB
        if other < 0.98 * peak:
            helps += [f"--{name} {value}: {other:.1f} GiB" for name, value in change.items()]
    much = "DOES NOT FIT" if peak > card else f"TIGHT (under {100 * (1 - ROOM):.0f} % left for CUDA and fragments)"
    return f"{much}: {where}. Each by itself gives {'; '.join(helps) or 'nothing: take smaller batches'}"
