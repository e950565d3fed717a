#!/usr/bin/env bash
# Correctness and speed on a GPU, in minutes and without network; figures go to DIR/gpu.jsonl:
#   bash tests/gpu.sh [--out DIR] [--minutes 9] [--wheels DIR] [--only NAME ...] [--cpu]
# --wheels: packages that this machine lacks, gathered by tests/gpu_wheels.sh. --cpu: every check at toy sizes on the
# CPU, to try the script itself
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec python3 -m tests.gpu "$@"
