"""ppo.compare and evaluation with vLLM, and commands that vLLM refuses."""

import contextlib
import io
import json

import pytest

import ppo.compare
import train_ppo
from tests.helpers.tiny import tiny_llama_folder
from tests.helpers.tiny_run import SIZES, as_argv, read_lines, run_flags
from tests.vllm.jobs import run_jobs

COMMANDS = {"ppo": train_ppo.main, "compare": ppo.compare.main}


def run(command: str, argv: list[str]) -> list:
    """[exit code, standard error] of a command."""
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        try:
            COMMANDS[command](argv)
            return [0, ""]
        except SystemExit as stopped:
            return [stopped.code, shown.getvalue()]


@pytest.fixture(scope="module")
def folder(inputs, tmp_path_factory):
    """Has what the commands wrote with each engine, and `returned`: what `run` returned."""
    folder = tmp_path_factory.mktemp("compare")
    narrow = tiny_llama_folder(folder / "narrow", **SIZES)  # heads of 16
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    turned = tiny_llama_folder(folder / "turned", **SIZES | {"hidden_size": 64, "rope_parameters": rope})
    flags = {
        "data_path": inputs.prompts, "reward_model_path": inputs.reward, "dtype": "fp32", "maxlen_prompt": 80,
        "maxlen_res": 12, "rollout_batch_size": 256, "micro_batch_tokens": 80,
    }  # fmt: skip

    def compare(engine: str, name: str, after=inputs.other_policy, **changes) -> list[str]:
        changes |= {"policies": [inputs.policy, after], "rollout_engine": engine, "output": folder / f"{name}.json"}
        return as_argv(flags | changes)

    def train(engine: str, name: str, **changes) -> list[str]:
        changes = {"temperature": 0.9, "topp": 0.8, "repetition_penalty": 1.2} | changes
        return run_flags(inputs, folder / name, rollout_engine=engine, **changes)

    words = {
        "compare_own": ("compare", compare("own", "own")),
        "compare_vllm": ("compare", compare("vllm", "vllm")),
        "compare_limit": ("compare", compare("vllm", "limit", sampler_kl_limit=0)),
        "compare_turned": ("compare", compare("vllm", "turned", turned)),
        "ppo_own": ("ppo", train("own", "ppo_own")),
        "ppo_vllm": ("ppo", train("vllm", "ppo_vllm", rollout_cache_tokens=130)),
        "ppo_narrow": ("ppo", train("vllm", "ppo_narrow", policy_model_path=narrow)),
    }
    jobs = {name: (f"{__name__}:run", 1, *parts) for name, parts in words.items()}
    returned = {name: rows[0] for name, rows in run_jobs(folder, **jobs).items()}
    (folder / "returned").write_text(json.dumps(returned))
    return folder


@pytest.fixture
def returned(folder) -> dict[str, list]:
    return json.loads((folder / "returned").read_text())


def test_the_same_answers_as_with_own(folder, returned):
    """Of both policies, whose answers have nothing in common: a policy's weights never stay for the other's turn.

    vLLM is given more sequences than tokens per forward.
    """
    assert [returned[f"compare_{engine}"] for engine in ("own", "vllm")] == [[0, ""]] * 2
    own, vllm = (json.loads((folder / f"{name}.json").read_text()) for name in ("own", "vllm"))
    assert vllm["answers"] == own["answers"]
    assert all(row["answer"] != row["answer_after"] for row in own["answers"])
    for name, cells in own["table"].items():
        assert vllm["table"][name] == {column: pytest.approx(cell, abs=1e-4) for column, cell in cells.items()}, name


def test_policies_with_other_settings(folder, returned):
    """Their weights fit, so that only the numbers would be wrong."""
    code, shown = returned["compare_turned"]
    assert code == 2 and not (folder / "turned.json").exists()
    assert "rope_parameters" in shown and "5000" in shown and "pass --rollout_engine own" in shown


def test_a_gap_above_the_limit(folder, returned):
    """Of 0, which every rounding exceeds."""
    code, shown = returned["compare_limit"]
    assert code == 2 and "sampler_kl is " in shown and not (folder / "limit.json").exists()


def test_samples_and_evaluations_as_with_own(folder, returned):
    """With top-p and a repetition penalty, those of the flags and those of evaluations; a cache for one sequence."""
    assert [returned[f"ppo_{engine}"] for engine in ("own", "vllm")] == [[0, ""]] * 2
    own, vllm = (read_lines(folder / f"ppo_{engine}" / "samples.jsonl") for engine in ("own", "vllm"))
    assert sum(row.get("held_out", False) for row in own) == 6 < len(own)
    for row, other in zip(own, vllm, strict=True):
        assert {k: pytest.approx(x, abs=1e-4) if isinstance(x, float) else x for k, x in row.items()} == other


def test_heads_that_vllm_has_no_attention_for(folder, returned):
    """vLLM itself reports it at its first token."""
    code, shown = returned["ppo_narrow"]
    assert code == 2 and not (folder / "ppo_narrow").exists()
    [line] = (line for line in shown.splitlines() if line.startswith("error: "))
    assert line.startswith(
        f"error: --rollout_engine vllm: vLLM does not start with --policy_model_path {folder}/narrow"
    )
    assert "head_dim=16" in line and line.endswith("; pass --rollout_engine own")
