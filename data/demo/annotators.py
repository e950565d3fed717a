"""Simulated annotators: sentiment scorers that stand in for people, usable as `--reward_fn FILE:FUNCTION`.

Each takes the prompts and the answers of a batch and returns one number an answer; the prompts are not looked at.
"""

from collections.abc import Sequence
from functools import cache


@cache
def _vader_analyzer():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader(prompts: Sequence, answers: Sequence[str]) -> list[float]:
    """VADER's share of positive words less that of negative ones, -1 to 1; 0 for an empty answer.

    Not its compound score, which grows with every friendly word and so would mostly pay for length.
    """
    shares = [_vader_analyzer().polarity_scores(answer) for answer in answers]
    return [float(share["pos"] - share["neg"]) for share in shares]


def snownlp_sentiment(prompts: Sequence, answers: Sequence[str]) -> list[float]:
    """SnowNLP's probability, 0 to 1, that each Chinese answer is a favourable review; 0.5 for an empty one."""
    from snownlp import SnowNLP

    return [float(SnowNLP(answer).sentiments) if answer.strip() else 0.5 for answer in answers]
