"""A run with vLLM that ends if it asks another machine:   python -m tests.vllm.watched [flags of train_ppo.py]

Afterwards it prints whether vLLM on a GPU would report its use, and whether it would get kernels from NVIDIA's server.
"""

import importlib
import json
import sys

import tests.security.tiny_jobs  # noqa: F401 - its hook ends this process
from train_ppo import main

if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1:])
    importlib.import_module("ppo.decoding.vllm_engine")  # first, for its settings
    from vllm.usage.usage_lib import is_usage_stats_enabled
    from vllm.utils.flashinfer import has_nvidia_artifactory

    print(json.dumps({"reports": is_usage_stats_enabled(), "downloads": has_nvidia_artifactory()}))
