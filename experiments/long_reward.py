"""Rewards of the world with long answers, for --reward_fn: sentiment of the first or of the last words only.

The reward is given after the last token, as always. With `early`, it was decided long before; with `late`, it depends
on the last words alone. So advantages of most tokens are noise, unless a critic tells them apart.
"""

from data.demo.annotators import vader

WORDS = 6  # that count
FEW = 12  # an answer with fewer words loses 1: it would have no other words


def early(prompts: list, answers: list[str]) -> list[float]:
    """Returns VADER's compound score of the first WORDS words of each answer, minus 1 for a short one: -2 to 1."""
    return _scores([answer.split() for answer in answers], slice(WORDS))


def late(prompts: list, answers: list[str]) -> list[float]:
    """Returns the same of the last WORDS words."""
    return _scores([answer.split() for answer in answers], slice(-WORDS, None))


def _scores(answers: list[list[str]], part: slice) -> list[float]:
    sentiments = vader([], [" ".join(words[part]) for words in answers])
    return [s - (len(words) < FEW) for s, words in zip(sentiments, answers, strict=True)]
