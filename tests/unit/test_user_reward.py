"""User code of --reward_fn: what is loaded, what it is given, what it may return, and how long it may take."""

import asyncio
import contextlib
import signal
import time
from functools import partial
from types import SimpleNamespace

import pytest

from data.prompts import Prompt
from ppo.ranks import own_share
from ppo.reward_call import call_within
from ppo.user_reward import RewardFunction, UserReward, load_reward_functions
from utils.errors import UserError

TURNS = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
ANSWERS = ["x", "y"]
ROWS = [{"answer": "4", "id": 1, "tests": [1]}, {"answer": "5", "id": 2}]


def said_by(*functions, rows=ROWS, timeout=0.0, finite=False):
    """What functions say of the two answers; several have the names f0, f1, …, or that of a pair."""
    pairs = [f if isinstance(f, tuple) else (f"f{i}", f) for i, f in enumerate(functions)]
    loaded = [RewardFunction(f, f"--reward_fn x.py:{name}", f"reward_{name}") for name, f in pairs]
    return UserReward(loaded, timeout)(TURNS, ANSWERS, rows, finite)


def loaded_from(tmp_path, text: str, *names: str, **flags) -> UserReward:
    (tmp_path / "f.py").write_text(text)
    flags = {"reward_fn_weights": [], "reward_fn_timeout": 0.0} | flags
    return load_reward_functions(SimpleNamespace(reward_fn=[f"{tmp_path}/f.py:{name}" for name in names], **flags))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "f0 returned 1 numbers for 2 answers"),
        ([0.0, float("nan")], "f0 returned nan for answer 1"),
        (["good", 1], "f0 must return a list of numbers"),
        ({"length": [1.0], "style": [1.0, 2.0]}, "f0: length returned 1 numbers for 2 answers"),
        ({}, "f0 returned 0 numbers for 2 answers"),
    ],
)
def test_reward_function_that_returns_something_else(returned, message):
    with pytest.raises(UserError, match=f"--reward_fn.*{message}"):
        said_by(lambda prompts, answers: returned, finite=True)


def test_a_reward_function_may_change_what_it_is_given():
    """The run's own prompts stay: they are shown, encoded for other reward models, and come again."""
    turns, answers, rows = [[{"role": "user", "content": "a"}]], ["b"], [{"tests": [1]}]

    def appends(dialogues, texts, tests):
        dialogues[0][0]["content"] = "changed"
        dialogues[0].append({"role": "assistant", "content": texts.pop()})
        tests[0].append(2)
        return [1.0]

    assert UserReward([RewardFunction(appends)])(turns, answers, rows).scores == [1.0]
    assert (turns, answers, rows) == ([[{"role": "user", "content": "a"}]], ["b"], [{"tests": [1]}])


class Scorer:
    def __call__(self, prompts, answers, answer):
        return [float(x) for x in answer]


class AsyncScorer:
    async def __call__(self, prompts, answers, *, id):
        return id


def length(values) -> list[float]:
    return [float(len(values))] * 2


@pytest.mark.parametrize(
    ("function", "scores"),
    [
        (lambda dialogues, texts: [1, 2], [1, 2]),  # the old form
        (lambda *both: length(both), [2, 2]),
        (lambda prompts, answers, answer: [float(x) for x in answer], [4, 5]),
        (lambda prompts, answers, missing: [x is None for x in missing], [1, 1]),
        (lambda prompts, answers, missing=7: [missing, missing], [7, 7]),
        (lambda prompts, answers, tests=7: [tests == [[1], None], 0], [1, 0]),  # None where a record lacks it
        (lambda prompts, answers, *, id: id, [1, 2]),
        (lambda prompts, answers, **columns: length(columns), [3, 3]),
        (lambda prompts, answers, id, **columns: length(columns), [2, 2]),
        (partial(lambda scale, prompts, answers, id: [scale * x for x in id], 10), [10, 20]),
        (Scorer(), [4, 5]),
        (AsyncScorer(), [1, 2]),
    ],
)
def test_a_function_gets_the_columns_that_its_parameters_name(function, scores):
    assert said_by(function).scores == scores


def test_ranks_keep_the_columns_beside_their_prompts(monkeypatch):
    prompts = [Prompt([1] * (1 + i % 3), [str(i)], "", {"id": i}) for i in range(8)]
    monkeypatch.setattr("ppo.ranks.world_size", lambda: 2)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr("ppo.ranks.rank", lambda rank=rank: rank)
        share = own_share(prompts, list(range(100, 108)))
        found += [*zip(share.turns, share.columns, share.places)]
    assert sorted(found, key=str) == [([str(i)], {"id": i}, 100 + i) for i in range(8)]


