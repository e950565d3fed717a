"""Scores that stop a step, and signs of collapse."""

import math

import torch

from ppo.alarms import alarms
from ppo.experience import score_problem
from tests.helpers.parts import ppo_config


def test_scores_beyond_the_limit_are_named_with_their_rank(monkeypatch):
    monkeypatch.setattr("utils.distributed.gather_objects", lambda own: [own, True])
    fine, bad = torch.tensor([0.0, 1.0]), torch.tensor([-6.0, 2.0])
    assert score_problem(torch.tensor([0.0, 1.0, -2.0, 3.0]), 5.0, fine) is None
    assert score_problem(torch.tensor([0.0, 1.0, math.nan, 3.0]), 5.0, fine).startswith(
        "the score of response 2 of this step is not finite (rank 1); "
    )
    assert "response 0 of this step is -6, beyond --explosion_limit (rank 0, 1)" in score_problem(
        torch.tensor([-6.0, 1.0, 2.0, 3.0]), 5.0, bad
    )


def test_alarms_by_threshold():
    metrics = {"kl_ref": 101.0, "perplexity": 1.01, "eos_fraction": 0.1, "response_length": 3.0, "score_std": 0.0}
    long, short = (ppo_config(maxlen_res=tokens, maxlen_prompt=tokens + 1) for tokens in (512, 24))
    assert alarms({**metrics, "kl_ref": 25.0, "perplexity": 2.0}, long) == []
    assert alarms({**metrics, "kl_ref": 25.0, "perplexity": 2.0}, short) == ["kl_ref 25 is past --alarm_kl 24"]
    assert alarms(metrics, long) == [
        "kl_ref 101 is past --alarm_kl 100",
        "perplexity 1.01 is past --alarm_perplexity 1.05",
    ]
    flags = {"alarm_kl": 0, "alarm_perplexity": 0, "alarm_eos": 0.2, "alarm_length": 4, "alarm_score_std": 1e-3}
    assert [text.split()[0] for text in alarms(metrics, ppo_config(**flags))] == [
        "eos_fraction", "response_length", "score_std",
    ]  # fmt: skip
    assert not alarms(metrics, ppo_config(alarm_kl=0, alarm_perplexity=0))
