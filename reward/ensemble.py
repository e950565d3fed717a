"""Asking reward models what they think of whole dialogues: encoding, batches by length, one score each."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from data.collate import micro_batches, pad
from data.prompts import without_oldest
from data.template import Turns, encode_dialogue
from reward.model import ScalarModel, last_scores
from utils.engine import device


@dataclass(frozen=True)
class Encoding:
    """How a reward model reads dialogues: its tokenizer, its template, and the tokens of its window (None: no end)."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    window: int | None

    def __call__(self, turns: Turns) -> tuple[list[int], bool]:
        """(ids of a dialogue that ends in the assistant's answer, whether something had to go to fit the window).

        The oldest exchanges go first. Where question and answer alone are too long, the front of the question goes:
        the score stands on the answer's EOS, which is never cut off.
        """
        ids, _ = encode_dialogue(self.tokenizer, turns, self.template)
        if self.window is None or len(ids) <= self.window:
            return ids, False
        while (history := without_oldest(turns[:-1])) and len(ids) > self.window:
            turns = [*history, turns[-1]]
            ids, _ = encode_dialogue(self.tokenizer, turns, self.template)
        return (ids if len(ids) <= self.window else ids[:1] + ids[1 - self.window :]), True


def window_of(model: ScalarModel) -> int | None:
    """The positions that a model was trained on, if its config says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


@torch.no_grad()
def score_ids(model: nn.Module, sequences: list[list[int]], batches: list[list[int]]) -> torch.Tensor:
    """The model's scalar at the last token of every sequence: float32 [sequences], on this process's device.

    batches: indices of `sequences`, one forward each; an index that occurs twice is scored twice, to the same score.
    Memory is that of one batch.
    """
    scores = torch.zeros(len(sequences), device=device())
    for rows in batches:
        ids, mask = (x.to(device()) for x in pad([sequences[i] for i in rows], 0))
        scores[rows] = last_scores(model(ids, mask), mask).float()
    return scores


def score_dialogues(
    model: ScalarModel, tokenizer: PreTrainedTokenizerBase, template: str, dialogues: list[Turns], max_tokens: int
) -> list[float]:
    """One score a dialogue, in the order given; each has to end in the assistant's answer.

    Batched by length, at most `max_tokens` padded tokens a forward. What overflows the model's window loses its oldest
    turns (`Encoding`). The model is in eval mode, on this process's device.
    """
    encoding = Encoding(tokenizer, template, window_of(model))
    sequences = [encoding(turns)[0] for turns in dialogues]
    return score_ids(model, sequences, micro_batches([len(ids) for ids in sequences], max_tokens)).tolist()
