"""Wishes to stop, of a process alone. Of two ranks, and in real runs: tests/faults/test_signals.py."""

import os
import signal
import time

import torch

from utils.run.stop_signal import OUT_OF_TIME, Stop

CPU = torch.device("cpu")


def test_the_clock_counts_hours():
    stop = Stop(5e-4)  # 1.8 s
    time.sleep(0.1)
    assert stop.exit_code(CPU) == 0
    time.sleep(1.8)
    assert stop.exit_code(CPU) == OUT_OF_TIME
    assert Stop(0.0).exit_code(CPU) == 0


def test_a_signal_waits_for_the_step_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Stop(0.0) as stop:
        assert stop.exit_code(CPU) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.exit_code(CPU) == 143
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
