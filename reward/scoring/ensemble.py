"""Score dialogues with one or several reward models: encoding, batches, and the rule that combines scores."""

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from data.batching.collate import micro_batches, pad
from data.formats.truncate import newest_turns
from data.template import Turns, encode_answered, encode_text
from reward.model import last_scores
from utils.engine.engine import device
from utils.engine.memory import host_copies
from utils.errors import UserError
from utils.files import read_json
from utils.models.load import settings_folder
from utils.tensors import to_device


@dataclass(frozen=True)
class Encoding:
    """Encodes dialogues for a reward model. window: maximum number of tokens; None: no limit."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    window: int | None

    def __call__(self, turns: Turns | str) -> tuple[list[int], bool]:
        """Returns (ids of a dialogue or text, whether it was truncated to the window).

        The oldest exchanges are removed first, then first tokens, because the score is read at the end of the answer.
        """
        kept = turns
        if self.window is not None and not isinstance(turns, str):
            kept, ids = newest_turns(turns, lambda turns: self._whole(turns, self.window), self.window)
            if ids is not None:
                return ids, len(kept) < len(turns)
        ids = self._whole(kept)
        if self.window is None or len(ids) <= self.window:
            return ids, False
        return ids[:1] + ids[1 - self.window :], True

    def _whole(self, turns: Turns | str, limit: float = math.inf) -> list[int] | None:
        if isinstance(turns, str):
            return encode_text(self.tokenizer, turns)
        prompt, answer, _ = encode_answered(self.tokenizer, turns, self.template)
        return prompt + answer if len(prompt) + len(answer) <= limit else None


@torch.no_grad()
def score_ids(model: nn.Module, sequences: list[list[int]], batches: list[list[int]]) -> torch.Tensor:
    """Returns the scalar at the last token of each sequence: float32 [sequences]. batches: indices per forward pass."""
    scores = torch.zeros(len(sequences), device=device())
    for rows in batches:
        batch = (*pad([sequences[i] for i in rows], 0), torch.tensor(rows))
        ids, mask, index = (to_device(x, device()) for x in batch)
        scores[index] = last_scores(model(ids, mask), mask).float()
    return scores


def score_dialogues(
    model: nn.Module, encoding: Encoding, dialogues: list[Turns | str], max_tokens: int
) -> tuple[list[float], list[bool]]:
    """Returns (scores, whether each dialogue was truncated to the window), in forward passes of `max_tokens` tokens."""
    encoded = [encoding(turns) for turns in dialogues]
    sequences = [ids for ids, _ in encoded]
    batches = micro_batches([len(ids) for ids in sequences], max_tokens, joined=model.joins_rows)
    return score_ids(model, sequences, batches).tolist(), [cut for _, cut in encoded]


@dataclass
class Frozen:
    """A model that is not trained. offload: keep its weights, unless they are sharded, in host memory between uses."""

    model: nn.Module
    offload: bool

    def __post_init__(self) -> None:
        self._waiting: list[tuple[nn.Parameter, torch.Tensor]] = []
        if self.offload:
            parameters = list(self.model.parameters())
            self._waiting = list(zip(parameters, host_copies(parameters), strict=True))
            self._leave()

    @contextlib.contextmanager
    def resident(self):
        """Context in which the model is on the device. Weights are not copied back, because they do not change."""
        for parameter, copy in self._waiting:
            parameter.data = copy.to(device(), non_blocking=True)
        try:
            yield self.model
        finally:
            self._leave()

    def _leave(self) -> None:
        for parameter, copy in self._waiting:
            parameter.data = copy


@dataclass(frozen=True)
class Member:
    """One reward model of an ensemble. encoding: None if it reads the policy's token ids directly."""

    model: Frozen
    window: int | None
    encoding: Encoding | None = None


@dataclass(frozen=True)
class Ensemble:
    """One or several reward models and the rule that combines their scores."""

    members: list[Member]
    rule: str = "mean"
    std_coef: float = 1.0

    def combine(self, scores: torch.Tensor) -> torch.Tensor:
        """Returns one score per dialogue from the scores of all members: [batch, members] -> [batch].

        mean_minus_std: mean - std_coef * population standard deviation over members (Coste et al. 2023: the variance).
        """
        if self.rule == "min":
            return scores.amin(1)
        mean = scores.mean(1)
        return mean - self.std_coef * scores.std(1, correction=0) if self.rule == "mean_minus_std" else mean


def check_labels(paths: list[str], flag: str) -> None:
    """Raises UserError if the configs of two reward models name their scores differently (id2label, problem_type)."""
    meanings = [_label_meaning(path, flag) for path in paths]
    for path, meaning in zip(paths, meanings, strict=True):
        if meaning != meanings[0]:
            what = f"the scores of {path} mean {meaning}, those of {paths[0]} {meanings[0]}"
            raise UserError(f"{flag}: {what}; set the same id2label and problem_type in config.json, or use others")


def _label_meaning(path: str, flag: str) -> str:
    file = settings_folder(path, flag) / "config.json"
    config = read_json(file, flag)
    if config.get("value_pretrained"):
        advice = "pass the reward model with --reward_model_path, or --reward_fn"
        raise UserError(
            f"{flag}: {path} is a critic (python -m ppo.critic), which predicts returns, no score; {advice}"
        )
    labels = config.get("id2label", {"0": "LABEL_0"})  # transformers' default
    if not isinstance(labels, dict):
        raise UserError(f"{flag}: {file} is damaged (id2label is not an object); copy it again")
    return f"{', '.join(map(str, labels.values()))} ({config.get('problem_type') or 'regression'})"
