"""Asking one or several reward models what they think of whole dialogues: encoding, batches, scores, one rule."""

import contextlib
import json
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from data.batching.collate import micro_batches, pad
from data.prompts import without_oldest
from data.template import Turns, encode_dialogue, encode_text
from reward.model import last_scores
from utils.engine.engine import device
from utils.engine.host_copies import host_copies
from utils.errors import UserError
from utils.models.load import model_folder
from utils.tensors import to_device


@dataclass(frozen=True)
class Encoding:
    """How a reward model reads dialogues: its tokenizer, its template, and the tokens of its window (None: no end)."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    window: int | None

    def __call__(self, turns: Turns | str) -> tuple[list[int], bool]:
        """(ids of a dialogue that ends in the assistant's answer, whether something had to go to fit the window).

        The oldest exchanges go first. Where question and answer alone are too long, the front of the question goes:
        the score stands on the answer's EOS, which is never cut off. A text that is no dialogue goes without template.
        """
        ids = self._whole(turns)
        if self.window is None or len(ids) <= self.window:
            return ids, False
        while len(ids) > self.window and not isinstance(turns, str) and (history := without_oldest(turns[:-1])):
            turns = [*history, turns[-1]]
            ids = self._whole(turns)
        return (ids if len(ids) <= self.window else ids[:1] + ids[1 - self.window :]), True

    def _whole(self, turns: Turns | str) -> list[int]:
        if isinstance(turns, str):
            return encode_text(self.tokenizer, turns)
        return encode_dialogue(self.tokenizer, turns, self.template)[0]


@torch.no_grad()
def score_ids(model: nn.Module, sequences: list[list[int]], batches: list[list[int]]) -> torch.Tensor:
    """The model's scalar at the last token of every sequence: float32 [sequences], on this process's device.

    batches: indices of `sequences`, one forward each; an index that occurs twice is scored twice, to the same score.
    Memory is that of one batch.
    """
    scores = torch.zeros(len(sequences), device=device())
    for rows in batches:
        batch = (*pad([sequences[i] for i in rows], 0), torch.tensor(rows))
        ids, mask, index = (to_device(x, device()) for x in batch)
        scores[index] = last_scores(model(ids, mask), mask).float()
    return scores


def score_dialogues(
    model: nn.Module, encoding: Encoding, dialogues: list[Turns | str], max_tokens: int
) -> tuple[list[float], list[bool]]:
    """(one score a dialogue, whether it was cut for the window), in the order given.

    Batched by length, at most `max_tokens` padded tokens a forward. The model is on this process's device.
    """
    encoded = [encoding(turns) for turns in dialogues]
    sequences = [ids for ids, _ in encoded]
    batches = micro_batches([len(ids) for ids in sequences], max_tokens, joined=model.joins_rows)
    return score_ids(model, sequences, batches).tolist(), [cut for _, cut in encoded]


@dataclass
class Frozen:
    """A model that only scores. offload: its weights stay in host memory (page-locked with a GPU) between uses.

    Buffers stay on the device. `shard_frozen` offloads models whose weights are split over ranks.
    """

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
        """Context in which the model is on the device. Its weights are not copied back, as they do not change."""
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
    """One reward model of an ensemble. `encoding` None: it reads the ids that the policy has sampled, as they are."""

    model: Frozen
    window: int | None
    encoding: Encoding | None = None


@dataclass(frozen=True)
class Ensemble:
    """One or several reward models and the rule that makes one score of theirs."""

    members: list[Member]
    rule: str = "mean"
    std_coef: float = 1.0

    def combine(self, scores: torch.Tensor) -> torch.Tensor:
        """One score a dialogue, from the raw scores of all members: [batch, members] -> [batch].

        mean; min; mean_minus_std: mean - std_coef x population deviation over the members (Coste et al. 2023 subtract
        the variance; the deviation is in the scores' own unit). One member's score is left as it is by every rule.
        """
        if self.rule == "min":
            return scores.amin(1)
        mean = scores.mean(1)
        return mean - self.std_coef * scores.std(1, correction=0) if self.rule == "mean_minus_std" else mean


def check_labels(paths: list[str], flag: str) -> None:
    """Raises UserError, naming both, when two reward models' configs do not call their score by the same name.

    A label's name (`id2label`) and the problem type are all that a folder says about what its score means and which
    way is up; without names the label is transformers' LABEL_0. Several labels are refused where a model is loaded.
    """
    meanings = [_label_meaning(path, flag) for path in paths]
    for path, meaning in zip(paths, meanings, strict=True):
        if meaning != meanings[0]:
            raise UserError(
                f"{flag}: the scores of {path} mean {meaning}, those of {paths[0]} {meanings[0]}: give models of one "
                "meaning, or the same id2label and problem_type in their config.json if it is the same"
            )


def _label_meaning(path: str, flag: str) -> str:
    file = model_folder(path, flag) / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
        labels = list(config.get("id2label", {"0": "LABEL_0"}).values())
        kind = config.get("problem_type") or "regression"
    except (ValueError, AttributeError) as error:  # broken JSON or not UTF-8; no objects where they belong
        raise UserError(f"{flag}: {file} is damaged ({error}); copy it again") from error
    return f"{', '.join(map(str, labels))} ({kind})"
