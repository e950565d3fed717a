"""Signals to end: one rank that gets one stops all, at once or after the update; a second Ctrl-C ends the process."""

import json
import re

import pytest

from tests.faults.scenarios import Result, run_cases
from tests.helpers.tiny_run import assert_same_run

TOGETHER = {"zero_stage": 3, "gather_for_generation": "never", "reward_fn": "random_scores.py:score"}
HELD_OUT = {"zero_stage": 2, "num_eval_prompts": 2, "save_per_step": 1, "checkpoint_per_step": 50}
CASES = {
    "undisturbed": {},
    "SIGTERM": {"fault": "SIGTERM in scoring", "checkpoint_per_step": 50},
    "after SIGTERM": {"out": "SIGTERM"},
    "SIGHUP": {"fault": "SIGHUP in update", "ignore_hangup": False},
    "after SIGHUP": {"out": "SIGHUP"},
    "ignored": {"fault": "SIGHUP in update", "ignore_hangup": True},
    "reward_fn": TOGETHER | {"checkpoint_per_step": 50},
    "after reward_fn": TOGETHER | {"out": "reward_fn"},
    "SIGUSR1": TOGETHER | {"fault": "SIGUSR1 in rollout"},
    "after SIGUSR1": TOGETHER | {"out": "SIGUSR1"},
    "undisturbed together": TOGETHER,
    "evaluation": HELD_OUT | {"fault": "SIGTERM in evaluation"},
    "after evaluation": HELD_OUT | {"out": "evaluation", "fault": "SIGKILL in update", "patience": 0},
    "again after evaluation": HELD_OUT | {"out": "evaluation"},
    "undisturbed held out": HELD_OUT,
    "alarm": HELD_OUT | {"fault": "SIGTERM in evaluation", "alarm_length": 1000},
    "again and again": {"fault": "insistent launcher", "patience": 5},
    "every minute": {"checkpoint_per_step": 50, "checkpoint_minutes": 1e-6},
    "slow disk": {"fault": "slow disk"},
    "while writing": {"fault": "signal while writing"},
    "after while writing": {"out": "while writing"},
}


# Once, the second call has no end, on both ranks. The random stream has been used when rank 1 gets a signal there.
SCORES = """
import os, pathlib, random, signal, time
rank, calls = os.environ["RANK"], []
told = pathlib.Path(__file__).with_name(f"told{rank}")

def score(prompts, answers):
    calls.append(1)
    numbers = [random.random() for _ in answers]
    if len(calls) == 2 and not told.exists():
        told.touch()
        if rank == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
    return numbers
"""


@pytest.fixture(scope="module")
def results(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    (folder / "random_scores.py").write_text(SCORES)
    file = {"reward_fn": f"{folder}/{TOGETHER['reward_fn']}"}
    cases = {name: case | file if "reward_fn" in case else case for name, case in CASES.items()}
    return run_cases(folder, inputs, cases)


def checkpoints(result: Result) -> list[str]:
    return sorted(path.name for path in (result.out / "checkpoints").iterdir())


AGAIN = "what followed is made again; "


@pytest.mark.parametrize(
    ("name", "code", "step", "rest", "like"),
    [
        ("SIGTERM", 143, 1, AGAIN, "undisturbed"),
        ("SIGHUP", 129, 2, "", "undisturbed"),
        ("SIGUSR1", 138, 1, AGAIN, "undisturbed together"),
    ],
)
def test_a_signal_to_one_rank_stops_both(results, name, code, step, rest, like):
    """In a rollout or scoring, also where ranks decode together, at once; in an update after the step."""
    result = results[name]
    assert result.codes == [code, code], result.log[-3000:]
    assert f"stopped by {name} after step {step}; {rest}the same command resumes from its checkpoint" in result.log
    assert len(re.findall(r"checkpoint of step", result.log)) == step
    assert results[f"after {name}"].codes == [0, 0]
    assert json.loads((result.out / "config.json").read_text())["resumed_from_step"] == step
    assert_same_run(result.out, results[like].out)


def test_a_signal_interrupts_reward_functions_on_all_ranks_and_random_streams_go_back(results):
    result = results["reward_fn"]
    assert result.codes == [143, 143] and "Traceback" not in result.log, result.log[-3000:]
    assert f"stopped by SIGTERM after step 1; {AGAIN}the same command resumes" in result.log
    assert results["after reward_fn"].codes == [0, 0]
    assert_same_run(result.out, results["undisturbed together"].out)


def test_a_signal_stops_an_evaluation_which_the_resumed_run_makes_again(results):
    """Also if it is killed before its next checkpoint, when the step is written already."""
    result, after, again = results["evaluation"], results["after evaluation"], results["again after evaluation"]
    assert result.codes == [143, 143] and any(after.codes) and again.codes == [0, 0], again.log[-3000:]
    assert f"stopped by SIGTERM after step 2; {AGAIN}the same command resumes" in result.log
    assert "step 2: held-out" not in result.log and all("step 2: held-out" in x.log for x in (after, again))
    assert_same_run(result.out, results["undisturbed held out"].out, "best")


def test_a_signal_does_not_stop_an_evaluation_after_an_alarm(results):
    """A rollback after it, in the resumed run, would find the step's own checkpoint."""
    assert results["alarm"].codes == [143, 143]
    assert "stopped by SIGTERM after step 2; the same command resumes" in results["alarm"].log


def test_a_lost_terminal_may_be_ignored(results):
    assert results["ignored"].codes == [0, 0]
    assert_same_run(results["ignored"].out, results["undisturbed"].out)


def test_a_second_ctrl_c_ends_a_process_in_the_middle_of_its_step(results):
    """The checkpoint of step 2 would have got its name at the end of step 3.

    Launchers and schedulers repeat SIGTERM at any time. Who presses Ctrl-C seconds after a signal means it.
    """
    result = results["again and again"]
    assert result.codes[1] == 130 and result.codes[0] != 0
    assert (result.log.count("SIGTERM\n"), result.log.count("SIGINT\n")) == (2, 2)
    assert result.log.count("Ctrl-C after 3 s") == 2  # the other rank is told
    assert checkpoints(result) == ["step_1", "step_2.partial"]


def test_checkpoints_by_the_clock_change_no_numbers(results):
    result = results["every minute"]
    assert result.codes == [0, 0], result.log[-3000:]
    assert checkpoints(result) == ["step_1", "step_2", "step_3"]
    assert_same_run(result.out, results["undisturbed"].out)


def test_checkpoints_that_take_longer_than_a_step_wait_for_each_other(results):
    result = results["slow disk"]
    assert result.codes == [0, 0], result.log[-3000:]
    steps = re.findall(r"checkpoint of step (\d): .* in ([\d.]+) s; the run waited ([\d.]+) s", result.log)
    assert [step for step, *_ in steps] == ["1", "2", "3"]
    assert 0 < float(steps[0][2]) < float(steps[0][1])  # a part of it: the second step was being made meanwhile
    assert checkpoints(result) == ["step_1", "step_2", "step_3"]
    assert_same_run(result.out, results["undisturbed"].out)


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(results):
    """It most likely comes in the rollout of step 2, after which there is nothing new to save; or in the update."""
    result = results["while writing"]
    assert result.codes == [143, 143], result.log[-3000:]
    (step,) = re.findall(r"stopped by SIGTERM after step (\d)", result.log)
    assert re.findall(r"checkpoint of step (\d)", result.log) == ["1", "2"][: int(step)]
    assert f"resuming from {result.out}/checkpoints/step_{step}" in results["after while writing"].log
    assert_same_run(result.out, results["undisturbed"].out)
