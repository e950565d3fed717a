"""Predicts the seconds of each phase of a buffer on a GPU from bytes, FLOPs and kernel launches.

Assumes prompts and responses as long as the flags allow, a single node, and that a token passes all experts of a
mixture. Evaluation, --reward_fn and the host's work between forwards are not counted.
"""

from dataclasses import dataclass, replace

from ppo.config import PPOConfig

LAUNCHES = 23  # kernels per decoder layer in a forward
CPU_ADAM = 1e9  # parameters per second in a step of CPU Adam, per process; not measured yet
DISK = 2e9  # bytes per second written by a node; not measured yet
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
    "a100": Card(80, 312e12, 19.5e12, 2.04e12, 32e9, 300e9),
    "h100": Card(80, 989e12, 66.9e12, 3.35e12, 64e9, 450e9),
    "h200": Card(141, 989e12, 66.9e12, 4.8e12, 64e9, 450e9),
    "4090": Card(24, 165e12, 82.6e12, 1.01e12, 32e9, 32e9, launch=8e-6),
}


@dataclass(frozen=True)
class Work:
    """The sizes of a model that its time depends on."""

    numel: int  # parameters
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
    """Predicted seconds, a lower bound by the data sheet's rates, and what limits the prediction."""

    name: str
    seconds: float
    floor: float
    bound: str


def phases(
    config: PPOConfig, gpus: int, trained: dict[str, Work], rewards: list[Work], slots: int, recomputed: float
) -> list[Phase]:
    """Returns the phases of one buffer on config.plan_gpu. recomputed: share of layers that the update runs twice."""
    card, element = CARDS[config.plan_gpu], 2 if config.dtype == "bf16" else 4
    run = _Run(config, card, gpus, element)
    update = run.update(list(trained.values()), recomputed)
    return [*run.rollout(trained["policy"], slots), run.score(trained, rewards), update]


def checkpoint(config: PPOConfig, gpus: int, trained: dict[str, Work]) -> Phase:
    """Predicts writing a checkpoint, beside rollout and scoring. Its lower bound is the copy to host memory."""
    size, card = 12 * sum(work.numel for work in trained.values()), CARDS[config.plan_gpu]
    return Phase("checkpoint", size / DISK, size / gpus / card.host, "disk")


