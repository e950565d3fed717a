"""What of a run goes into a checkpoint, besides the engines: all of it."""

import json
from dataclasses import fields

import torch

from ppo.run import RunState


def test_every_number_of_a_run_comes_back():
    state = RunState(step=3, best_score=0.25, next_place=24, rollbacks=2, left_out=1, critic_center=-0.5)
    state.moments.update(torch.tensor([1.0, 2.0, 6.0]))
    other = RunState()
    other.load_state_dict(json.loads(json.dumps(state.state_dict())))
    for field in fields(RunState):
        found, expected = getattr(other, field.name), getattr(state, field.name)
        assert getattr(found, "__dict__", found) == getattr(expected, "__dict__", expected), field.name
