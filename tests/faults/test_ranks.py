"""What befalls one of two ranks befalls the run: none waits for ever, none steps on bad numbers."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.faults import PHASES
from tests.faults.scenarios import Result, finished, run_cases, run_forked
from tests.helpers.tiny import SAMPLES, tiny_llama_folder
from tests.helpers.tiny_run import SIZES, assert_same_run, final_weights, fit_flags, read_metrics

TIMEOUT = 8  # seconds; many times what a step of this size takes
# What is tested without --all, too: places of faults, and runs with bad numbers.
SHORT = ("rollout", "update", "reward function", "undisturbed", "NaN loss", "collapse", "policy", "critic")


def places(names) -> list:
    """Parameters: those that are not in SHORT are slow, as most of them wait for the watchdog."""
    return [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in names]


def chosen(config: pytest.Config, cases: dict[str, dict]) -> dict[str, dict]:
    """The cases of the parameters that are not skipped."""
    return {name: case for name, case in cases.items() if config.getoption("--all") or name.endswith(SHORT)}


DEATHS = {
    f"{number} in {phase}": {"fault": f"{number} in {phase}", "hang_timeout": TIMEOUT, "patience": patience}
    # The victim that stands still is killed a second after the other has ended, as a launcher would.
    for number, patience in (("SIGKILL", 60), ("SIGSTOP", 1))
    for phase in PHASES
}


@pytest.fixture(scope="module")
def deaths(inputs, tmp_path_factory, pytestconfig) -> dict[str, Result]:
    return run_cases(tmp_path_factory.mktemp("deaths"), inputs, chosen(pytestconfig, DEATHS))


@pytest.mark.parametrize("phase", places(PHASES))
def test_a_rank_that_dies_or_stands_still_ends_the_other_with_its_stacks(deaths, phase):
    """It ends at the next collective that fails, or by the watchdog where none does."""
    dead, still = deaths[f"SIGKILL in {phase}"], deaths[f"SIGSTOP in {phase}"]
    assert dead.codes[0] in (1, 124) and dead.codes[1] == -9
    assert re.search(r"most recent call (last|first)\):\n(.*\n)+.*train_ppo.py", dead.log)
    assert still.codes == [124, -9]
    assert re.search(rf"error \[rank 0\]: no progress for {TIMEOUT} s \(--hang_timeout\) after '", still.log)
    assert re.search(r"most recent call first\):\n(.*\n)+.*train_ppo.py", still.log)


HOLDS_THE_LOCK = """
import os, re

def score(prompts, answers):
    if os.environ["RANK"] == "1":
        re.match("(a+)+$", "a" * 60 + "b")
    return [0.0 for answer in answers]
