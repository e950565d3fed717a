"""Scores from a server: POST {"prompts": …, "answers": …} -> {"scores": [number or null, …]}, in batches, at once:

REWARD_URL=http://host:8000/score python train_ppo.py --reward_fn examples/rewards/remote.py:score …
"""

import asyncio
import json
import os
import sys
import time
import urllib.request
from http.client import HTTPException

URL = os.environ.get("REWARD_URL", "http://127.0.0.1:8000/score")
BATCH, TRIES, TIMEOUT = 16, 3, 30.0  # answers per request; requests; seconds per request


def post(prompts, answers):
    """Returns the scores of one batch; None for each answer of a batch that the server does not score."""
    for wait in range(TRIES):
        try:
            body = json.dumps({"prompts": prompts, "answers": answers}).encode()
            request = urllib.request.Request(URL, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                scores = json.load(reply)["scores"]
            if len(scores) == len(answers):
                return scores
            error = f"{len(scores)} scores for {len(answers)} answers"
        except (OSError, HTTPException, ValueError, KeyError, TypeError) as failure:
            error = repr(failure)
        print(f"{URL}: {error}", file=sys.stderr)
        time.sleep(wait)
    return [None] * len(answers)


async def score(prompts, answers):
    batches = (slice(i, i + BATCH) for i in range(0, len(answers), BATCH))
    parts = (asyncio.to_thread(post, prompts[batch], answers[batch]) for batch in batches)
    return [number for part in await asyncio.gather(*parts) for number in part]
