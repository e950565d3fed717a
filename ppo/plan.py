"""`train_ppo.py --plan`: where the memory of a run would go, from shapes alone; no weights are read, nothing starts.

What it assumes: GPUs; `config.json`'s vocabulary (the two tags of moss_zh are not in it); a run past its first
optimizer step, when Adam's moments are there; attention that keeps no [length, length] scores (sdpa's flash kernel,
flash_attention_2); prompts and responses of full length; reward models that read the policy's ids. Activations are
counted, not guessed: the decoder's operations run on the meta device (utils/peak.py). Not in it: the CUDA context, what
libraries keep, fragmentation; so a plan fits when it leaves a tenth of the card.
"""

import copy
import os
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

from ppo.config import PPOConfig
from ppo.models import CHUNK_ELEMENTS
from ppo.slots import columns_for, slots_for
from utils.engine import DTYPES, splits_frozen
from utils.errors import UserError
from utils.footprint import bucket_bytes, gathered_bytes, gradient_bytes, optimizer_bytes, weight_bytes
from utils.models import attention_cap, enable_checkpointing
from utils.nll import FLOATS, KEPT
from utils.peak import ATTENTION, peak_bytes
from utils.rows import decoder_of

PHASES = ("rollout", "score", "backward", "step")
GIB = 2**30
ROOM = 0.9  # share of the card that a plan may take
TOKEN = 8 + 2 + 7 * 4  # bytes of a token in the buffer: its id, two masks, seven float32 columns

Rows = dict[str, list[int]]  # what -> bytes in each of PHASES


@dataclass(frozen=True, eq=False)
class Shapes:
    """One model: elements of its parameters, its decoder on the meta device."""

    numels: list[int]
    decoder: nn.Module

    @property
    def numel(self) -> int:
        return sum(self.numels)


@cache
def shapes(path: str, flag: str, dtype: torch.dtype, head: str) -> Shapes:
    """The shapes of the model in a folder (or hub id), of which config.json alone is read. head: "lm" or "scalar"."""
    try:
        settings = AutoConfig.from_pretrained(path, trust_remote_code=False)
        kind = AutoModelForCausalLM if head == "lm" else AutoModel
        with torch.device("meta"):
            model = kind.from_config(settings, dtype=dtype, attn_implementation=ATTENTION)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: no model's config.json there ({str(error).splitlines()[0]})") from error
    numels = [p.numel() for p in model.parameters()]
    if head == "lm":
        return Shapes(numels, decoder_of(model))
    return Shapes([*numels, settings.get_text_config().hidden_size], model)


