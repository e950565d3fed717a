"""Everything that imports deepspeed, which probes for accelerators when it is imported."""

import os

from utils.device import on_gpu

if not on_gpu():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
