"""Predicts the seconds of each phase of a buffer on a GPU from bytes, FLOPs and kernel launches.

Assumes prompts and responses as long as the flags allow, nodes of NODE GPUs, and that a token passes all experts of a
mixture. Evaluation, --reward_fn, the host's work between forwards and the latency of a network are not counted.
"""

from dataclasses import dataclass

from ppo.config import PPOConfig

LAUNCHES = 23  # kernels per decoder layer in a forward
CPU_ADAM = 1e9  # parameters per second in a step of CPU Adam, per process; not measured yet
DISK = 2e9  # bytes per second written by a node; not measured yet
NODE = 8  # GPUs per node
# vLLM, seconds of the host, on loaded CPUs: per step, and per sequence of it; per tensor that is loaded, compared; and
# estimates: one all-reduce of few tokens between GPUs of a node; mapping memory in wake-up and sleep.
VLLM_STEP, VLLM_SEQUENCE, LOADED, COMPARED, ALL_REDUCE, WAKING = 2e-3, 2e-5, 5e-4, 1e-4, 15e-6, 0.2
TENSORS = 9  # weights of a decoder layer
STEP_BYTES = 30  # per parameter in an optimizer step: weight and two moments read and written, gradient, bf16 weight


@dataclass(frozen=True)
class Card:
    """Rates of a GPU's data sheet (without sparsity), and estimates of the reached share of each, none measured yet."""

    memory: float  # GiB
    bf16: float  # FLOP/s of matrix products, accumulated in float32
    fp32: float  # FLOP/s, without TF32
    bandwidth: float  # bytes/s of its memory
    host: float  # bytes/s to or from the host, PCIe
    link: float  # bytes/s to other GPUs of the node: NVLink, or PCIe
    network: float  # bytes/s from a node to others, over all its ports
    product_share: float = 0.8  # of the matrix rate, in a product of 8192 x 8192
    forward_share: float = 0.7  # of that product's rate, in a whole forward
    backward_share: float = 0.7
    bandwidth_share: float = 0.85
    host_share: float = 0.8  # from pinned memory
    link_share: float = 0.75
    launch: float = 11e-6  # seconds of the host per kernel

    def rate(self, dtype: str, backward: bool = False) -> float:
        """Returns the FLOP/s that a pass reaches."""
        share = self.backward_share if backward else self.forward_share
        return (self.bf16 if dtype == "bf16" else self.fp32) * self.product_share * share


CARDS = {
    "a100": Card(80, 312e12, 19.5e12, 2.04e12, 32e9, 300e9, 200e9),
    "h100": Card(80, 989e12, 66.9e12, 3.35e12, 64e9, 450e9, 400e9),
    "h200": Card(141, 989e12, 66.9e12, 4.8e12, 64e9, 450e9, 400e9),
    "4090": Card(24, 165e12, 82.6e12, 1.01e12, 32e9, 32e9, 12.5e9, launch=8e-6),
}


@dataclass(frozen=True)
class Work:
    """The sizes of a model that its time depends on."""

    numel: int  # parameters
    trained: int  # parameters that are trained: those of its adapter with --lora_rank
    body: int  # parameters without embedding and head
    width: int  # layers x heads x head size
    head: int  # hidden size x vocabulary, 0 for a scalar head
    layers: int
    token: int  # bytes of a token's keys and values
    captured: bool  # whether a decoding step is one CUDA graph

    def flops(self, rows: float, length: int, headed: int) -> float:
        """Returns the FLOPs of a forward of `rows` rows of `length` tokens, `headed` of which pass the head."""
        return 2 * rows * (self.body * length + self.width * length**2 + self.head * headed)


@dataclass(frozen=True)
class Phase:
    """Predicted seconds, a lower bound by the data sheet's rates, what limits the prediction, bytes each GPU sends."""

    name: str
    seconds: float
    floor: float
    bound: str
    sent: float = 0.0


def phases(
    config: PPOConfig, gpus: int, trained: dict[str, Work], rewards: list[Work], slots: int, recomputed: float,
    moved: int = 0,
) -> list[Phase]:  # fmt: skip
    """Returns the phases of one buffer on config.plan_gpu. recomputed: share of layers that the update runs twice.

    moved: bytes of optimizer states that go to host memory while vLLM samples.
    """
    card, element = CARDS[config.plan_gpu], 2 if config.dtype == "bf16" else 4
    run = _Run(config, card, gpus, element)
    update = run.update(list(trained.values()), recomputed)
    copies = run.sync(trained["policy"], moved) if config.rollout_engine == "vllm" else []
    return [*copies, *run.rollout(trained["policy"], slots), run.score(trained, rewards), update]


