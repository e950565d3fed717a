"""Runs that are killed, and runs whose disk (of 64 MiB) is full, go on as if nothing had been."""

import re
import subprocess

import pytest
import torch

from tests.faults.kill import KINDS, kill_and_compare
from tests.faults.scenarios import finished, run_cases, run_forked
from tests.helpers.tiny import SAMPLES, tiny_llama_folder
from tests.helpers.tiny_run import SIZES, assert_same_run, final_weights, fit_flags, read_metrics

STEPS = {"train_steps": 5, "ranks": 1, "zero_stage": 0}


@pytest.mark.parametrize(
    ("kind", "phases"),
    zip(
        KINDS,
        [
            ("scoring", "update", "rollback", "export of final/"),
            ("rollout", "saving", "evaluation", "export of best/"),
        ],
        strict=True,
    ),
)
def test_runs_that_are_killed(inputs, tmp_path, kind, phases):
    """The short form of tests/faults/kill.py."""
    kill_and_compare(inputs, tmp_path, kind, len(phases), seed=1, phases=phases)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs: run it as root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_runs_full(inputs, disk, tmp_path):
    in_save, full = "disk fills in a save", "disk is full"
    undisturbed = finished(run_cases(tmp_path, inputs, {"undisturbed": STEPS}))["undisturbed"]
    result = run_cases(tmp_path, inputs, {in_save: STEPS | {"fault": in_save}}, disk)[in_save]
    finished({in_save: result})
    assert re.search("checkpoint of step 2 was not saved: .*No space left.*older ones are intact", result.log)
    assert re.search("checkpoint of step 3 was not saved: it needs .* MB free", result.log)
    assert sorted(path.name for path in (result.out / "checkpoints").iterdir()) == ["step_1", "step_4", "step_5"]
    assert_same_run(result.out, undisturbed)

    result = run_cases(tmp_path, inputs, {full: STEPS | {"fault": full}}, disk)[full]
    assert result.codes == [2] and "Traceback" not in result.log, result.log[-3000:]
    assert re.search("error: .* cannot be written: No space left on device", result.log)
    (disk / "filler").unlink()
    after = run_cases(tmp_path, inputs, {"after": STEPS | {"out": full}}, disk)
    assert "resuming from" in after["after"].log
    assert_same_run(finished(after)["after"], undisturbed)


MODELS = {"save_per_step": 1, "num_eval_prompts": 2, "checkpoint_per_step": 9, "zero_stage": 2, "train_steps": 3}


@pytest.mark.slow
def test_a_disk_that_is_full_when_a_model_is_written(inputs, disk, tmp_path):
    """best/ stays as it was, and the run goes on; without room for final/ it ends, on both ranks."""
    cases = {"whole": MODELS, "best": MODELS | {"fault": "disk fills in export 2"}}
    cases["final"] = MODELS | {"fault": "disk fills in export 3"}
    results = run_cases(tmp_path, inputs, cases, disk)
    assert results["best"].codes == [0, 0] == results["whole"].codes, results["best"].log[-3000:]
    rows = [row["eval_score_mean"] for row in read_metrics(results["whole"].out)]
    assert rows[1] < rows[0] < rows[2]  # the second export is that of step 3
    assert re.search("warning: best/ of step 3 was not saved: .*/best cannot be written: ", results["best"].log)
    assert_same_run(results["best"].out, results["whole"].out)
    weights = [final_weights(results[name].out, "best")["lm_head.weight"] for name in ("final", "best", "whole")]
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[1], weights[2])
    assert results["final"].codes == [2, 2] and "Traceback" not in results["final"].log
    assert len(re.findall(r"error .rank 0.: .*/final cannot be written", results["final"].log)) == 1
    assert not list(disk.rglob("*.partial")) and not (results["final"].out / "final").exists()

    base = tiny_llama_folder(tmp_path / "base", **SIZES)
    flags = {"save_per_step": 1, "num_valid": 2, "checkpoint_per_step": 9}
    argv = fit_flags(base, SAMPLES / "en/dialogues", disk / "sft", **flags)
    row = {"module": "sft.train", "argv": argv, "ranks": 1, "fault": "disk fills in export 2"}
    result = run_forked(tmp_path, {"sft": row})["sft"]
    assert result.codes == [0] and (result.out / "best" / "config.json").exists(), result.log[-3000:]
    assert re.search(r"warning: step 2: best eval_loss so far, but not saved: .*/best cannot be written", result.log)
    assert re.search(r"step 3: best eval_loss so far, saved to", result.log)
