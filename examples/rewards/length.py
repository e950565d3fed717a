"""Length and repetition: two parts, whose sum is the score. metrics.jsonl has each, as reward_brief_words and so on.

python train_ppo.py --reward_fn my_scores.py:score examples/rewards/length.py:brief --reward_fn_weights 1 0.5 …
"""

LIMIT = 50  # words, in records without a column `max_words`


def brief(prompts, answers, max_words=None):
    """words: 0 up to the limit, then falling to -1 at twice the limit. repeats: minus the share of repeated words."""
    limits = max_words or [None] * len(answers)
    words = [answer.lower().split() for answer in answers]
    over = [len(given) / (limit or LIMIT) - 1 for given, limit in zip(words, limits, strict=True)]
    return {
        "words": [-min(max(x, 0.0), 1.0) for x in over],
        "repeats": [len(set(given)) / len(given) - 1 if given else 0.0 for given in words],
    }