def plan(config: PPOConfig, gpus: int) -> tuple[Rows, dict[str, int]]:
    """({what: bytes in each of PHASES} of a GPU, {what: bytes} of host memory a process)."""
    stage, dtype = config.zero_stage, DTYPES[config.dtype]
    element = dtype.itemsize
    policy = shapes(config.policy_model_path, "--policy_model_path", dtype, "lm")
    critic = shapes(config.critic_model_path, "--critic_model_path", dtype, "scalar")
    rewards = [shapes(path, config.reward_flag, dtype, "scalar") for path in config.reward_paths]
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
    in_sum = 4 if config.adds_up_in_float32 else element
    gradients = sum(gradient_bytes(model.numels, stage, gpus, in_sum) for model in trained)
    held = gradients if stage == 3 else 0  # ZeRO-3 keeps the room for them
    add("gradients of policy and critic", held, held, gradients, gradients)
    in_float32 = 4 * max(-(-model.numel // gpus) for model in trained) if stage else 0
    add("gradients of one in float32", step=0 if config.offload_optimizer else in_float32)
    if gpus > 1 or (stage == 2 and config.adds_up_in_float32):  # which bf16 gradients pass on their way to that sum
        buckets = bucket_bytes(stage, policy.numel, element)
        held = buckets if stage == 3 else 0
        add("communication buckets", held, held, buckets, buckets)
    if split:
        live = gathered_bytes(policy.numel, element)
        gathered = live if config.gather_for_generation == "never" else element * policy.numel
        add("weights gathered from all GPUs", gathered * (stage == 3), live, live * (stage == 3))
    add_passes(add, config, policy, [critic, *rewards], gpus)
    return rows, host_bytes(config, states, sum(frozen_weights), element * policy.numel)


def add_passes(add, config: PPOConfig, policy: Shapes, scalars: list[Shapes], gpus: int) -> None:
    """The rows of what passes through the models: cache, activations, logits, the buffer."""
    element, length = DTYPES[config.dtype].itemsize, config.maxlen_prompt
    prompts, columns = -(-config.num_rollouts // gpus), columns_for(length)
    slots = slots_for(min(config.rollout_batch_size, prompts), columns, config.rollout_cache_tokens)
    add("key-value cache", rollout=slots * columns * cache_bytes(policy.decoder.config, element))
    room = length - config.maxlen_res
    tokens = max(config.micro_batch_tokens, length)
    prefill = peak_bytes(policy.decoder, min(slots, max(1, config.micro_batch_tokens // room)), room, backward=False)
    scored = max(peak_bytes(model.decoder, 1, tokens, backward=False) for model in [policy, *scalars])
    trained = max(training_peak(m.decoder, tokens, config.gradient_checkpoint) for m in (policy, scalars[0]))
    add("activations", prefill, scored, trained)
    chunk, in_float32 = CHUNK_ELEMENTS * element, 3 * 4 * FLOATS["cuda"]
    # Of one chunk the gradient too, and in its log-softmax three numbers a logit.
    add("logits", score=chunk + in_float32, backward=(KEPT + 1) * chunk + in_float32)
    buffer = config.num_rollouts * length * TOKEN
    add("experience buffer", score=buffer, backward=buffer, step=buffer)


@cache
def training_peak(decoder: nn.Module, tokens: int, checkpointing: bool) -> int:
    """Of a forward and a backward."""
    decoder = copy.deepcopy(decoder).train()
    if checkpointing:
        enable_checkpointing(decoder)
    return peak_bytes(decoder, 1, tokens, backward=True)


def cache_bytes(config: PretrainedConfig, element: int) -> int:
    """Keys and values of one token in all layers."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * size * element


def host_bytes(config: PPOConfig, states: int, frozen: int, policy: int) -> dict[str, int]:
    """Host memory of a process beside Python and its libraries. Gradients of offloaded optimizers are float32 there."""
    rows = {"final/ being written (first process alone)": policy}
    if config.offload_optimizer:
        rows["optimizer, with float32 gradients"] = states + states // 3
    if config.offload_frozen:
        rows["reference and reward models"] = frozen
    return rows


def print_plan(config: PPOConfig) -> None:
    """The table, and whether it fits a card of --plan_gpu_memory GiB. Printed by the first process alone."""
    if int(os.environ.get("RANK", "0")):
        return
    gpus = config.plan_gpus or int(os.environ.get("WORLD_SIZE", "1"))
    rows, host = plan(config, gpus)
    checkpointing = "with" if config.gradient_checkpoint else "without"
    print(f"GiB on each of {gpus} GPU(s), ZeRO-{config.zero_stage}, {config.dtype}, {checkpointing} checkpointing")
    print(f"{'':36}" + "".join(f"{phase:>10}" for phase in PHASES))
    totals = [sum(column) for column in zip(*rows.values(), strict=True)]
    for what, sizes in [*rows.items(), ("total", totals)]:
        print(f"{what:36}" + "".join(f"{size / GIB:10.2f}" for size in sizes))
    print("\nGiB of host memory, each process")
    for what, size in host.items():
        print(f"{what:46}{size / GIB:10.2f}")
    print("\n" + verdict(config, gpus, totals))
    policy = shapes(config.policy_model_path, "--policy_model_path", DTYPES[config.dtype], "lm")
    if attention_cap(policy.decoder.config):
        print("Not counted: the attention scores that eager attention keeps, which this policy's cap of them needs")


def verdict(config: PPOConfig, gpus: int, totals: list[int]) -> str:
    """One line, and where it does not fit, which single flags would make it fit."""
    peak, card = max(totals) / GIB, config.plan_gpu_memory
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
