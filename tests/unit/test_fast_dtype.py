"""--dtype auto: bf16 where it is fast. What is measured agrees with what the CPU's kernels are known to have."""

import pytest
import torch

from tests.helpers.parts import ppo_config
from utils import fast_dtype as module
from utils.fast_dtype import fast_dtype
from utils.run.start import choose_dtype

CPU = torch.device("cpu")


def test_what_is_measured_is_what_the_cpu_has():
    threads = torch.get_num_threads()
    assert fast_dtype(CPU) == ("bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32")
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("times", "dtype"), [(80.0, "fp32"), (1.0, "bf16"), (0.25, "bf16")])
def test_bf16_is_taken_where_it_costs_no_more(monkeypatch, capsys, times, dtype):
    monkeypatch.setattr(module, "_seconds", lambda asked: times if asked == torch.bfloat16 else 1.0)
    assert fast_dtype(CPU) == dtype
    for asked, settled in (("auto", dtype), ("bf16", "bf16"), ("fp32", "fp32")):
        config = ppo_config(dtype=asked, zero_stage=2)
        choose_dtype(config)
        assert config.dtype == settled
        assert config.replaced_defaults.get("dtype") == ("auto" if asked == "auto" else None)
        assert ("warning" in capsys.readouterr().out) == (asked == "bf16" and dtype == "fp32")


def test_float32_without_zero():
    assert ppo_config(dtype="auto", zero_stage=0).dtype == "fp32"
