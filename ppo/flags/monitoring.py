"""Flags of `train_ppo.py`: alarms and plans. No torch."""

from dataclasses import dataclass
from typing import Literal

from utils.flags.fields import Common


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
    alarm_explained_variance: float | None = None
    """Alarm if the explained variance of the critic's values falls below this; not while only the critic trains.
    Default: off"""
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
