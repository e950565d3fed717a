#!/usr/bin/env bash
# Correctness and speed on a GPU, in minutes and without network; figures go to DIR/gpu.jsonl:
#   bash tests/gpu.sh [--out DIR] [--minutes 9] [--wheels DIR] [--only NAME ...] [--demo DIR] [--cpu]
# --wheels: packages that this machine lacks, gathered by tests/gpu_wheels.sh. --demo: the folder .demo/en that
# `bash run_en.sh --demo` makes. --cpu: every check at toy sizes on the CPU, to try the script itself
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec python3 -m tests.gpu "$@"
