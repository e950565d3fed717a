"""The gold score of the experiments: what a good answer is, known exactly. The proxy only sees some of its choices.

    gold = sentiment - repetition - length

sentiment   VADER's compound score of the answer, -1 (hostile) to 1 (friendly)
repetition  the share of its words of four letters and more that have been there before, 0 to 1
length      how far it is from an answer: 1 for less than two words; 0 up to 10; from there up to 1 at 13

Pure lexicon and counting: cheap, without noise, and nothing that a policy could talk out of it by saying more.
"""

import re
from collections.abc import Sequence

from data.demo.annotators import vader

WORD = re.compile(r"[\w']+")
LONG_WORD = 4  # letters; shorter ones come again in any sentence
MIN_WORDS, FREE_WORDS, MAX_WORDS = 2, 10, 13


def repetition(words: list[str]) -> float:
    """Share of the long words that came before; 0 without any."""
    long_words = [word for word in words if len(word) >= LONG_WORD]
    return 1 - len(set(long_words)) / len(long_words) if long_words else 0.0


def excess(count: int) -> float:
    """What an answer of so many words loses for its length."""
    if count < MIN_WORDS:
        return 1.0
    return min(1.0, max(0.0, (count - FREE_WORDS) / (MAX_WORDS - FREE_WORDS)))


def gold(answers: Sequence[str]) -> list[float]:
    """The gold score of each answer, -3 to 1."""
    words = [WORD.findall(answer.lower()) for answer in answers]
    sentiments = vader([], answers)
    return [s - repetition(w) - excess(len(w)) for s, w in zip(sentiments, words, strict=True)]
