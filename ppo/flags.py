"""Flags of `train_ppo.py` by topic, and their defaults: PPO-max (Part I, §5.4) without its pre-training loss. No torch.

"Part I" is arXiv 2307.04964, "Secrets of RLHF in Large Language Models Part I: PPO".
"""

from dataclasses import dataclass, field
from typing import Literal

from utils.errors import UserError
from utils.flags.checks import check_range, replace_default
from utils.flags.fields import Common


@dataclass
class DataFlags:
    """Models and data: policy, critic, reward and prompts."""

    policy_model_path: Common[str] = ""
    """SFT model to align: a Hugging Face folder or hub id. It is also the reference of the KL penalty"""
    critic_model_path: Common[str] = ""
    """Reward model that the critic starts from. It also scores, unless --reward_model_path or --reward_fn is given"""
    tokenizer_name_or_path: str | None = None
    """Tokenizer: a folder, a tokenizer.model or a hub id. Default: --policy_model_path"""
    data_path: Common[list[str]] = field(default_factory=list)
    """Prompts: folders of *train* and *valid* files, files or hub ids (owner/name:config@split). A number after each
    sets its share: a 0.7 b 0.3"""
    num_eval_prompts: int = 128
    """Held-out prompts per evaluation, taken from the training prompts if there is no *valid* file; 0: no evaluation.
    The default is lowered to a tenth of small data"""


@dataclass
class TrainingFlags:
    """Training: length, batch sizes and learning rates."""

    preset: Common[Literal["ppo_max", "vanilla"]] = "ppo_max"
    """Set of defaults. ppo_max: the tricks of Part I, §5.4; vanilla: plain PPO with a clipped surrogate"""
    train_steps: Common[int] = 1000
    """Steps that train the policy; each samples --num_rollouts responses and makes --ppo_epochs passes over them"""
    critic_pretrain_steps: Common[int] = 10
    """Steps before --train_steps that train only the critic, at --critic_lr and without value clipping. It removes the
    peak of the value loss at the start (Part I, Figure 8)"""
    num_rollouts: Common[int] = 128
    """Responses per step (the experience buffer), over all GPUs; a multiple of --batch_size. Part I: 128. The
    default is lowered if there are fewer prompts, and rounded to a multiple of --batch_size"""
    batch_size: Common[int] = 32
    """Responses per optimizer step, over all GPUs; a multiple of the number of GPUs, to which the default is rounded.
    Part I: 32"""
    ppo_epochs: int = 1
    """Passes over each buffer of responses"""
    lr: Common[float] = 5e-7
    """Peak learning rate of the policy. Part I: 5e-7"""
    critic_lr: Common[float] = 1.65e-6
    """Peak learning rate of the critic. Part I: 1.65e-6"""
    warmup_steps: Common[int] = 100
    """Steps over which the policy's learning rate rises linearly to --lr, and the critic's if it was not pre-trained;
    0: none. Part I: the first tenth. The default is lowered in a short run"""
    lr_schedule: Literal["inverse_sqrt", "cosine", "linear", "constant"] = "inverse_sqrt"
    """Learning rate after the warm-up. cosine and linear end at a tenth of the peak"""
    best_max_kl: float = 50.0
    """Largest mean KL to the reference, in nats per response, of a model that is saved to best/. Among these best/ has
    the highest mean score of evaluations without an alarm"""
    num_samples: int = 4
    """Responses per step that are written to samples.jsonl"""


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


@dataclass
class TrickFlags:
    """PPO-max tricks: scores, KL penalty and advantages."""

    use_reward_scaling: bool = True
    """Divide scores by their running standard deviation (Part I, eq. 18, Figure 6: not enough against collapse)"""
    use_reward_norm: bool = True
    """Subtract the running mean from scores before --use_reward_scaling (Part I, eq. 18)"""
    use_reward_clip: bool = True
    """Clip scores after scaling and normalisation to [-reward_clip, reward_clip] (Part I, eq. 18)"""
    reward_clip: Common[float] = 0.3
    """Clip normalised scores to [-reward_clip, reward_clip], in standard deviations. Part I, Figure 6: 0.3 is stable,
    0.8 collapses"""
    missing_eos_penalty: float = 0.0
    """Penalty on a response that was cut at --maxlen_res, in standard deviations of the score. Subtracted after
    --reward_clip, so that 1 outweighs a clip of 0.3"""
    kl_penalty_weight: Common[float] = 0.05
    """Weight of the KL to the reference per token (Part I, eq. 19; Figure 15: 0.05, 0.1 and 0.2 are stable)"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL. k1: log ratio (Part I, eq. 19); k2: half its square; k3: exp(-k1) - 1 + k1"""
    kl_in: Literal["reward", "loss"] = "reward"
    """Place of the KL penalty. reward: subtracted from each token's reward (Part I, eq. 19); loss: added to the loss.
    In the reward, k1 alone gives the gradient of KL(policy, reference); in the loss, k2 does and k3 gives that of
    KL(reference, policy), on samples of the current policy"""
    critic_init_scale: float = 0.3
    """Standard deviation of the critic's first values, as a share of that of the first returns. Its head is scaled and
    shifted once, before training; 0: the head stays as loaded"""
    gamma: float = 1.0
    """Discount factor per token (Part I, eq. 9); 1: no discount"""
    lam: Common[float] = 0.95
    """Lambda of generalised advantage estimation (Part I, eq. 9; Figure 19: 0.9 and 0.95 are stable, 0 and 1 not)"""
    use_advantage_norm: bool = True
    """Normalise the advantages of a buffer to mean 0 and variance 1"""
    use_advantage_clip: bool = False
    """Clip advantages to [-advantage_clip, advantage_clip], an alternative to clipping scores (Part I, Figure 6)"""
    advantage_clip: float = 0.5
    """Largest absolute advantage under --use_advantage_clip. Part I, Figure 6: 0.12"""


