"""Buffers of several scoring calls, joined: the parts of scores that --reward_fn gave in some calls only."""

from dataclasses import replace

import torch

from ppo.groups import concat
from tests.helpers.parts import rollout_of, scores_of


def scored_in(names: str, *rows: list[float]):
    scores = scores_of(rollout_of([[0, 1]] * len(rows)), [0.0] * len(rows))
    return replace(scores, parts=torch.tensor(rows), part_names=tuple(names))


def test_parts_keep_their_names_if_calls_gave_others():
    joined = concat(
        [scored_in("ac", [1.0, 3.0]), scored_in("abc", [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]), scored_in("c", [2.0])]
    )
    assert joined.part_names == ("a", "c", "b") and len(joined) == 4
    nan = torch.nan
    expected = torch.tensor([[1.0, 3.0, nan], [4.0, 6.0, 5.0], [7.0, 9.0, 8.0], [nan, 2.0, nan]])
    torch.testing.assert_close(joined.parts, expected, equal_nan=True)


def test_scores_without_parts_are_joined():
    plain = scores_of(rollout_of([[0, 1]]), [1.0])
    joined = concat([plain, plain])
    assert joined.scores.tolist() == [1.0, 1.0] and joined.part_names == ()
