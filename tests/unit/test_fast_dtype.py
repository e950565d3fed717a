"""bf16 where it is fast: what is measured agrees with what the CPU's kernels are known to have."""

import pytest
import torch

from utils import fast_dtype as module
from utils.fast_dtype import fast_dtype, warn_of_slow_dtype

CPU = torch.device("cpu")


def test_what_is_measured_is_what_the_cpu_has():
    threads = torch.get_num_threads()
    assert fast_dtype(CPU) == ("bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32")
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("times", "dtype"), [(80.0, "fp32"), (1.0, "bf16"), (0.25, "bf16")])
def test_bf16_is_taken_where_it_costs_no_more(monkeypatch, times, dtype):
    monkeypatch.setattr(module, "_seconds", lambda asked: times if asked == torch.bfloat16 else 1.0)
    assert fast_dtype(CPU) == dtype
    said = []
    warn_of_slow_dtype("fp32", CPU, said.append)
    assert not said
    warn_of_slow_dtype("bf16", CPU, said.append)
    assert len(said) == (dtype == "fp32")
