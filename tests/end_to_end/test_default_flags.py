"""Trainers with little more than their required flags, on data and windows that are smaller than the defaults."""

import json
import shutil

import pytest

import reward.train
import sft.train
import train_ppo
from tests.helpers.tiny_run import read_metrics, write_json
from utils.run.lock import LOCK

STEPS = ["--train_steps", "2", "--checkpoint_per_step", "1"]


def saved(run) -> dict:
    return json.loads((run / "config.json").read_text())


def test_ppo_then_its_config_json_and_its_resume(inputs, tmp_path, capfd):
    paths = ["--policy_model_path", str(inputs.policy), "--critic_model_path", str(inputs.reward)]
    paths += ["--data_path", str(inputs.prompts / "train.json")]
    run, copy = tmp_path / "run", tmp_path / "copy"
    argv = [*paths, *STEPS, "--critic_pretrain_steps", "0", "--model_save_path", str(run)]
    train_ppo.main(argv)
    lowered = {"maxlen_prompt": 2048, "maxlen_res": 512, "num_rollouts": 128, "batch_size": 32, "warmup_steps": 100}
    assert saved(run)["replaced_defaults"] == lowered | {"dtype": "auto"}
    assert [saved(run)[name] for name in lowered] == [512, 256, 10, 10, 0]
    said = capfd.readouterr().out
    assert all(f"--{name} {old}: " in said for name, old in lowered.items())
    assert "the default of 128 held-out records is lowered, as there are 11" in said

    train_ppo.main(["--config", str(run / "config.json"), "--model_save_path", str(copy)])
    assert read_metrics(copy) == read_metrics(run)

    with pytest.raises(SystemExit):
        train_ppo.main(argv)
    said = capfd.readouterr().err
    assert said.index("--resume_with_changes") < said.index("--overwrite")
    for again in (argv, ["--config", str(run / "config.json")]):
        shutil.rmtree(run / "final")
        train_ppo.main(again)
        assert f"resuming from {run}/checkpoints/step_2" in capfd.readouterr().out
    with pytest.raises(SystemExit):
        shutil.rmtree(run / "final")
        train_ppo.main([*argv, "--maxlen_res", "99"])
    assert "--maxlen_res 99 differs from" in capfd.readouterr().err


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_supervised_stages(inputs, tmp_path, capfd, stage):
    data = inputs.dialogues
    if stage == "reward":
        data = write_json(
            tmp_path / "pairs.json", [{"prompt": f"{i}?", "chosen": "a", "rejected": "b"} for i in range(9)]
        )
    main = {"sft": sft.train.main, "reward": reward.train.main}[stage]
    paths = ["--hf_model_name_or_path", str(inputs.policy), "--data_path", str(data)]
    main([*paths, *STEPS, "--model_save_path", str(tmp_path / "run")])
    assert not (tmp_path / "run" / LOCK).exists()
    flags = saved(tmp_path / "run")
    count = {"sft": 10, "reward": 8}[stage]
    assert [flags[name] for name in ("context_truncate", "batch_size", "warmup_steps")] == [512, count, 0]
    assert flags["dtype"] in ("bf16", "fp32")
    for name, value in (("context_truncate", 2048), ("batch_size", 32), ("num_valid", 100)):
        with pytest.raises(SystemExit):
            main([*paths, *STEPS, "--model_save_path", str(tmp_path / "other"), f"--{name}", str(value)])
        assert str(value) in capfd.readouterr().err