def checkpoint(config: PPOConfig, gpus: int, trained: dict[str, Work]) -> Phase:
    """Predicts writing a checkpoint: each node its share. Its lower bound is the copy to host memory."""
    size, card = 12 * sum(work.trained for work in trained.values()), CARDS[config.plan_gpu]
    return Phase("checkpoint", size / DISK / -(-gpus // NODE), size / gpus / card.host, f"disk, {size / 1e9:.0f} GB")


def in_turn(*parts: tuple[float, str]) -> tuple[float, str]:
    """Returns the seconds of operations one after another, and the name of the longest."""
    return sum(seconds for seconds, _ in parts), max(parts)[1]


@dataclass(frozen=True)
class _Run:
    config: PPOConfig
    card: Card
    gpus: int
    element: int

    @property
    def rows(self) -> float:
        """Responses per rank."""
        return self.config.num_rollouts / self.gpus

    def sheet(self, flops: float) -> float:
        """Seconds at the data sheet's matrix rate."""
        return flops / (self.card.bf16 if self.config.dtype == "bf16" else self.card.fp32)

    def gather(self, size: float) -> float:
        """Bytes that each GPU sends to gather `size` bytes from all ranks, or to reduce them to shares: ring."""
        return size * (self.gpus - 1) / self.gpus

    def exchange(self, sent: float) -> tuple[float, str]:
        """Seconds for each GPU to send these bytes, and where. Source: NCCL tests, PERFORMANCE.md, "bus bandwidth".

        A collective is several rings over all GPUs. Each enters and leaves a node once, through a port of its own. So
        all ports of a node together send as much as each GPU's link: the slower one of them limits the rings.
        """
        network = self.config.plan_network * 1e9 / 8 or self.card.network
        if self.gpus > NODE and network < self.card.link:
            return sent / (network * self.card.link_share), "exchange between nodes"
        return sent / (self.card.link * self.card.link_share), "exchange between GPUs"

    def slowest(self, sent: float, **seconds: float) -> tuple[float, str]:
        """Returns seconds and name of the longest of operations that run at the same time, one sends these bytes."""
        others = [(value, name.replace("_", " ")) for name, value in seconds.items()]
        return max(*others, self.exchange(sent), key=lambda operation: operation[0])

    def forwards(self, rows: float) -> int:
        """Number of micro-batches of rows of full length."""
        return -int(-rows // max(1, self.config.micro_batch_tokens // self.config.maxlen_prompt))

    def launches(self, model: Work, forwards: float) -> float:
        """Seconds of the host to launch the kernels of forwards."""
        return forwards * model.layers * LAUNCHES * self.card.launch

    def sync(self, policy: Work, moved: int) -> list[Phase]:
        """Predicts copying the weights to vLLM, and comparing them there. Under ZeRO-3, each gathers them by layer."""
        card, tensors, whole = self.card, TENSORS * policy.layers, self.element * policy.numel
        split = self.config.zero_stage == 3
        sent = self.gather(whole) if split else 0.0
        touched = 2 * whole * (split + 1 / self.config.vllm_tensor_parallel_size)  # a copy when gathered, one in vLLM
        parts = [(touched / (card.bandwidth * card.bandwidth_share), "memory"), self.exchange(sent)]
        load = in_turn(
            *parts, (tensors * LOADED, "host"), (WAKING, "waking vLLM"),
            (2 * moved / (card.host * card.host_share), "optimizer states to host memory"),
        )  # fmt: skip
        compare, floor = in_turn(*parts, (tensors * COMPARED, "host")), touched / card.bandwidth
        return [
            Phase("weights", load[0], floor, load[1], sent),
            Phase("comparison", compare[0], floor, compare[1], sent),
        ]

    def rollout(self, policy: Work, slots: int) -> list[Phase]:
        """Predicts prompts and new tokens: one step per token of a response, one response after another per slot.

        Under ZeRO-3 the weights are gathered once, before the prompts, or in every forward. vLLM holds all, or a share
        per GPU of those that decode together; its host works before each step, while the GPU waits.
        """
        config, card, response = self.config, self.card, self.config.maxlen_res
        vllm = config.rollout_engine == "vllm"
        size = config.vllm_tensor_parallel_size if vllm else 1
        rows = size * self.rows
        prompt, forwards = config.maxlen_prompt - response, self.forwards(rows)
        steps, weights = -int(-rows // slots) * response, self.element * (policy.body + policy.head) / size
        split, once = config.zero_stage == 3 and not vllm, config.gather_for_generation != "never"
        each = self.gather(self.element * policy.numel) if split else 0.0
        before, in_prefill, in_steps = (each, 0.0, 0.0) if once else (0.0, forwards * each, steps * each)
        flops = policy.flops(rows, prompt, 1) / size
        prefill = self.slowest(
            in_prefill, matrix_products=flops / card.rate(config.dtype), launches=self.launches(policy, forwards)
        )
        cache = rows * response * (prompt + response / 2) * policy.token / size
        captured = vllm or (policy.captured and (once or not split))
        decoding = self.slowest(
            in_steps,
            memory=(steps * weights + cache) / (card.bandwidth * card.bandwidth_share),
            launches=card.launch * steps if captured else self.launches(policy, steps),
            matrix_products=policy.flops(rows * response, 1, 1) / size / card.rate(config.dtype),
        )
        if vllm:
            host = steps * VLLM_STEP + rows * response * VLLM_SEQUENCE
            reduced = 2 * policy.layers * steps * ALL_REDUCE if size > 1 else 0.0
            decoding = in_turn(decoding, (host, "vLLM's host"), (reduced, "exchange between GPUs"))
        floor = (response * weights + cache) / card.bandwidth
        prompts = in_turn(self.exchange(before), prefill)
        return [
            Phase("prompts", prompts[0], self.sheet(flops), prompts[1], before + in_prefill),
            Phase("new tokens", decoding[0], floor, decoding[1], in_steps),
        ]

    def score(self, models: dict[str, Work], rewards: list[Work]) -> Phase:
        """Predicts a forward of each model. From ZeRO-1 on, frozen models are split, and gathered layer by layer."""
        config, forwards = self.config, self.forwards(self.rows)
        trained = [work for name, work in models.items() if name != "policy" or not config.reuse_sampler_logprobs]
        frozen = [models["policy"], *rewards]
        flops = sum(m.flops(self.rows, config.maxlen_prompt, config.maxlen_res) for m in trained + frozen)
        split = self.gpus > 1 and config.zero_stage > 0
        gathered = (frozen if split else []) + (trained if config.zero_stage == 3 else [])
        copied = sum(m.numel for m in frozen) * self.element if config.offload_frozen else 0
        sent = forwards * self.gather(self.element * sum(m.numel for m in gathered))
        passes = self.slowest(
            sent,
            matrix_products=flops / self.card.rate(config.dtype),
            launches=sum(self.launches(m, forwards) for m in trained + frozen),
        )
        copies = copied * (forwards / self.gpus if split else 1) / (self.card.host * self.card.host_share)
        seconds, bound = in_turn(passes, (copies, "copies from host"))
        return Phase("scoring", seconds, self.sheet(flops), bound, sent)

    def update(self, models: list[Work], recomputed: float) -> Phase:
        """Predicts forwards, recomputed layers, backwards, gradients over ranks, optimizer steps.

        A backward has twice the FLOPs of a forward, or as many if weights are frozen.
        """
        config, card = self.config, self.card
        numel, steps = sum(m.trained for m in models), config.ppo_epochs * config.num_rollouts // config.batch_size
        forwards = steps * self.forwards(config.batch_size / self.gpus)
        flops = config.ppo_epochs * sum(
            m.flops(self.rows, config.maxlen_prompt, config.maxlen_res if m.head else 0) for m in models
        )
        backwards = 1 if config.lora_rank else 2  # no gradients of frozen weights
        passes = (1 + recomputed) * flops / card.rate(config.dtype)
        passes += backwards * flops / card.rate(config.dtype, backward=True)
        # An all-reduce counts twice. DeepSpeed's ZeRO-1 and 2 all-reduce gradients, ZeRO-2 and 3 in each micro-batch's
        # backward; ZeRO-3 reduces them to shares and gathers weights twice. After a step, ZeRO-1 and 2 gather weights.
        each = self.gather((4 if config.lora_rank else self.element) * numel)
        during = forwards * each * {2: 2, 3: 3}.get(config.zero_stage, 0)
        after = steps * each * {0: 2, 1: 3, 2: 1, 3: 0}[config.zero_stage]
        backward = self.slowest(
            during,
            matrix_products=passes,
            launches=(3 + recomputed) * sum(self.launches(m, forwards) for m in models),
        )
        share = numel / self.gpus if config.zero_stage else numel
        moved = STEP_BYTES * share / card.bandwidth
        step = moved / card.bandwidth_share
        if config.offload_optimizer:
            step = share / CPU_ADAM + share * (4 + self.element) / (card.host * card.host_share)
        seconds, bound = in_turn(backward, self.exchange(after), (steps * step, "optimizer steps"))
        return Phase("update", seconds, self.sheet((1 + backwards) * flops) + steps * moved, bound, during + after)
