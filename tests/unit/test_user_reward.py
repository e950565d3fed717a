"""User code of --reward_fn: what is loaded, what it is given, and what it may return."""

import pytest

from ppo.user_reward import call_reward_fn
from utils.errors import UserError


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "returned 1 numbers for 2 answers"),
        ([0.0, float("nan")], "nan for answer 1"),
    ],
)
def test_reward_function_that_returns_something_else(returned, message):
    with pytest.raises(UserError, match=f"--reward_fn.*{message}"):
        call_reward_fn(lambda prompts, answers: returned, [[], []], ["x", "y"], finite=True)


def test_a_reward_function_may_change_what_it_is_given():
    """The run's own prompts stay: they are shown, encoded for other reward models, and come again."""
    turns, answers = [[{"role": "user", "content": "a"}]], ["b"]

    def appends(dialogues, texts):
        dialogues[0][0]["content"] = "changed"
        dialogues[0].append({"role": "assistant", "content": texts.pop()})
        return [1.0]

    assert call_reward_fn(appends, turns, answers) == [1.0]
    assert (turns, answers) == ([[{"role": "user", "content": "a"}]], ["b"])
