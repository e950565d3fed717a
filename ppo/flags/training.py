"""Flags of `train_ppo.py`: models, data and training. No torch."""

from dataclasses import dataclass, field
from typing import Literal

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

    preset: Common[Literal["ppo_max", "vanilla", "rloo", "grpo", "dr_grpo", "dapo", "reinforce_pp", "vapo"]] = "ppo_max"
    """Set of defaults. ppo_max: the tricks of Part I, §5.4; vanilla: plain PPO with a clipped surrogate; others: the
    algorithm of that name, by its paper (docs/algorithms.md)"""
    train_steps: Common[int] = 1000
    """Steps that train the policy; each samples --num_rollouts responses and makes --ppo_epochs passes over them"""
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
class ReferenceFlags:
    """Reference: the model of the KL penalty, and averaged weights of the policy."""

    reference: Literal["frozen", "ema", "periodic"] = "frozen"
    """Reference of the KL penalty. frozen: --policy_model_path; ema: an exponential moving average of the policy;
    periodic: a copy of the policy, made anew every --reference_interval steps"""
    reference_decay: float = 0.99
    """Under --reference ema, share of the reference that stays after each step"""
    reference_interval: int = 100
    """Under --reference periodic, steps between two copies"""
    policy_ema: float = 0.0
    """Share of an exponential moving average of the policy that stays after each step. The average is written to
    final_ema/; 0: none"""
