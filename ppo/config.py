"""Every flag of `train_ppo.py`, its default and its limits. No torch: a wrong flag is answered at once."""

import math
from dataclasses import dataclass, field
from typing import Literal

from reward.scoring.flags import RewardFlags
from utils.errors import UserError
from utils.flags.checks import SEEDS, check_range, check_warmup
from utils.flags.router import RouterFlags
from utils.flags.run import RunFlags

# The defaults below are PPO-max (Part I §5.4), but for its pre-training loss, which needs data. Explicit flags win over
# a preset, a preset over the defaults.
PRESETS = {
    "ppo_max": {},
    "vanilla": {
        "use_reward_scaling": False,
        "use_reward_norm": False,
        "use_reward_clip": False,
        "use_critic_loss_clip": False,
        "use_advantage_norm": False,
        "kl_penalty_weight": 0.0,
        "gradient_clip": 0.0,
        "critic_pretrain_steps": 0,
    },
}
AMOUNTS = {
    "use_reward_clip": "reward_clip",
    "use_advantage_clip": "advantage_clip",
    "use_policy_loss_clip": "pg_clip",
    "use_critic_loss_clip": "value_clip",
    "use_entropy_loss": "entropy_loss_weight",
    "use_ppo_pretrain_loss": "ppo_pretrain_loss_weight",
}

COUNTS = ["train_steps", "num_rollouts", "batch_size", "ppo_epochs", "rollout_batch_size", "micro_batch_tokens"]
COUNTS += ["save_per_step", "maxlen_prompt", "maxlen_res", "warmup_steps", "ppo_pretrain_batch_size"]


