"""1 for an answer with the right number, else 0; for records like GSM8K's {"question": …, "answer": "… #### 18"}.

python train_ppo.py --data_path examples/rewards/data/problems.jsonl --reward_fn examples/rewards/gsm8k.py:exact …
"""

import re
from decimal import Decimal

NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def final_number(text: str) -> Decimal | None:
    """Returns the first number after "####", or else the last one of the text; None if there is none."""
    _, marked, result = text.rpartition("####")
    numbers = NUMBER.findall(result)
    return Decimal(numbers[0 if marked else -1].replace(",", "")) if numbers else None


def exact(prompts, answers, answer):
    """`answer` is the column of this name: the reference of each prompt. None, if it has no number: left out."""
    scores = []
    references = (None if x is None else final_number(str(x)) for x in answer)  # records may lack the column
    for given, reference in zip(answers, references, strict=True):
        scores.append(None if reference is None else float(final_number(given) == reference))
    return scores
