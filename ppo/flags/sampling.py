"""Flags of `train_ppo.py`: lengths, sampling, decoding and rollout engines. No torch."""

from dataclasses import dataclass
from typing import Literal

from utils.errors import UserError
from utils.flags.checks import check_range, replace_default
from utils.flags.fields import Common


@dataclass
class LengthFlags:
    """Sampling: lengths."""

    maxlen_prompt: Common[int] = 2048
    """Longest prompt and response together, in tokens; longer prompts lose their oldest turns. Default: at most the
    models' window"""
    maxlen_res: Common[int] = 512
    """Longest response, in tokens. The default is lowered to half of a short --maxlen_prompt"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, maxlen_prompt=(1, None), maxlen_res=(1, None))
        self.fit_response()

    def fit_window(self, window: int | None) -> None:
        """Lowers default lengths to the positions that a model was trained on."""
        if window and window < self.maxlen_prompt:
            replace_default(self, "maxlen_prompt", window, "that is the model's window")
            self.fit_response()

    def fit_response(self) -> None:
        """Lowers a default --maxlen_res that leaves no room for a prompt. Raises UserError for an explicit one."""
        if self.maxlen_res >= self.maxlen_prompt > 1:
            replace_default(self, "maxlen_res", self.maxlen_prompt // 2, f"--maxlen_prompt is {self.maxlen_prompt}")
        if self.maxlen_res >= self.maxlen_prompt:
            raise UserError(
                f"--maxlen_res {self.maxlen_res} leaves no room for a prompt: --maxlen_prompt {self.maxlen_prompt} "
                "counts prompt and response together; raise it or lower --maxlen_res"
            )


@dataclass
class SamplingFlags:
    """Sampling: how responses are drawn."""

    temperature: Common[float] = 1.0
    """Sampling temperature; log-probabilities are computed at it as well"""
    topp: float = 1.0
    """Nucleus sampling: smallest set of tokens with this total probability. Below 1 the probability ratio ignores it"""
    repetition_penalty: float = 1.0
    """Factor that divides positive and multiplies negative logits of tokens that the response already has. Other than
    at 1, the probability ratio ignores it"""
    reuse_sampler_logprobs: bool = False
    """Take the sampler's log-probabilities as the old ones, which saves a forward pass of the policy. Under --dtype
    bf16 the ratio then starts at 1 only up to rounding"""


@dataclass
class DecodingFlags:
    """Memory and speed: decoding and forward passes."""

    rollout_batch_size: Common[Literal["auto"] | int] = "auto"
    """Sequences decoded at once on each GPU. Changes speed and memory only. auto: as many as fit into the memory left
    after loading the models, at most one per prompt; on a CPU, 32. With vLLM the largest number, by default 256"""
    rollout_cache_tokens: int = 0
    """Largest key-value cache on each GPU, in tokens; fewer sequences are decoded at once to keep it. 0: no limit"""
    micro_batch_tokens: Common[int] = 8192
    """Tokens per forward pass on each GPU, padding included. Changes speed and memory only"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, micro_batch_tokens=(1, None), rollout_cache_tokens=(0, None))
        if self.rollout_batch_size != "auto":
            check_range(self, rollout_batch_size=(1, None))


@dataclass
class RolloutEngineFlags:
    """Rollout engine: this toolkit's own decoding, or vLLM."""

    rollout_engine: Common[Literal["own", "vllm"]] = "own"
    """Engine that samples responses. own: this toolkit's decoding, with the policy's weights in place; vllm: vLLM in
    the same process, with a copy of the weights that is compared with the policy's before each use"""
    vllm_gpu_memory_utilization: Literal["auto"] | float = "auto"
    """Share of each GPU's memory that vLLM may use while it samples, weights and key-value cache together. auto: what
    the rest of the run leaves, as --plan predicts it"""
    vllm_batch_invariant: bool = False
    """Use vLLM's kernels whose results do not depend on the batch; slower, and only on GPUs of compute capability 9.0
    or newer"""
    sampler_kl_limit: float | None = None
    """Largest KL(vLLM, policy) of a buffer, in nats per token (estimator k3). Above it the run stops. Default: 5e-5 for
    fp32, 0.02 for bf16; divided by a temperature below 1"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vllm_gpu_memory_utilization != "auto":
            check_range(self, vllm_gpu_memory_utilization=(0.01, 1))
        if self.sampler_kl_limit is not None:
            check_range(self, sampler_kl_limit=(0, None))


@dataclass
class RolloutTrainingFlags:
    """Rollout engine: vLLM while the policy trains."""

    vllm_tensor_parallel_size: int = 1
    """GPUs of one node that share a copy of the policy in vLLM; a divisor of the number of processes per node"""
    sampler_correction: Literal["none", "truncate", "mask_token", "mask_sequence"] = "none"
    """Importance weight of each token in the policy loss, from r = p(policy) / p(vLLM). truncate: min(r, cap) (TIS);
    mask_token: r, 0 outside [1 / cap, cap] (IcePop); mask_sequence: 1, 0 for responses whose geometric mean of r is
    outside (Geo-RS). cap: --sampler_correction_cap"""
    sampler_correction_cap: float | None = None
    """Largest ratio under --sampler_correction; above 1. Default: 2, and 1.1 for mask_sequence"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, vllm_tensor_parallel_size=(1, None))
        if self.sampler_correction_cap is not None:
            check_range(self, sampler_correction_cap=(1.000001, None))

    @property
    def correction_cap(self) -> float:
        """--sampler_correction_cap, or its default."""
        return self.sampler_correction_cap or (1.1 if self.sampler_correction == "mask_sequence" else 2.0)


@dataclass
class GatherFlags:
    """Memory and speed: the policy's weights while it decodes."""

    gather_for_generation: Literal["auto", "always", "never"] = "auto"
    """Gather the policy's weights once per rollout under --zero_stage 3 and --rollout_engine own. auto: if they fit
    into memory"""