"""
STALLS = ("loading", "encoding", "saving", "reward function")


@pytest.fixture(scope="module")
def stalls(inputs, tmp_path_factory, pytestconfig) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("stalls")
    (folder / "score.py").write_text(HOLDS_THE_LOCK)
    cases = {name: {"fault": f"stall in {name}", "hang_timeout": TIMEOUT} for name in STALLS[:3]}
    cases[STALLS[3]] = {"reward_fn": f"{folder}/score.py:score", "hang_timeout": TIMEOUT}
    return run_cases(folder, inputs, chosen(pytestconfig, cases))


@pytest.mark.parametrize("where", places(STALLS))
def test_a_rank_that_stalls_ends_both_also_before_the_loop_and_with_the_global_lock(stalls, where):
    """The rank that stalls ends by itself. The other counts, too, or fails when the connection closes."""
    result, victim = stalls[where], 0 if where == "encoding" else 1
    assert result.codes[1 - victim] in (1, 124), result.log[-3000:]
    assert result.codes[victim] == (-9 if where == "reward function" else 124), result.log[-3000:]
    assert f"error [rank {victim}]: no progress for {TIMEOUT} s (--hang_timeout) after '" in result.log
    functions = {"loading": "load_models", "encoding": "load_data", "saving": "_write_share"}
    stacks = rf"most recent call first\):\n(.*\n)+.*{functions.get(where, 'score.py')}"
    assert re.search(stacks, result.log)


BAD = {
    "NaN loss": r"the loss of the policy is not finite .rank 1.; no weights were changed",
    "NaN gradient": r"the gradient of the policy is not finite, or beyond --explosion_limit \(rank 1\); no weights",
    "nan score": r"the score of response 2 of this step is not finite \(rank 1\)",  # its second prompt
}
NUMBERS = {"undisturbed": {}}
for _fault in BAD:
    NUMBERS |= {_fault: {"fault": _fault}, f"after {_fault}": {"out": _fault}}
NUMBERS["collapse"] = {"lr": 1e-2, "alarm_kl": 1e-4, "on_collapse": "stop"}
NUMBERS["policy"] = {"zero_stage": 3, "fault": "NaN gradient", "skip_bad_batches": 1}
NUMBERS["critic"] = {"offload_optimizer": True, "fault": "NaN critic gradient", "skip_bad_batches": 1}


@pytest.fixture(scope="module")
def numbers(inputs, tmp_path_factory, pytestconfig) -> dict[str, Result]:
    cases = {name: {"zero_stage": 2} | case for name, case in chosen(pytestconfig, NUMBERS).items()}
    return run_cases(tmp_path_factory.mktemp("numbers"), inputs, cases)


@pytest.mark.parametrize("fault", places(BAD))
def test_bad_numbers_on_one_rank_stop_both_before_the_step(numbers, fault):
    """Without the fault the run goes on from before it, and no bit of it is another."""
    result, after = numbers[fault], numbers[f"after {fault}"]
    assert result.codes == [2, 2] and "Traceback" not in result.log
    where = r"step 2, batch in .*/bad_batches/step_2_1.safetensors"
    assert re.search(rf"error \[rank 0\]: {BAD[fault]}.*\[{where}\]", result.log), result.log
    assert result.log.count("error [rank") == 1
    batch = load_file(result.out / "bad_batches" / "step_2_1.safetensors")
    assert batch["sequences"].shape == batch["attention_mask"].shape and len(batch["sequences"]) in (4, 8)
    assert after.codes == [0, 0] and f"resuming from {result.out}/checkpoints/step_1" in after.log
    assert_same_run(result.out, numbers["undisturbed"].out)


def test_a_collapse_or_an_explosion_leaves_the_checkpoint_that_was_being_written(numbers, tmp_path):
    flags = {"lr": 10, "checkpoint_per_step": 1, "explosion_limit": 20}
    base = tiny_llama_folder(tmp_path / "base", **SIZES)
    argv = fit_flags(base, SAMPLES / "en/dialogues", tmp_path / "run", **flags)
    explosion = run_forked(tmp_path, {"sft": {"module": "sft.train", "argv": argv}})["sft"]
    assert re.search("beyond --explosion_limit .* no step was made.*step 2, batch in", explosion.log)
    assert "step 2 looks like a collapse: kl_ref" in numbers["collapse"].log
    for result in (explosion, numbers["collapse"]):
        assert result.codes == [2, 2]
        assert [path.name for path in (result.out / "checkpoints").iterdir()] == ["step_1"]


@pytest.mark.parametrize("model", ["policy", "critic"])
def test_a_bad_minibatch_that_is_tolerated_is_left_out_on_both(numbers, model):
    """The faults compare the weights of policy and critic before and after it."""
    result = numbers[model]
    assert result.codes == [0, 0]
    assert f"the gradient of the {model} is not finite, or beyond --explosion_limit (rank 1); no weights" in result.log
    assert "1 of --skip_bad_batches 1" in result.log and "weights compared: the same" in result.log
    assert [row["bad_batches"] for row in read_metrics(result.out)] == [0, 1, 1]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in final_weights(result.out).values())


def test_ranks_check_each_others_files_and_ask_for_room_for_all(numbers, inputs, tmp_path):
    """They share the hashing: of these files the first is rank 0's to check, the other rank 1's."""
    whole = numbers["undisturbed"].out / "checkpoints" / "step_3"
    asked = float(re.search(r"checkpoint of step 3: ([\d.]+) MB", numbers["undisturbed"].log)[1])
    sizes = [file.stat().st_size for file in whole.glob("*.safetensors")]
    assert len(sizes) == 4 and asked == pytest.approx(sum(sizes) / 1e6, rel=0.2)
    cases = {}
    for name in ("critic-rank0.safetensors", "critic-rank1.safetensors"):
        checkpoint = shutil.copytree(whole, tmp_path / name / "step_3")
        content = bytearray((checkpoint / name).read_bytes())
        content[-100] ^= 1
        (checkpoint / name).write_bytes(content)
        cases[name] = {"zero_stage": 2, "resume": checkpoint, "out": f"run {name}"}
    for name, result in run_cases(tmp_path, inputs, cases).items():
        assert result.codes == [2, 2]
        assert re.search(rf"error \[rank 0\]: --resume .* is not an intact checkpoint .{name}", result.log)


@pytest.fixture(scope="module")
def little(inputs, tmp_path_factory) -> dict[str, Result]:
    together = {"zero_stage": 3, "gather_for_generation": "never"}
    empty = {"fault": "empty responses"}
    cases = {
        "empty 2": empty | {"zero_stage": 2},
        "empty 3": empty | together,
        "one": together | {"num_eval_prompts": 1},
    }
    return run_cases(tmp_path_factory.mktemp("little"), inputs, cases)


def test_a_rank_with_little_to_do_keeps_up(little):
    """It has responses without a token, under ZeRO-2 and 3, or no prompt to evaluate."""
    for name, out in finished(little).items():
        rows = read_metrics(out)
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert all(value is not None for row in rows for value in row.values())
        if name == "one":
            assert all("eval_score_mean" in row for row in rows)
        else:
            assert all(row["eos_fraction"] <= 0.5 for row in rows)  # an empty response has not ended by itself