def test_columns_with_the_names_of_prompts_and_answers_do_not_reach_it():
    rows, lines = [{"answers": 1, "prompts": 2, "id": 3}] * 2, []
    reward = UserReward([RewardFunction(lambda prompts, answers, **columns: [columns == {"id": [3, 3]}] * 2, "L")])
    reward.check_columns(rows, lines.append)
    assert reward(TURNS, ANSWERS, rows).scores == [1.0, 1.0]
    assert [line.split(" does")[0] for line in lines] == [f"warning: the column '{x}'" for x in ("answers", "prompts")]


def test_a_column_that_no_prompt_has_is_an_error_unless_it_has_a_default():
    reward = UserReward([RewardFunction(lambda prompts, answers, solution: [0, 0])])
    with pytest.raises(UserError, match=r"needs the column 'solution', .* \(columns: answer, id, tests\); rename one"):
        reward.check_columns(ROWS, print)
    UserReward([RewardFunction(lambda prompts, answers, solution=None: [0, 0])]).check_columns(ROWS, pytest.fail)


@pytest.mark.parametrize("function", [lambda answers: [0], lambda: [0], lambda completions, answer: [0]])
def test_a_function_of_another_form_is_refused(function):
    with pytest.raises(UserError, match=r"has the parameters \(.*\); write it as \(prompts, answers\)"):
        RewardFunction(function)


def test_weights_parts_and_failures(tmp_path):
    text = """
RUNS = globals().get("RUNS", 0) + 1
def parts(prompts, answers):
    return {"good": [1, 2], "short": [10, None]}
async def right(prompts, answers, answer):
    return [float(x) for x in answer]
"""
    reward = loaded_from(tmp_path, text, "parts", "right", reward_fn_weights=[2.0, -0.5])
    said = reward(TURNS, ANSWERS, ROWS)
    assert said.scores == [2.0 * 11 - 0.5 * 4, 0.0] and said.failed == [False, True]
    assert said.parts == {
        "reward_parts": [11, None], "reward_parts_good": [1, 2], "reward_parts_short": [10, None],
        "reward_right": [4, 5],
    }  # fmt: skip
    assert reward.functions[0].function.__globals__ is reward.functions[1].function.__globals__  # the file runs once


def test_functions_of_one_name_are_numbered_and_no_two_scores_have_one_name(tmp_path):
    text = "def f(prompts, answers):\n    return [1, 2]\ndef g(prompts, answers):\n    return {'x': [1, 2]}\n"
    assert list(loaded_from(tmp_path, text, "f", "f")(TURNS, ANSWERS, ROWS).parts) == ["reward_f_1", "reward_f_2"]
    with pytest.raises(UserError, match=r"x.py:a_x: reward_a_x is the name of two scores"):
        said_by(("a", lambda p, a: {"x": [1, 2]}), ("a_x", lambda p, a: [1, 2]))


def test_async_functions_run_together_and_errors_name_their_place():
    gate = []

    async def waits(prompts, answers):
        while not gate:
            await asyncio.sleep(0.001)
        return [1, 1]

    async def opens(prompts, answers):
        gate.append(True)
        return [2, 2]

    async def fails(prompts, answers):
        return {}["no such word"]

    assert said_by(waits, opens, timeout=20.0).scores == [3, 3]  # one after the other would be too long
    with pytest.raises(UserError, match=r"f1 failed: .*test_user_reward.py:\d+: KeyError: 'no such word'; fix it"):
        said_by(lambda prompts, answers: [0, 0], fails)


async def hangs(prompts, answers):
    await asyncio.sleep(60)


async def blocks(prompts, answers):
    time.sleep(60)


def swallows(prompts, answers):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


@pytest.mark.parametrize("function", [hangs, blocks, swallows])
def test_a_function_that_hangs_is_named_with_the_line_where_it_waits(function, monkeypatch):
    monkeypatch.setattr("ppo.reward_call.MARGIN", 0.1)
    started, line = time.monotonic(), function.__code__.co_firstlineno
    with pytest.raises(
        UserError, match=r"--reward_fn x.py:f0 took more than .* \(--reward_fn_timeout\), in .*;"
    ) as raised:
        said_by(function, timeout=0.2)
    place = str(raised.value).split(", in ")[1].split(";")[0]
    assert place.startswith(f"{__file__}:") and line < int(place.rsplit(":", 1)[1]) <= line + 4
    assert time.monotonic() - started < 5
    assert call_within(0.2, "f", lambda: 5) == 5 and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
