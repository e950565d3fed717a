"""vLLM that is missing or of another version, what its errors become, and the size of its cache. Needs no vLLM."""

import importlib.metadata
import sys
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

import ppo.compare
import train_ppo
from ppo.vllm_sampler import _cache, _reason
from tests.helpers.tiny_run import as_argv, refusal

COMMANDS = {
    "ppo": (train_ppo.main, {"policy_model_path": "a", "critic_model_path": "b", "data_path": "c"}),
    "compare": (ppo.compare.main, {"policies": ["a", "b"], "data_path": "c", "reward_model_path": "d"}),
}
KEEPS = "source utils/setup.sh vllm, or pass --rollout_engine own"


@pytest.fixture(params=COMMANDS)
def refused(request, tmp_path, capfd):
    """Runs a command with vLLM, and returns its error. It must not leave a folder."""

    def run() -> str:
        main, flags = COMMANDS[request.param]
        folder = {"model_save_path": tmp_path / "out"} if request.param == "ppo" else {}
        line = refusal(main, as_argv(flags | folder | {"rollout_engine": "vllm", "dtype": "fp32"}), capfd)
        assert not (tmp_path / "out").exists()
        return line

    return run


def test_vllm_is_not_installed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert refused() == f"error: --rollout_engine vllm: vLLM is not installed; run {KEEPS}"


def test_vllm_of_another_version(refused, monkeypatch, tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise AssertionError")
    (tmp_path / "vllm-0.33.1.dist-info").mkdir()
    (tmp_path / "vllm-0.33.1.dist-info" / "METADATA").write_text("Name: vllm\nVersion: 0.33.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.metadata.version("vllm") == "0.33.1"
    assert refused() == f"error: --rollout_engine vllm: vLLM 0.33.1 is installed, not 0.32.x; run {KEEPS}"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("Unsupported head_dim=16\nmore", "Unsupported head_dim=16"),
        ("1 validation error for X\n  Value error, no group_size [type=value_error, input=1]\n  See", "no group_size"),
        ("Free memory (1/2 GiB) is less than desired. Decrease it.", "Free memory (1/2 GiB) is less than desired"),
        ("1.8 GiB is needed (of 1.0). Based on it, the length is 9. Try x.", "1.8 GiB is needed (of 1.0)"),
        ("['X'] are not supported. Supported: Y, Z", "['X'] are not supported"),
        ("", "ValueError"),
    ],
)  # fmt: skip
def test_reason(error, reason):
    assert _reason(ValueError(error)) == reason


@pytest.mark.parametrize(
    ("maxlen", "slots", "cache_tokens", "tokens"),
    [
        (80, 3, 0, 4 * 128),  # blocks of 128 tokens: one per sequence, and one that vLLM keeps
        (129, 3, 0, 7 * 128),
        (129, 3, 600, 5 * 128),  # two sequences of 256 tokens
        (129, 3, 100, 3 * 128),  # never less than one sequence
        (128, 1 << 40, 0, 65 * 128),  # 64 of 65,536 bytes in a quarter of the free host memory
    ],
)
def test_size_of_the_cache(maxlen, slots, cache_tokens, tokens, monkeypatch):
    """Two layers with one head of 32: keys and values take 2 x 2 x 32 x 4 = 512 bytes per token in float32."""
    monkeypatch.setattr("ppo.vllm_sampler.free_host_memory", lambda: 1 << 24)
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    config = SimpleNamespace(
        maxlen_prompt=maxlen, rollout_cache_tokens=cache_tokens, dtype="fp32", vllm_tensor_parallel_size=2
    )
    assert _cache(config, LlamaConfig(**heads), slots) == tokens * 512
