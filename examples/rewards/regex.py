"""1 for an answer that a regular expression matches as a whole, else 0.

python train_ppo.py --reward_fn examples/rewards/regex.py:matches … for records that may have a column `pattern`
"""

import re

PATTERN = r"<think>.+</think>\s*<answer>.+</answer>"  # of records without a pattern


def matches(prompts, answers, pattern=None):
    """pattern: the column of this name, None for records that lack it, and not given if none has it."""
    patterns = pattern or [None] * len(answers)
    found = (re.fullmatch(p or PATTERN, text, re.DOTALL) for p, text in zip(patterns, answers, strict=True))
    return [float(match is not None) for match in found]
