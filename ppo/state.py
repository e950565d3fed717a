"""The state of a PPO run besides its engines, and its form in checkpoints."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from ppo.pretrain import PretrainStream
from utils.moments import RunningMoments
from utils.run.restore import Best, TrainerState
from utils.schema import Count, Schema


class _Moments(Schema):
    mean: float
    count: Count
    squares: Annotated[float, Field(ge=0)]


class _Metrics(Schema, extra="allow", allow_inf_nan=True):
    """Numbers of a step, among them those that alarms and the log read."""

    kl_ref: float
    perplexity: float
    eos_fraction: float
    response_length: float
    score_std: float
    __pydantic_extra__: dict[str, float] = Field(init=False)


class _Sample(Schema, extra="allow"):
    """A text with its score, what each function of --reward_fn said, and other numbers; without `ended` if older."""

    prompt: str
    answer: str
    score: float | None
    ended: bool = False
    __pydantic_extra__: dict[str, float | None] = Field(init=False)


class _Unfinished(Schema):
    metrics: _Metrics
    samples: list[_Sample]


class PPOState(TrainerState):
    """`RunState` in a checkpoint."""

    next_place: Count
    moments: _Moments
    best_score: Best
    pretrain_place: Count
    left_out: Count
    rollbacks: Count
    critic_center: float | None = None
    kl_coef: float | None = None
    value_moments: _Moments | None = None
    unfinished: _Unfinished | None = None


@dataclass
class RunState:
    """What changes during a run, besides the engines. Checkpoints contain it."""

    step: int = 0
    best_score: float = float("-inf")  # mean score of the evaluation that best/ comes from
    next_place: int = 0  # place of the next prompt in the run, on which order and random streams depend
    moments: RunningMoments = field(default_factory=RunningMoments)
    pretrain: PretrainStream | None = None  # batches of the pre-training loss
    rollbacks: int = 0
    left_out: int = 0  # bad batches so far, at most --skip_bad_batches
    critic_center: float | None = None  # subtracted from the critic's values, once `Run.fit_critic` has set it
    kl_coef: float | None = None  # weight of the KL penalty, once --kl_target has changed it
    value_moments: RunningMoments | None = None  # of returns, under --value_norm; the deviation is the head's unit
    unfinished: dict | None = None  # metrics and samples of this step, before its evaluation

    def state_dict(self) -> dict:
        """Returns the state as JSON."""
        place = self.pretrain.place if self.pretrain else 0
        return {
            "step": self.step, "next_place": self.next_place, "moments": self.moments.state_dict(),
            "best_score": self.best_score, "pretrain_place": place, "left_out": self.left_out,
            "rollbacks": self.rollbacks, "critic_center": self.critic_center, "unfinished": self.unfinished,
            "kl_coef": self.kl_coef, "value_moments": self.value_moments and self.value_moments.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        self.step, self.next_place, self.left_out = state["step"], state["next_place"], state["left_out"]
        self.moments.load_state_dict(state["moments"])
        self.best_score, self.rollbacks = state["best_score"], state["rollbacks"]
        self.critic_center, self.unfinished = state.get("critic_center"), state.get("unfinished")
        self.kl_coef, self.value_moments = state.get("kl_coef"), None
        if state.get("value_moments"):
            self.value_moments = RunningMoments()
            self.value_moments.load_state_dict(state["value_moments"])
        if self.pretrain:
            self.pretrain.place = max(self.pretrain.place, state["pretrain_place"])