@dataclass
class PPOConfig(RewardFlags, RouterFlags, RunFlags):
    """Align a language model with PPO-max."""

    policy_model_path: str = ""
    """SFT model to align: a Hugging Face folder or hub id. Also the reference that the KL is measured against"""
    critic_model_path: str = ""
    """Reward model that the critic starts from (a causal LM gets a new head).
    Also scores, unless --reward_model_path or --reward_fn does"""
    reward_model_path: list[str] = field(default_factory=list)
    """Reward model that scores responses, or several; default: --critic_model_path"""
    reward_fn: str | None = None
    """file.py:function, called with (prompts, answers) -> a number each; RUNS THAT FILE.
    Alone it replaces the reward model; with --reward_model_path it is added to it"""
    tokenizer_name_or_path: str | None = None
    """Tokenizer folder, tokenizer.model or hub id; default: --policy_model_path"""
    data_path: str = ""
    """Prompts: a folder of *train.json(l) and *valid.json(l), a file or a hub id"""
    model_save_path: str = "outputs/ppo"
    """Folder of the run: config.json, metrics.jsonl, samples.jsonl, checkpoints/, best/, final/"""
    logdir: str | None = None
    """TensorBoard folder; default: tensorboard/ in the run's folder"""
    report_to: str = "none"
    """More trackers, comma-separated, by accelerate's names: wandb, swanlab, mlflow, ..."""
    overwrite: bool = False
    """Replace a run that is already in --model_save_path"""
    preset: Literal["ppo_max", "vanilla"] = "ppo_max"
    """vanilla: every trick but the clipped surrogate off. Explicit flags win"""
    seed: int = 42
    """Seeds the order of prompts, the responses and a new head"""

    train_steps: int = 1000
    """Steps that move the policy: each samples --num_rollouts responses and trains --ppo_epochs on them"""
    critic_pretrain_steps: int = 10
    """Steps before those, in which only the critic trains: at --critic_lr after a warm-up over the first tenth of them,
    and without value clipping"""
    critic_init_scale: float = 0.3
    """Before these steps the critic's head is shifted and scaled once: its values get the mean of the first returns,
    and this share of their standard deviation. 0: the head stays as it is loaded"""
    num_rollouts: int = 128
    """Responses in the experience buffer, over all ranks"""
    batch_size: int = 32
    """Responses an optimizer step, over all ranks"""
    ppo_epochs: int = 1
    """Passes over each buffer"""
    rollout_batch_size: Literal["auto"] | int = "auto"
    """Sequences decoded at once per device (slots: where one ends, the next prompt begins): speed and memory only.
    auto: on a GPU as many as fit in the memory that is free once all models are loaded, at most one per prompt; on a
    CPU 32"""
    rollout_cache_tokens: int = 0
    """Tokens that their key-value cache may hold, a device: takes fewer slots where they would need more, at least
    one; 0: no such limit"""
    micro_batch_tokens: int = 8192
    """Tokens of a forward pass, padding included, a device: speed and memory only"""
    save_per_step: int = 100
    """Steps between evaluations on held-out prompts; the best model so far goes to best/"""
    num_eval_prompts: int = 128
    """Held-out prompts an evaluation; taken off the training prompts when there is no *valid* file. 0: none"""
    best_max_kl: float = 50.0
    """best/ is the evaluation with the highest mean score among those with at most this mean KL, nats a response, at
    the sampling temperature of evaluations, and without an alarm at their step"""
    num_samples: int = 4
    """Responses written to samples.jsonl each step"""

    maxlen_prompt: int = 2048
    """Tokens of prompt and response together; prompts keep maxlen_prompt - maxlen_res, oldest turns go first"""
    maxlen_res: int = 512
    """Longest response, tokens"""
    temperature: float = 1.0
    """Sampling temperature, which log-probabilities are taken at too"""
    topp: float = 1.0
    """Nucleus sampling; below 1 the ratio ignores it"""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative ones, of tokens that the response already has. The
    prompt's tokens do not count. Other than 1 the ratio ignores it"""
    reuse_sampler_logprobs: bool = False
    """Keep the sampler's own log-probabilities as the old ones: saves the policy's scoring forward. Under --dtype bf16
    the ratio then starts at 1 only up to the rounding of bf16, hence not the default"""

    lr: float = 5e-7
    """Policy learning rate"""
    critic_lr: float = 1.65e-6
    """Critic learning rate"""
    warmup_steps: int = 100
    """Steps of linear warm-up of the policy's learning rate, and of the critic's unless it was pre-trained"""
    lr_schedule: Literal["inverse_sqrt", "cosine", "linear", "constant"] = "inverse_sqrt"
    """What follows the warm-up; cosine and linear end at a tenth"""

    kl_penalty_weight: float = 0.05
    """Weight of the token-level KL to the reference"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimate of that KL from one sample"""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL goes: into each token's reward (with k1 its gradient is KL(policy, reference)'s), or into the loss
    (with k2 that one's, with k3 KL(reference, policy)'s)"""
    use_reward_scaling: bool = True
    """Divide scores by their running deviation"""
    use_reward_norm: bool = True
    """Subtract the running mean too"""
    use_reward_clip: bool = True
    """Clip scores after that"""
    reward_clip: float = 0.3
    """to ± this"""
    missing_eos_penalty: float = 0.0
    """Subtracted from the shaped score of a response that reached --maxlen_res before its end, in standard deviations
    of the score. Where most responses are that long, 1 outweighs scores that --reward_clip holds within 0.3"""
    gamma: float = 1.0
    """Discount a token"""
    lam: float = 0.95
    """λ of generalised advantage estimation"""
    use_advantage_norm: bool = True
    """Whiten the buffer's advantages"""
    use_advantage_clip: bool = False
    """Clip advantages"""
    advantage_clip: float = 0.5
    """to ± this"""
    use_policy_loss_clip: bool = True
    """Clip the probability ratio"""
    pg_clip: float = 0.2
    """to 1 ± this"""
    use_critic_loss_clip: bool = True
    """Clip values around the old ones"""
    value_clip: float = 0.2
    """by ± this"""
    vf_loss_weight: float = 1.0
    """Weight of the value loss (the critic has its own engine: it scales its gradient, before clipping)"""
    use_entropy_loss: bool = False
    """Reward entropy"""
    entropy_loss_weight: float = 0.0
    """with this weight"""
    entropy_clip: float = 0.0
    """up to this many nats a token; 0: no limit. Cannot exceed ln(vocabulary)"""
    use_ppo_pretrain_loss: bool = False
    """Add the loss of a pre-training batch to every policy step (ptx)"""
    ppo_pretrain_data_path: str | None = None
    """Dialogues for it"""
    ppo_pretrain_loss_weight: float = 0.0
    """Its weight"""
    ppo_pretrain_batch_size: int = 32
    """Its dialogues a policy step, over all ranks"""

    skip_bad_batches: int = 0
    """Minibatches, or buffers of responses, with a bad loss, gradient or score that are left out before the run stops;
    each is saved to bad_batches/"""

    alarm_kl: float | None = None
    """Signs of collapse, each off at 0: a mean KL to the reference above this, nats a response; default: 100, or where
    that is less --maxlen_res, a nat a token"""
    alarm_perplexity: float = 1.05
    """A perplexity of responses below this: the policy says the same again and again"""
    alarm_eos: float = 0.0
    """A share of responses that end by themselves below this: they run into --maxlen_res"""
    alarm_length: float = 0.0
    """A mean response length below this, tokens"""
    alarm_score_std: float = 0.0
    """A deviation of the scores below this: nothing is left to tell responses apart by"""
    on_collapse: Literal["warn", "stop", "rollback"] = "warn"
    """What an alarm does. rollback: take the last checkpoint, go on with other prompts; after three, stop"""

    gather_for_generation: Literal["auto", "always", "never"] = "auto"
    """ZeRO-3: gather the policy once a rollout; auto: when it fits"""

    plan: bool = False
    """Print how much memory each part of this run would take and how long each phase would last, from config.json of
    its models alone, and exit"""
    plan_gpus: int = 0
    """GPUs of the plan; 0: as many as there are processes"""
    plan_gpu: Literal["a100", "h100", "h200", "4090"] = "a100"
    """GPU that the plan is made for: its memory and its rates"""
    plan_gpu_memory: float = 0.0
    """GiB of memory of each GPU of the plan; 0: the memory of --plan_gpu"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alarm_kl is None:  # experiments/RESULTS.md: where answers are short, quality falls long before 100
            self.alarm_kl = min(100.0, float(self.maxlen_res))
        self._check_paths()
        self._check_sizes()
        self._check_numbers()

    @property
    def preset_values(self) -> dict:
        """Values that --preset gives to flags, in place of their defaults."""
        return PRESETS[self.preset]

    @property
    def total_steps(self) -> int:
        """Steps of the loop, critic pre-training included."""
        return self.critic_pretrain_steps + self.train_steps

    @property
    def reward_paths(self) -> list[str]:
        """The reward models that score; the critic's unless --reward_model_path or --reward_fn does."""
        return self.reward_model_path or ([] if self.reward_fn else [self.critic_model_path])

    @property
    def reward_flag(self) -> str:
        """The flag that named them."""
        return "--reward_model_path" if self.reward_model_path else "--critic_model_path"

    def _check_paths(self) -> None:
        for name in ("policy_model_path", "critic_model_path", "data_path", "model_save_path"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing: give it a path")
        if self.use_ppo_pretrain_loss and not self.ppo_pretrain_data_path:
            raise UserError("--use_ppo_pretrain_loss needs dialogues: give --ppo_pretrain_data_path")

    def _check_sizes(self) -> None:
        for name in COUNTS:
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)}: give at least 1")
        if self.maxlen_res >= self.maxlen_prompt:
            raise UserError(
                f"--maxlen_res {self.maxlen_res} leaves no room for a prompt: --maxlen_prompt {self.maxlen_prompt} "
                "counts prompt and response together, raise it above --maxlen_res"
            )
        check_warmup(self)
        if self.num_rollouts % self.batch_size:
            raise UserError(
                f"--num_rollouts {self.num_rollouts} is not a multiple of --batch_size {self.batch_size}: "
                "a buffer is trained on in whole batches, give a multiple"
            )

    def _check_numbers(self) -> None:
        for name in ("lr", "critic_lr"):
            if not getattr(self, name):
                raise UserError(f"--{name} 0 trains nothing: give a positive number")
        check_range(
            self, lr=(0, None), critic_lr=(0, None), gamma=(0, 1), lam=(0, 1), temperature=(0.01, None), topp=(1e-6, 1),
            repetition_penalty=(0.01, None), kl_penalty_weight=(0, None), reward_clip=(0, None), pg_clip=(0, None),
            value_clip=(0, None), advantage_clip=(0, None), entropy_clip=(0, None), entropy_loss_weight=(0, None),
            ppo_pretrain_loss_weight=(0, None), vf_loss_weight=(0, None), missing_eos_penalty=(0, None),
            critic_pretrain_steps=(0, None), critic_init_scale=(0, None), num_eval_prompts=(0, None),
            num_samples=(0, None), best_max_kl=(0, None),
            skip_bad_batches=(0, None), alarm_kl=(0, None), alarm_perplexity=(0, None), alarm_eos=(0, 1),
            alarm_length=(0, None), alarm_score_std=(0, None), seed=SEEDS, plan_gpus=(0, None),
            plan_gpu_memory=(0, None), rollout_cache_tokens=(0, None),
        )  # fmt: skip
        if self.on_collapse == "rollback" and not self.checkpoint_per_step:
            raise UserError("--on_collapse rollback needs checkpoints: give a --checkpoint_per_step above 0")
        for switch, amount in AMOUNTS.items():
            if getattr(self, switch) and not getattr(self, amount):
                raise UserError(
                    f"--{switch} with --{amount} 0 would do nothing: give an amount, or leave the switch out"
                )
        if self.reuse_sampler_logprobs and (self.topp < 1.0 or self.repetition_penalty != 1.0):
            raise UserError(
                f"--reuse_sampler_logprobs with --topp {self.topp:g} --repetition_penalty {self.repetition_penalty:g}: "
                "the sampler's log-probabilities are the policy's only at 1 and 1, give these or leave the switch out"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise UserError("--kl_in loss needs --kl_estimator k2 or k3: the gradient of k1 is 0 on average")

    def check_world(self, world_size: int, vocab_size: int) -> None:
        """What can only be said once the number of ranks and the vocabulary are known."""
        for name in ("num_rollouts", "batch_size", "ppo_pretrain_batch_size"):
            if getattr(self, name) % world_size and (name != "ppo_pretrain_batch_size" or self.use_ppo_pretrain_loss):
                raise UserError(
                    f"--{name} {getattr(self, name)} does not divide by the {world_size} processes: sizes are samples "
                    "on all of them together, give a multiple"
                )
        if self.use_entropy_loss and self.entropy_clip > math.log(vocab_size):
            raise UserError(
                f"--entropy_clip {self.entropy_clip:g} can never be reached: entropy is at most "
                f"ln({vocab_size}) = {math.log(vocab_size):.2f}; lower it"
            )
