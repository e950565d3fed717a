"""What a run consists of besides its models: random streams, state, wishes to stop, learning rates."""

import asyncio
import json
import math
import os
import random
import signal
import time
from dataclasses import fields

import numpy as np
import pytest
import torch

from ppo.reward_call import call_together
from ppo.state import RunState
from utils.moments import RunningMoments
from utils.run.random_state import random_state, seed_streams, set_random_state
from utils.run.stop_signal import OUT_OF_TIME, Abandoned, Stop, check, interruptible, requested, set_hangup_action
from utils.schedule import SCHEDULES, lr_factor

CPU = torch.device("cpu")


def draws() -> tuple[float, ...]:
    """Normal numbers, which Python and NumPy draw in pairs and keep the second of, and a few others."""
    normal = (random.gauss(0, 1), float(np.random.normal()), float(torch.randn(())))
    return (*normal, random.random(), float(np.random.rand()), float(torch.rand(())))


def test_random_streams_go_on_where_they_were():
    seed_streams(5, 1)
    draws()  # leaves half a pair behind
    kept = json.loads(json.dumps(random_state()))
    expected = [draws() for _ in range(3)]
    assert len(set(expected)) == 3
    seed_streams(6, 0)
    draws()
    set_random_state(kept)
    assert [draws() for _ in range(3)] == expected


@pytest.mark.gpu
def test_the_gpu_of_this_process_has_a_stream_too():
    """And no other GPU: a run that goes on may see fewer."""
    seed_streams(5, 1)
    kept = json.loads(json.dumps(random_state()))
    expected = torch.rand(3, device="cuda")
    set_random_state(kept)
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_each_rank_and_seed_has_streams_of_its_own():
    seen = set()
    for seed, rank in ((0, 0), (0, 1), (1, 0), (42, 2)):
        seed_streams(seed, rank)
        seen.add(draws())
        seed_streams(seed, rank)
        assert draws() in seen
    assert len(seen) == 4


def test_every_number_of_a_run_comes_back():
    state = RunState(step=3, best_score=0.25, next_place=24, rollbacks=2, left_out=1, critic_center=-0.5)
    state.moments.update(torch.tensor([1.0, 2.0, 6.0]))
    state.value_moments = RunningMoments()
    state.value_moments.update(torch.tensor([-1.0, 4.0]))
    other = RunState()
    other.load_state_dict(json.loads(json.dumps(state.state_dict())))
    for field in fields(RunState):
        found, expected = getattr(other, field.name), getattr(state, field.name)
        assert getattr(found, "__dict__", found) == getattr(expected, "__dict__", expected), field.name


def test_a_run_stops_after_its_hours():
    stop = Stop(5e-4)  # 1.8 s
    time.sleep(0.1)
    assert stop.exit_code(CPU) == 0
    time.sleep(1.8)
    assert stop.exit_code(CPU) == OUT_OF_TIME
    assert Stop(0.0).exit_code(CPU) == 0


def test_a_signal_waits_for_the_step_and_handlers_come_back():
    """In one process. With two ranks, and in real runs: tests/faults/test_signals.py."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stop(0.0) as stop:
        assert stop.exit_code(CPU) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.exit_code(CPU) == 143
        os.kill(os.getpid(), signal.SIGINT)  # a launcher passes both on
        stop._since -= 100  # seconds
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.exit_code(CPU) == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def swallows() -> int:
    try:
        time.sleep(60)
    except:  # noqa: E722 - as users' code does
        return 3


def fails() -> None:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        raise ValueError("no answer from the server") from None


@pytest.mark.parametrize(
    "function",
    [lambda: time.sleep(60), swallows, fails, lambda: call_together(0.0, [("f", lambda: asyncio.sleep(60))])],
)
def test_a_signal_ends_a_users_function_whatever_it_makes_of_it(monkeypatch, function):
    with Stop(0.0) as stop:
        monkeypatch.setattr(Stop, "current", stop)
        assert interruptible(lambda: 5) == 5 and not requested()
        check()
        with pytest.raises(ZeroDivisionError):
            interruptible(lambda: 1 / 0)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        started = time.monotonic()
        assert interruptible(function) is None and time.monotonic() - started < 5
        signal.signal(signal.SIGALRM, before)
        assert requested() and not stop.interrupts
        assert interruptible(lambda: pytest.fail("called after the signal")) is None
        with pytest.raises(Abandoned) as raised:
            check()
        assert raised.value.code == 143
        monkeypatch.setattr(Stop, "current", None)  # as in an update
        check()
        assert interruptible(lambda: 5) == 5 and not requested()


@pytest.mark.parametrize(("ignore", "code"), [(True, 0), (False, 129)])
def test_a_notice_may_come_again_and_an_order_soon_after_it_is_the_same_wish(ignore, code):
    """As when a terminal is lost, whose shell and kernel both send SIGHUP, and whose launcher adds SIGTERM."""
    before = signal.getsignal(signal.SIGHUP)
    set_hangup_action(ignore)
    with Stop(0.0) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        if not ignore:
            os.kill(os.getpid(), signal.SIGTERM)
            stop._since -= 100  # seconds
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.exit_code(CPU) == code
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("variable", "before", "ignored"),
    [
        ("TMUX", signal.SIG_DFL, True),
        ("STY", signal.SIG_DFL, True),
        ("", signal.SIG_DFL, False),
        ("", signal.SIG_IGN, True),
    ],
)
def test_a_hangup_is_ignored_where_a_terminal_may_go(monkeypatch, variable, before, ignored):
    """Under tmux, screen and nohup."""
    for name in ("TMUX", "STY"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "x")
    own = signal.signal(signal.SIGHUP, before)
    try:
        set_hangup_action("auto")
        assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) == ignored
    finally:
        signal.signal(signal.SIGHUP, own)


@pytest.mark.parametrize(
    ("schedule", "warmup", "steps", "expected"),
    [
        # sqrt(warmup / (step + 1))
        ("inverse_sqrt", 4, 100, {4: math.sqrt(4 / 5), 15: 0.5}),
        # 10 steps after 2 of warm-up: half-way is (1 + 0.1) / 2. It ends at a tenth, and stays there.
        ("linear", 2, 12, {6: 0.55, 11: 0.1, 50: 0.1}),
        # A quarter of the way: 0.1 + 0.9 * (1 + cos(45 degrees)) / 2.
        ("cosine", 2, 10, {3: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 5: 0.55, 9: 0.1, 50: 0.1}),
        ("cosine", 3, 3, {2: 1.0}),  # a run that is all warm-up
        ("constant", 1, 1000, {999: 1.0}),
    ],
)
def test_learning_rates_by_hand(schedule, warmup, steps, expected):
    assert {step: lr_factor(step, warmup, steps, schedule) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_warm_up_rises_linearly_from_a_first_step_that_moves(schedule):
    assert [lr_factor(step, 4, 100, schedule) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(0, 0, 10, schedule) == 1.0  # without a warm-up


def test_a_negative_warm_up_and_unknown_schedules_are_refused():
    with pytest.raises(ValueError, match="--warmup_steps -1"):
        lr_factor(0, -1, 10, "cosine")
    with pytest.raises(ValueError, match="--lr_schedule cosin"):
        lr_factor(0, 1, 10, "cosin")
