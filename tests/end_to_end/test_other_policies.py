"""Commands ask a policy of another kind than LLaMA's how it may be run, before anything is written."""

import pytest
import torch

import ppo.compare
import train_ppo
from ppo.models import load_models
from tests.architectures.configs import tiny_config
from tests.architectures.folders import save_folder
from tests.helpers.parts import ppo_config
from tests.helpers.tiny_run import read_metrics, run_flags
from utils.tokenizer import load_tokenizer


@pytest.fixture
def folder(tmp_path, inputs):
    """Of a tiny model of a family, with the policy's tokenizer."""

    def make(family: str, **changes) -> str:
        config = tiny_config(family)
        for name, value in changes.items():
            setattr(config, name, value)
        with torch.random.fork_rng():
            save_folder(config, tmp_path / family)
        return str(tmp_path / family)

    return make


def refusal(main, argv: list[str], capsys) -> str:
    """The one line of a command that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("family", ["mamba", "qwen3_next"])
def test_a_policy_that_cannot_be_decoded(family, folder, inputs, tmp_path, capsys):
    path, out = folder(family), tmp_path / "run"
    error = refusal(train_ppo.main, run_flags(inputs, out, policy_model_path=path), capsys)
    assert error.startswith(f"error: --policy_model_path {path}: ") and "ForCausalLM cannot be decoded" in error
    assert not out.exists()
    argv = ["--policies", path, path, "--data_path", str(inputs.prompts), "--reward_model_path", str(inputs.reward)]
    error = refusal(ppo.compare.main, [*argv, "--dtype", "fp32", "--maxlen_prompt", "80", "--maxlen_res", "8"], capsys)
    assert error.startswith(f"error: --policies {path}: ") and "ForCausalLM cannot be decoded" in error


def test_a_policy_that_draws_experts_in_training_begins_at_a_ratio_of_1(folder, inputs, tmp_path):
    path, out = folder("phimoe", router_jitter_noise=0.5), tmp_path / "run"
    flags = {"policy_model_path": path, "batch_size": 8, "gradient_checkpoint": True, "num_eval_prompts": 0}
    train_ppo.main(run_flags(inputs, out, train_steps=1, **flags))
    (row,) = read_metrics(out)
    assert row["ratio_mean"] == pytest.approx(1.0, abs=1e-5) and row["approx_kl"] < 1e-8


def test_a_policy_that_decodes_with_its_own_attention(single_process, folder, inputs):
    path, said = folder("falcon"), []
    flags = {"critic_model_path": str(inputs.reward), "reward_model_path": [str(inputs.reward)]}
    models = load_models(ppo_config(policy_model_path=path, **flags), load_tokenizer(path), said.append)
    assert models.policy.module.decoding == "own"
    assert sum("grouped decoding is left out" in line for line in said) == 1
