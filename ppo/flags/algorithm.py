"""Flags of `train_ppo.py`: scores, advantages, critic and losses; by default PPO-max without its pre-training loss.

"Part I" is arXiv 2307.04964, "Secrets of RLHF in Large Language Models Part I: PPO". No torch.
"""

from dataclasses import dataclass, field
from typing import Literal

from utils.flags.fields import Common


@dataclass
class TrickFlags:
    """PPO-max tricks: scores and KL penalty."""

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
    kl_target: float = 0.0
    """KL to the reference that --kl_penalty_weight adapts to, in nats per response (Ziegler et al. 2019, §2.2); 0: the
    weight is fixed"""
    kl_horizon: int = 10000
    """Responses over which the weight changes by at most a fifth under --kl_target"""
    use_length_norm: bool = False
    """Divide scores by the tokens of the response, before all other shaping, greedy responses (remax) included"""
    overlong_buffer: int = 0
    """Tokens before --overlong_length over which a penalty rises linearly to --overlong_penalty (DAPO, eq. 13);
    0: none"""
    overlong_length: int = 0
    """Length of a response at which the penalty of --overlong_buffer is full, in tokens; 0: --maxlen_res"""
    overlong_penalty: float = 1.0
    """Largest penalty of --overlong_buffer, in standard deviations of the score, subtracted after --reward_clip"""


@dataclass
class AdvantageFlags:
    """Advantages: the estimator, and several responses per prompt."""

    advantage_estimator: Common[str] = "gae"
    """Estimator of the advantages. With a critic: gae, decoupled_gae, length_adaptive_gae. Without: rloo, grpo,
    grpo_no_std (Dr. GRPO), opo, reinforce_pp_baseline (all need several responses per prompt), reinforce_pp, remax. Or
    file.py:function, a function of your own. THE FILE IS RUN"""
    num_responses_per_prompt: Common[int] = 1
    """Responses to each prompt of a buffer; a divisor of --num_rollouts, which counts responses"""
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
    critic_lam: float = 1.0
    """Lambda of the returns that the critic learns under decoupled_gae and length_adaptive_gae (VC-PPO)"""
    length_alpha: float = 0.05
    """Under length_adaptive_gae, lambda of a response of l tokens is 1 - 1 / (length_alpha * l) (VAPO)"""
    drop_uniform_groups: bool = False
    """Leave out prompts whose responses all have the same score, which teach a group's estimator nothing, and sample
    more prompts in their place (DAPO's dynamic sampling)"""
    max_refills: int = 3
    """Times per step that as many prompts again are sampled under --drop_uniform_groups; then the buffer may stay
    smaller"""


@dataclass
class CriticFlags:
    """Critic: its training and the scale of its values."""

    critic_pretrain_steps: Common[int] = 10
    """Steps before --train_steps that train only the critic, at --critic_lr and without value clipping. It removes the
    peak of the value loss at the start (Part I, Figure 8)"""
    critic_init_scale: float = 0.3
    """Standard deviation of the critic's first values, as a share of that of the first returns. Its head is scaled and
    shifted once, before training; 0: the head stays as loaded"""
    critic_epochs: int = 0
    """Passes of the critic over each buffer, of which --ppo_epochs are together with the policy; 0: --ppo_epochs"""
    share_base: Literal["auto", "never"] = "auto"
    """Under --lora_rank, models with the same weights: auto: share them, so that they are in memory once; never: each
    has its own, but for policy and reference"""
    critic_lora_rank: int = 0
    """Rank of the critic's adapters under --lora_rank; 0: the same rank"""
    critic_updates_per_policy_update: int = 1
    """Optimizer steps of the critic on each minibatch, of which the first is together with the policy's"""
    value_norm: Literal["none", "running", "popart"] = "none"
    """Unit of the critic's head. running: the running mean and deviation of the returns; popart: the same, and the head
    is rescaled so that no value changes when they do (van Hasselt et al. 2016); none: that of the return"""


@dataclass
class LossFlags:
    """Losses: policy, value, entropy and pre-training."""

    use_policy_loss_clip: bool = True
    """Clip the probability ratio of the policy loss to [1 - pg_clip, 1 + pg_clip] (Part I, eq. 15)"""
    pg_clip: Common[float] = 0.2
    """Largest distance of the ratio from 1 under --use_policy_loss_clip. Not enough by itself (Part I, Figure 17)"""
    pg_clip_high: float | None = None
    """Largest distance of the ratio above 1 (DAPO's clip-higher: 0.28). Default: --pg_clip"""
    dual_clip: float = 0.0
    """Largest factor of a negative advantage in the policy loss, above 1 (Ye et al. 2020, eq. 4: 3); 0: no limit"""
    policy_ratio: Literal["token", "sequence", "none"] = "token"
    """Ratio of new to old policy. token: of each token; sequence: the geometric mean over the response (GSPO, eq. 7);
    none: no ratio and no clipping, as REINFORCE, whose gradient is exact in the first step on a buffer only"""
    loss_average: Literal["token", "sequence", "group", "constant"] = "token"
    """Mean of the policy's losses over a minibatch. token: over all tokens; sequence: over responses of the mean over
    each one's tokens (GRPO); group: over prompts of the mean over the tokens of a prompt's responses in the minibatch;
    constant: sum over each response / --maxlen_res (Dr. GRPO)"""
    use_critic_loss_clip: bool = True
    """Clip values in the value loss to the old values plus or minus value_clip (Part I, eq. 16)"""
    value_clip: float = 0.2
    """Largest change of a value under --use_critic_loss_clip, in units of the return; under --value_norm in running
    standard deviations of the return"""
    vf_loss_weight: float = 1.0
    """Weight of the value loss. The critic has its own optimizer, so that this scales its gradient before clipping"""
    use_entropy_loss: bool = False
    """Add an entropy bonus to the policy loss. Part I, Figure 16: collapses without --entropy_clip"""
    entropy_loss_weight: float = 0.0
    """Weight of the entropy bonus under --use_entropy_loss"""
    entropy_clip: float = 0.0
    """Entropy above which a token gets no bonus, in nats; 0: no limit. At most ln(vocabulary)"""
    use_ppo_pretrain_loss: bool = False
    """Add the next-token loss of a pre-training batch to every policy step (Part I, eq. 17). It keeps more of the
    model's language ability (Part I, Figure 12)"""
    ppo_pretrain_data_path: list[str] = field(default_factory=list)
    """Dialogues for --use_ppo_pretrain_loss: a folder, a file or a hub id"""
    ppo_pretrain_loss_weight: float = 0.0
    """Weight of the loss of --use_ppo_pretrain_loss"""
    ppo_pretrain_batch_size: int = 32
    """Dialogues per policy step for --use_ppo_pretrain_loss, over all GPUs"""