@dataclass
class LossFlags:
    """Losses: policy, value, entropy and pre-training."""

    use_policy_loss_clip: bool = True
    """Clip the probability ratio of the policy loss to [1 - pg_clip, 1 + pg_clip] (Part I, eq. 15)"""
    pg_clip: Common[float] = 0.2
    """Largest distance of the ratio from 1 under --use_policy_loss_clip. Not enough by itself (Part I, Figure 17)"""
    use_critic_loss_clip: bool = True
    """Clip values in the value loss to the old values plus or minus value_clip (Part I, eq. 16)"""
    value_clip: float = 0.2
    """Largest change of a value under --use_critic_loss_clip, in units of the return"""
    vf_loss_weight: float = 1.0
    """Weight of the value loss. The critic has its own optimizer, so that this scales its gradient before clipping"""
    use_entropy_loss: bool = False
    """Add an entropy bonus to the policy loss. Part I, Figure 16: collapses without --entropy_clip"""
    entropy_loss_weight: float = 0.0
    """Weight of the entropy bonus under --use_entropy_loss"""
    entropy_clip: float = 0.0
    """Entropy above which a token gets no bonus, in nats; 0: no limit. At most ln(vocabulary)"""
    use_ppo_pretrain_loss: Common[bool] = False
    """Add the next-token loss of a pre-training batch to every policy step (Part I, eq. 17). It keeps more of the
    model's language ability (Part I, Figure 12)"""
    ppo_pretrain_data_path: Common[list[str]] = field(default_factory=list)
    """Dialogues for --use_ppo_pretrain_loss: a folder, a file or a hub id"""
    ppo_pretrain_loss_weight: float = 0.0
    """Weight of the loss of --use_ppo_pretrain_loss"""
    ppo_pretrain_batch_size: int = 32
    """Dialogues per policy step for --use_ppo_pretrain_loss, over all GPUs"""


@dataclass
class AlarmFlags:
    """Alarms: signs of collapse (Part I, §5.2), each off at 0."""

    on_collapse: Common[Literal["warn", "stop", "rollback"]] = "warn"
    """Reaction to an alarm. rollback: return to the last checkpoint and take other prompts; after three, stop"""
    alarm_kl: float | None = None
    """Alarm if the mean KL to the reference exceeds this, in nats per response. Default: 100, at most --maxlen_res"""
    alarm_perplexity: float = 1.05
    """Alarm if the perplexity of responses falls below this: the policy repeats itself"""
    alarm_eos: float = 0.0
    """Alarm if the share of responses that end with an end token falls below this"""
    alarm_length: float = 0.0
    """Alarm if the mean response length falls below this, in tokens"""
    alarm_score_std: float = 0.0
    """Alarm if the standard deviation of the scores falls below this"""
    skip_bad_batches: int = 0
    """Batches with a loss, gradient or score that is not finite that are skipped, and saved to bad_batches/"""


@dataclass
class PlanFlags:
    """Plan: memory and time of a run on other hardware."""

    plan: Common[bool] = False
    """Print the memory of each part and the duration of each phase, from the models' config.json alone, and exit"""
    plan_gpus: int = 0
    """Number of GPUs of the plan; 0: the number of processes"""
    plan_gpu: Literal["a100", "h100", "h200", "4090"] = "a100"
    """GPU of the plan"""
    plan_gpu_memory: float = 0.0
    """Memory of each GPU of the plan, in GiB; 0: that of --plan_gpu"""
    plan_network: float = 0.0
    """Network rate of each node of 8 GPUs of the plan, over all its ports, in Gbit/s; 0: a100 1600, h100 and h200 3200,
    4090 100"""