def slowest(**seconds: float) -> tuple[float, str]:
    """Returns seconds and name of the longest of operations that run at the same time."""
    name = max(seconds, key=seconds.__getitem__)
    return seconds[name], name.replace("_", " ")


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

    def between(self, size: float) -> float:
        """Seconds to gather these bytes from all ranks, or to reduce them to shares."""
        return size * (self.gpus - 1) / self.gpus / (self.card.link * self.card.link_share)

    def forwards(self, rows: float) -> int:
        """Number of micro-batches of rows of full length."""
        return -int(-rows // max(1, self.config.micro_batch_tokens // self.config.maxlen_prompt))

    def launches(self, model: Work, forwards: float) -> float:
        """Seconds of the host to launch the kernels of forwards."""
        return forwards * model.layers * LAUNCHES * self.card.launch

    def rollout(self, policy: Work, slots: int) -> list[Phase]:
        """Predicts prompts and new tokens: one step per token of a response, one response after another per slot."""
        config, card, rows, response = self.config, self.card, self.rows, self.config.maxlen_res
        prompt = config.maxlen_prompt - response
        flops = policy.flops(rows, prompt, 1)
        launches = self.launches(policy, self.forwards(rows))
        prefill = slowest(matrix_products=flops / card.rate(config.dtype), launches=launches)
        steps, weights = -int(-rows // slots) * response, self.element * (policy.body + policy.head)
        cache = rows * response * (prompt + response / 2) * policy.token
        captured = policy.captured and (config.zero_stage < 3 or config.gather_for_generation != "never")
        times = {
            "memory": (steps * weights + cache) / (card.bandwidth * card.bandwidth_share),
            "launches": card.launch * steps if captured else self.launches(policy, steps),
            "matrix_products": policy.flops(rows * response, 1, 1) / card.rate(config.dtype),
        }
        if config.zero_stage == 3:
            gathers = steps if config.gather_for_generation == "never" else 1
            times["gathering_weights"] = gathers * self.between(self.element * policy.numel)
        decoding = slowest(**times)
        floor = (response * weights + cache) / card.bandwidth
        prompts = Phase("prompts", prefill[0], self.sheet(flops), prefill[1])
        return [prompts, Phase("new tokens", decoding[0], floor, decoding[1])]

    def score(self, models: dict[str, Work], rewards: list[Work]) -> Phase:
        """Predicts a forward of each model. From ZeRO-1 on, frozen models are split, and gathered layer by layer."""
        config, forwards = self.config, self.forwards(self.rows)
        trained = [work for name, work in models.items() if name != "policy" or not config.reuse_sampler_logprobs]
        frozen = [models["policy"], *rewards]
        flops = sum(m.flops(self.rows, config.maxlen_prompt, config.maxlen_res) for m in trained + frozen)
        split = self.gpus > 1 and config.zero_stage > 0
        gathered = (frozen if split else []) + (trained if config.zero_stage == 3 else [])
        copied = sum(m.numel for m in frozen) * self.element if config.offload_frozen else 0
        seconds, bound = slowest(
            matrix_products=flops / self.card.rate(config.dtype),
            launches=sum(self.launches(m, forwards) for m in trained + frozen),
            gathering_weights=forwards * self.between(self.element * sum(m.numel for m in gathered)),
        )
        copies = copied * (forwards / self.gpus if split else 1) / (self.card.host * self.card.host_share)
        return Phase("scoring", seconds + copies, self.sheet(flops), bound if seconds > copies else "copies from host")

    def update(self, models: list[Work], recomputed: float) -> Phase:
        """Predicts forwards, recomputed layers, backwards (twice the FLOPs), gradients over ranks, optimizer steps."""
        config, card = self.config, self.card
        numel, steps = sum(m.numel for m in models), config.ppo_epochs * config.num_rollouts // config.batch_size
        forwards = steps * self.forwards(config.batch_size / self.gpus)
        flops = config.ppo_epochs * sum(
            m.flops(self.rows, config.maxlen_prompt, config.maxlen_res if m.head else 0) for m in models
        )
        passes = (1 + recomputed) * flops / card.rate(config.dtype) + 2 * flops / card.rate(config.dtype, backward=True)
        # ZeRO-2 and 3 reduce each micro-batch's gradients during its backward; ZeRO-3 gathers weights twice.
        each = self.between(self.element * numel) * {2: 1, 3: 3}.get(config.zero_stage, 0)
        seconds, bound = slowest(
            matrix_products=passes,
            launches=(3 + recomputed) * sum(self.launches(m, forwards) for m in models),
            gradients_over_ranks=forwards * each,
        )
        share = numel / self.gpus if config.zero_stage else numel
        exchanged = {0: 2, 1: 2, 2: 1, 3: 0}[config.zero_stage] * self.between(self.element * numel)
        moved = STEP_BYTES * share / card.bandwidth
        step = moved / card.bandwidth_share
        if config.offload_optimizer:
            step = share / CPU_ADAM + share * (4 + self.element) / (card.host * card.host_share)
        rest = steps * (exchanged + step)
        bound = bound if seconds > rest else "optimizer steps"
        return Phase("update", seconds + rest, self.sheet(3 * flops) + steps * moved, bound)


def table(config: PPOConfig, found: list[Phase], saved: Phase) -> str:
    """Returns the phases of a buffer and a checkpoint as text."""
    rows = [*found, Phase("buffer", sum(p.seconds for p in found), sum(p.floor for p in found), "")]
    if every := config.checkpoint_per_step:
        rows.append(replace(saved, bound=f"{saved.bound}, every {every} buffers"))
    title = f"Seconds of a buffer on {config.plan_gpu} (texts of full length; rates estimated, not measured)"
    lines = [f"{p.name:14}{p.seconds:10.2f}{p.floor:10.2f}   {p.bound}".rstrip() for p in rows]
    return "\n".join([title, f"{'':14}{'seconds':>10}{'floor':>10}   bound by", *lines])
