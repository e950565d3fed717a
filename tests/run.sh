#!/usr/bin/env bash
# Lint and the tests:   bash tests/run.sh [--all] [options for pytest]      --all: those marked slow, too
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source utils/setup.sh demo test
source utils/launch.sh

use_threads 2
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset PYTHONUNBUFFERED PYTHONDONTWRITEBYTECODE # some machines set them; most users do not, and both hide mistakes
ruff check .
ruff format --check .
# Two workers, a file at a time, the longest first; what a file's tests share is made once. Folders of what passed go
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15 -o tmp_path_retention_policy=failed \
  tests/{faults,cluster,distributed,vllm,trackers,end_to_end,security,bad_inputs,hostile,golden,unit} "$@"
