"""Simulated annotators: sentiment scorers that stand in for people, usable as `--reward_fn FILE:FUNCTION`.

Each takes the prompts and the answers of a batch and returns one number per answer; prompts are ignored.
"""

from collections.abc import Sequence
from functools import cache


@cache
def _vader_analyzer():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader(prompts: Sequence, answers: Sequence[str]) -> list[float]:
    """VADER's compound score, -1 (hostile) to 1 (friendly); 0 for an empty answer."""
    return [float(_vader_analyzer().polarity_scores(answer)["compound"]) for answer in answers]


def snownlp_sentiment(prompts: Sequence, answers: Sequence[str]) -> list[float]:
    """SnowNLP's probability, 0 to 1, that each Chinese answer is a favourable review; 0.5 for an empty one."""
    from snownlp import SnowNLP

    return [float(SnowNLP(answer).sentiments) if answer.strip() else 0.5 for answer in answers]
