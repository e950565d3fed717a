"""Compiles the kernels of ppo/decoding/ragged_attention.py for GPUs that need not be there; prints JSON lines.

python -m tests.helpers.compiled_kernels, without TRITON_INTERPRET, which makes no code.
"""

import json
import re

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ppo.decoding import ragged_attention

NUMBERS = {"scaling": "fp32", "columns": "i32", "heads": "i32", "shared": "i32", "splits": "i32"}
OTHERS = {"first": "*i32", "end": "*i32", "parts": "*fp32", "weights": "*fp32"}  # than of the weights' dtype


def compiled(name: str, capability: int, dtype: str = "bf16", **sizes: int) -> dict:
    """Compiles a kernel: bytes of shared memory, and how often tensor cores and asynchronous copies are used."""
    kernel = getattr(ragged_attention, name)
    types = {x: "constexpr" if x.isupper() else (NUMBERS | OTHERS).get(x, f"*{dtype}") for x in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(kernel.arg_names) if types[x][0] == "*"}
    source = ASTSource(kernel, types, {x: n for x, n in sizes.items() if x in types}, aligned)
    result = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 4})
    counts = {what: len(re.findall(what, result.asm["ptx"])) for what in ("mma.sync", "cp.async.c")}
    return {"kernel": name, "capability": capability, "shared": result.metadata.shared} | counts


if __name__ == "__main__":
    for capability in (80, 90):
        for name, group in (("_attend_alone", 1), ("_attend_group", 4)):
            sizes = {"GROUP": group, "PADDED": 16, "SIZE": 128, "BLOCK": ragged_attention._block(128, 2, group)}
            print(json.dumps(compiled(name, capability, **sizes)))
        print(json.dumps(compiled("_append_rotated", capability, SIZE=128)))
        print(json.dumps(compiled("_combine", capability, SPLITS=4, SIZE=128, BLOCK=32)))
