"""The gold score of the experiments: the true quality of an answer, of which the proxy sees only some comparisons.

    gold = sentiment - repetition - length

sentiment   VADER's compound score of the answer, -1 (negative) to 1 (positive)
repetition  share of its words of four or more letters that occur earlier in the answer, 0 to 1
length      penalty: 1 for fewer than two words; 0 up to 10 words; from there linearly up to 1 at 13 words

The score uses a lexicon and counts only: it is cheap, exact, and cannot be increased by longer answers.
"""

import re
from collections.abc import Sequence

from data.demo.annotators import vader

WORD = re.compile(r"[\w']+")
LONG_WORD = 4  # minimum letters of words that count as repeated; most sentences repeat shorter ones
MIN_WORDS, FREE_WORDS, MAX_WORDS = 2, 10, 13


def repetition(words: list[str]) -> float:
    """Returns the share of long words that occur earlier; 0 without long words."""
    long_words = [word for word in words if len(word) >= LONG_WORD]
    return 1 - len(set(long_words)) / len(long_words) if long_words else 0.0


def excess(count: int) -> float:
    """Returns the length penalty of an answer with `count` words."""
    if count < MIN_WORDS:
        return 1.0
    return min(1.0, max(0.0, (count - FREE_WORDS) / (MAX_WORDS - FREE_WORDS)))


def gold_score(prompts: list, answers: Sequence[str]) -> list[float]:
    """Is `gold` as a reward function: --heldout_reward_fn experiments/gold.py:gold_score."""
    return gold(answers)


def gold(answers: Sequence[str]) -> list[float]:
    """Returns the gold score of each answer, -3 to 1."""
    words = [WORD.findall(answer.lower()) for answer in answers]
    sentiments = vader([], answers)
    return [s - repetition(w) - excess(len(w)) for s, w in zip(sentiments, words, strict=True)]
