"""What befalls one of two ranks befalls the run: none waits for ever, none steps on bad numbers."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.kill import PHASES, check_equal
from tests.faults.scenarios import Result, run_cases, run_forked
from tests.helpers.tiny import SAMPLES, tiny_llama_folder
from tests.helpers.tiny_run import SIZES, read_metrics

TIMEOUT = 8  # seconds; many times what a step of this size takes


DEATHS = {
    f"{number} in {phase}": {"fault": f"{number} in {phase}", "hang_timeout": TIMEOUT, "patience": patience}
    # The victim that stands still is killed a second after the other has ended, as a launcher would.
    for number, patience in (("SIGKILL", 60), ("SIGSTOP", 1))
    for phase in PHASES
}


@pytest.fixture(scope="module")
def deaths(inputs, tmp_path_factory) -> dict[str, Result]:
    return run_cases(tmp_path_factory.mktemp("deaths"), inputs, DEATHS)


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_that_stands_still_ends_the_other_with_its_stacks(deaths, phase):
    result = deaths[f"SIGSTOP in {phase}"]
    assert result.codes == [124, -9]
    assert re.search(rf"error \[rank 0\]: no progress for {TIMEOUT} s \(--hang_timeout\) after '", result.log)
    assert re.search(r"most recent call first\):\n(.*\n)+.*train_ppo.py", result.log)


@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_that_dies_ends_the_other_with_its_stacks(deaths, phase):
    """At the next collective, which fails: the watchdog is for those that do not."""
    result = deaths[f"SIGKILL in {phase}"]
    assert result.codes[0] in (1, 124) and result.codes[1] == -9
    assert re.search(r"most recent call (last|first)\):\n(.*\n)+.*train_ppo.py", result.log)


BAD = {
    "NaN loss": r"the loss of the policy is not finite \(rank 1\); no weights were changed",
    "NaN gradient": r"the gradient of the policy is not finite, or beyond --explosion_limit \(rank 1\); no weights",
    "NaN score": r"the score of response 2 of this step is not finite \(rank 1\)",  # its second prompt
}
NUMBERS = {"undisturbed": {"zero_stage": 2}}
for _fault in BAD:
    NUMBERS[_fault] = {"zero_stage": 2, "fault": _fault}
    NUMBERS[f"after {_fault}"] = {"zero_stage": 2, "out": _fault}
NUMBERS["collapse"] = {"zero_stage": 2, "lr": 1e-2, "alarm_kl": 1e-4, "on_collapse": "stop"}
NUMBERS["tolerated"] = {"zero_stage": 3, "fault": "NaN gradient", "skip_bad_batches": 1}
NUMBERS["tolerated, critic"] = {
    "zero_stage": 2, "offload_optimizer": True, "fault": "NaN critic gradient", "skip_bad_batches": 1
}  # fmt: skip


@pytest.fixture(scope="module")
def numbers(inputs, tmp_path_factory) -> dict[str, Result]:
    return run_cases(tmp_path_factory.mktemp("numbers"), inputs, NUMBERS)


@pytest.mark.parametrize("fault", BAD)
def test_bad_numbers_on_one_rank_stop_both_before_the_step(numbers, fault):
    result = numbers[fault]
    assert result.codes == [2, 2]
    for rank in (0, 1):
        where = r"step 2, batch in .*/bad_batches/step_2_1.safetensors"
        assert re.search(rf"error \[rank {rank}\]: {BAD[fault]}.*\[{where}\]", result.log), result.log
    assert "Traceback" not in result.log
    batch = load_file(result.out / "bad_batches" / "step_2_1.safetensors")
    assert batch["sequences"].shape == batch["attention_mask"].shape and len(batch["sequences"]) in (4, 8)


@pytest.mark.parametrize("fault", BAD)
def test_nothing_on_disk_has_changed_by_them(numbers, fault):
    """Without the fault the run goes on from before it, and no bit of it is another."""
    result = numbers[f"after {fault}"]
    assert result.codes == [0, 0]
    assert f"resuming from {result.out}/checkpoints/step_1" in result.log
    check_equal(result.out, numbers["undisturbed"].out)


def test_a_collapse_that_stops_both_ranks_leaves_the_checkpoint_that_was_being_written(numbers):
    result = numbers["collapse"]
    assert result.codes == [2, 2]
    assert "step 2 looks like a collapse: kl_ref" in result.log
    assert [path.name for path in (result.out / "checkpoints").iterdir()] == ["step_1"]


def test_an_explosion_in_a_supervised_stage_leaves_it_too(tmp_path):
    flags = {
        "hf_model_name_or_path": tiny_llama_folder(tmp_path / "base", **SIZES), "data_path": SAMPLES / "en/dialogues",
        "model_save_path": tmp_path / "run", "train_steps": 3, "warmup_steps": 1, "batch_size": 4, "lr": 10,
        "context_truncate": 128, "dtype": "fp32", "checkpoint_per_step": 1, "explosion_limit": 20,
    }  # fmt: skip
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    result = run_forked(tmp_path, {"sft": {"module": "sft.train", "argv": argv}})["sft"]
    assert result.codes == [2, 2]
    assert re.search("beyond --explosion_limit .* no step was made.*step 2, batch in", result.log), result.log[-3000:]
    assert [path.name for path in (result.out / "checkpoints").iterdir()] == ["step_1"]


@pytest.mark.parametrize(("case", "model"), [("tolerated", "policy"), ("tolerated, critic", "critic")])
def test_a_bad_minibatch_that_is_tolerated_is_left_out_on_both(numbers, case, model):
    """The faults compare the weights of policy and critic before and after it."""
    result = numbers[case]
    assert result.codes == [0, 0]
    assert f"the gradient of the {model} is not finite, or beyond --explosion_limit (rank 1); no weights" in result.log
    assert "1 of --skip_bad_batches 1" in result.log and "weights compared: the same" in result.log
    assert [row["bad_batches"] for row in read_metrics(result.out)] == [0, 1, 1]
    weights = load_file(result.out / "final" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def test_damage_is_known_to_both_ranks_whichever_looks_for_it(numbers, inputs, tmp_path):
    """Ranks share the hashing: the first of these files is rank 0's to check, the other rank 1's."""
    cases = {}
    for name in ("critic-rank0.safetensors", "critic-rank1.safetensors"):
        checkpoint = tmp_path / name / "step_3"
        shutil.copytree(numbers["undisturbed"].out / "checkpoints" / "step_3", checkpoint)
        content = bytearray((checkpoint / name).read_bytes())
        content[-100] ^= 1
        (checkpoint / name).write_bytes(content)
        cases[f"run {name}"] = {"zero_stage": 2, "resume": checkpoint}
    for name, result in run_cases(tmp_path, inputs, cases).items():
        assert result.codes == [2, 2]
        for rank in (0, 1):
            file = name.removeprefix("run ")
            assert re.search(rf"error \[rank {rank}\]: --resume .*{file} is not what was written", result.log)


def test_room_is_asked_for_what_all_ranks_write(numbers):
    """What the disk must have free before a save, which says it."""
    result = numbers["undisturbed"]
    asked = float(re.search(r"checkpoint of step 3: ([\d.]+) MB", result.log)[1])
    files = list((result.out / "checkpoints" / "step_3").glob("*.safetensors"))
    assert len(files) == 4
    assert asked == pytest.approx(sum(file.stat().st_size for file in files) / 1e6, rel=0.2)


LITTLE = {
    "empty on one rank, ZeRO-2": {"fault": "empty responses", "zero_stage": 2},
    "empty on one rank, ZeRO-3": {"fault": "empty responses", "zero_stage": 3, "gather_for_generation": "never"},
    "one prompt to evaluate": {"num_eval_prompts": 1, "zero_stage": 3, "gather_for_generation": "never"},
}


@pytest.fixture(scope="module")
def little(inputs, tmp_path_factory) -> dict[str, Result]:
    return run_cases(tmp_path_factory.mktemp("little"), inputs, LITTLE)


@pytest.mark.parametrize("case", LITTLE)
def test_a_rank_with_little_to_do_keeps_up(little, case):
    result = little[case]
    assert result.codes == [0, 0], result.log[-3000:]
    rows = read_metrics(result.out)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(value is not None for row in rows for value in row.values())
    if "empty" in case:
        assert all(row["eos_fraction"] <= 0.5 for row in rows)  # an empty response has not ended by itself
    else:
        assert all("eval_score_mean" in row for row in rows)
