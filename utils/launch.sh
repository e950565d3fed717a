# What the recipes share: settings, processes and their signals, the frame of the demos. Sourced, not run.

source "${BASH_SOURCE[0]%/*}/launchers.sh"
umask o-w # nothing that is written may be changed by everyone
SIGNALS=(INT TERM HUP USR1 USR2) # on which a run saves and ends
if [[ -p /dev/stdout ]]; then # the script goes on when nobody reads its output any more (`| head`)
  exec > >(trap '' "${SIGNALS[@]}" && exec tee -p /dev/null)
fi

require_number() { # names of variables. Stops with an error unless each is unset, empty or a number (08 becomes 8)
  local name
  for name in "$@"; do
    [[ -n ${!name:-} ]] || continue
    if [[ ! ${!name} =~ ^[0-9]{1,9}$ ]]; then # in arithmetic, bash would run what is in it
      printf 'error: %s=%q: not a number; set it to one such as 8, or unset it\n' "$name" "${!name}" >&2
      exit 2
    fi
    printf -v "$name" %d "$((10#${!name}))"
  done
}

check_settings() { # checks numbers; puts ./ in front of paths that look like flags
  local name
  require_number NUM_GPUS MASTER_PORT NNODES NODE_RANK SLURM_NTASKS SLURM_NNODES SLURM_PROCID
  [[ ${OMP_NUM_THREADS:-} == *,* ]] || require_number OMP_NUM_THREADS # a list is one number per level of nesting
  for name in HOSTFILE POLICY_MODEL REWARD_MODEL CRITIC_MODEL TOKENIZER MODEL DATA OUTPUT OUTPUT_DEMO; do
    [[ ${!name:-} != -* ]] || printf -v "$name" %s "./${!name}"
  done
}
check_settings

count_gpus() { # of CUDA_VISIBLE_DEVICES where it is set (numbers, or UUIDs of GPUs and MIG slices); else of the machine
  local all entries entry count=0
  all=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}} # such as 8 or a100:8; this machine may have none
  if in_allocation; then
    if [[ -z $all && ${LAUNCHER:-auto} =~ ^(auto|srun)$ ]]; then
      all=$(ask_nodes) || exit
    fi
    if [[ ${all##*:} =~ ^[0-9]+$ ]]; then
      echo "${all##*:}"
      return
    fi
  fi
  all=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true) # 0 without nvidia-smi
  if ((all == 0)) || [[ -z ${CUDA_VISIBLE_DEVICES+set} ]]; then
    echo "$all"
    return
  fi
  read -ra entries <<<"${CUDA_VISIBLE_DEVICES//,/ }"
  for entry in ${entries[@]+"${entries[@]}"}; do # as CUDA reads it: up to the first that is no GPU of this machine
    [[ $entry =~ ^(GPU|MIG)- ]] || { [[ $entry =~ ^[0-9]{1,9}$ ]] && ((10#$entry < all)); } || break
    count=$((count + 1))
  done
  echo "$count"
}

ask_nodes() { # how many GPUs a process of srun has, on the node with the fewest: salloc tells its shell only for some flags
  local all
  # shellcheck disable=SC2016
  all=$(srun --ntasks="${SLURM_NNODES:-1}" --ntasks-per-node=1 --input=none bash -c \
    'echo "${SLURM_GPUS_ON_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c "^GPU")}"' | sort -n | head -n 1)
  if [[ ! $all =~ ^[0-9]+$ ]]; then
    echo 'error: NUM_GPUS: srun does not tell it; set it to the number of GPUs of each node, or 0 for the CPU' >&2
    exit 2
  fi
  echo "$all"
}

use_devices() { # $1: number of GPUs; without any, DeepSpeed is told to use the CPU
  check_settings # again: flags have changed some
  choose_launcher "$1"
  [[ -z ${HOSTFILE:-} ]] || check_hosts "$1"
  if (($1 == 0)); then
    export DS_ACCELERATOR=cpu
    # Keep freed memory, for all threads alike: giving tensors back to the system and taking them again costs 15 to 35 %
    # of a step. With one arena per thread, large ones would go back all the same, or leave holes
    export MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=67108864
  fi
  use_threads "$(tasks_per_node "$1")"
}

activate_repository_venv() { # the .venv that utils/setup.sh made, unless an environment is active
  if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -f .venv/bin/activate ]]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
  fi
}

pass_on() { # $1: a signal's name. Sends it to the run that `launch` has started, or keeps it until there is one
  local before=$told
  heard=yes
  [[ $1 != HUP || ${hangup,,} =~ ^(stop|no|false|f|n|0)$ ]] || return 0 # --ignore_hangup, which only ranks know
  pending=$1
  if [[ -n $process ]]; then
    pending='' told=yes # before the signal is sent: the next one may interrupt this function
    case ${launcher[0]}-$1-$before in
      deepspeed-INT-*) ;;
      deepspeed-*) set -- TERM ;;  # the others would end DeepSpeed's launcher at once
      srun-INT-yes) set -- TERM ;; # upon which srun kills the ranks, at once
      srun-*) set -- USR1 ;;       # the only one that it passes on to them
    esac
    kill -s "$1" "$process" 2>/dev/null || true
  fi
}

launch() { # $1: log file; then what python is to run, with its flags. LAUNCHER, NUM_GPUS and HOSTFILE say where
  local log=$1 launcher process='' pending='' told='' heard code output tee name hangup=stop env_file=''
  local DS_ENV_FILE=${DS_ENV_FILE:-.deepspeed_env}
  shift
  choose_launcher "$NUM_GPUS"
  set_launcher
  if [[ ${launcher[0]} =~ ^(deepspeed|torchrun|srun)$ ]]; then
    hangup=$(flag_value --ignore_hangup auto "$@")
    [[ $hangup != auto ]] || hangup=${TMUX:-${STY:-stop}}
  fi
  if [[ ${launcher[0]} == deepspeed ]]; then
    if [[ -n ${HOSTFILE:-} ]]; then
      write_deepspeed_env
      launcher+=(--log_level warning) # else it writes all variables into the log
    fi
    if [[ $1 == -m ]]; then # python's flag; the launcher's is longer
      shift
      launcher+=(--module)
    fi
  fi
  # The run is a job of its own, to which this script passes signals once, then waits until it has saved and ended. tee
  # ignores them, so that the run's last lines are shown and kept; -p: it writes the log when nobody reads its output
  for name in "${SIGNALS[@]}"; do
    # shellcheck disable=SC2064
    trap "pass_on $name" "$name"
  done
  exec {output}> >(trap '' "${SIGNALS[@]}" && exec tee -p -a -- "$log")
  tee=$!
  set -m
  "${launcher[@]}" "$@" </dev/null >&"$output" 2>&1 {output}>&- &
  process=$!
  set +m
  exec {output}>&-
  if [[ -n $pending ]]; then
    pass_on "$pending"
  fi
  while heard='' code=0 && { wait "$process" || code=$?; } && [[ -n $heard ]]; do :; done # a signal ends `wait`
  while kill -0 "$tee" 2>/dev/null; do wait "$tee" || true; done
  trap - "${SIGNALS[@]}"
  [[ -z $env_file ]] || rm -f -- "$env_file"
  return "$code"
}

launch_one() { # as `launch`, but one process. It does nothing in a task of srun, or on a machine, that is not the first
  ! is_task || ((SLURM_PROCID == 0)) || return 0
  [[ $LAUNCHER != torchrun ]] || ((${NODE_RANK:-0} == 0)) || return 0
  alone=yes launch "$@"
}

recover_command() { # $1: en or zh; $2: where the whole model belongs; $3: sft or reward
  echo "  python merge_weight_$1.py recover --path_raw LLAMA --path_diff $(dirname "$2")/diff --path_tuned $2 --model_type $3"
}

is_there() { # $1: a local path, or a hub id (owner/name, where owner is no folder here)
  [[ -e $1 ]] || [[ $1 =~ ^[[:alnum:]][[:alnum:]._-]*/[[:alnum:]][[:alnum:]._-]*$ && ! -e ${1%%/*} ]]
}

require_models() { # $1: en or zh; then names of variables. Stops with an error unless the paths in them exist
  local language=$1 name missing=() recover=() type
  shift
  for name in "$@"; do
    is_there "${!name}" && continue
    [[ $name != DATA ]] || ! is_there "${!name%%[:@]*}" || continue # owner/name:config@split
    missing+=("  $name=${!name:- (with --reward_fn alone: give the model from which the critic starts)}")
    for type in sft reward; do # of the default paths, whose models are published as differences to LLaMA's weights
      if [[ $name == [PR]* && ${!name} == "models/moss-rlhf-$type-model-7B-$language/recover" ]]; then
        recover+=("$(recover_command "$language" "${!name}" "$type")")
      fi
    done
  done
  ((${#missing[@]})) || return 0
  {
    echo "error: these paths do not exist (set the variables, or edit the top of run_$language.sh):"
    printf '%s\n' "${missing[@]}"
    if ((${#recover[@]})); then
      echo "The published models are differences to LLaMA's weights. Put them into the folder diff of each, then run"
      printf '%s\n' "${recover[@]}"
    fi
    echo "To try the toolkit without any of these, run the demo, which trains small models:"
    echo "  bash run_$language.sh --demo"
  } >&2
  exit 1
}

begin_demo() { # $1: output folder. One process, on the first GPU if there is one; nothing is fetched from a hub.
  # Sets DTYPE, of all models
  # shellcheck disable=SC1091
  source utils/setup.sh demo
  ! is_task || ((SLURM_PROCID == 0)) || exit 0
  unset SLURM_STEP_NUM_TASKS # a task of srun is no rank here
  LAUNCHER=none HOSTFILE=''
  use_devices "$((NUM_GPUS > 0))"
  export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
  DTYPE=$(python -m utils.fast_dtype)
  if [[ $DTYPE == fp32 ]]; then
    echo "This machine has no arithmetic for bf16: the demo runs in fp32, which takes about twice as long."
  fi
  mkdir -p -- "$1"
}

run_once() { # $1: folder that the stage ends with; $2: log file; then as for launch
  local finished=$1
  shift
  if [[ -d $finished ]]; then
    echo "$finished: ready, kept from an earlier run"
  else
    launch "$@"
  fi
}

end_demo() { # $1: output folder
  python -m ppo.report "$1"
  printf 'talk to the model: python -m ppo.chat --model %q\n' "$1/final"
}

has_flag() { # $1: flag; then a command line. Whether the flag is there
  local flag=$1 word
  shift
  for word in "$@"; do
    [[ $word != "$flag" && $word != "$flag="* ]] || return 0
  done
  return 1
}

run_demo_if_asked() { # "$@": a command line. With --demo in it, calls the script's `demo` with the other words, and exits
  local word words=()
  has_flag --demo "$@" || return 0
  for word in "$@"; do
    [[ $word == --demo ]] || words+=("$word")
  done
  demo "${words[@]}"
  exit
}

say_scores() { # "$@": flags of train_ppo.py. With --reward_fn among them, prints what gives the scores
  local functions
  has_flag --reward_fn "$@" || return 0
  mapfile -d '' -t functions < <(flag_words --reward_fn "$@")
  echo "scores: --reward_fn ${functions[*]}${REWARD_MODEL:+, added to those of $REWARD_MODEL}"
}

answer_help() { # $1: what python is to run; then flags. With --help among them, prints the command's help and stops
  local command
  read -ra command <<<"$1"
  shift
  if has_flag --help "$@" || has_flag -h "$@"; then
    activate_repository_venv
    exec python "${command[@]}" "$@"
  fi
}

flag_words() { # $1: flag; then a command line. Prints all words of the flag's last occurrence there, each with a null byte
  local flag=$1 word inside='' words=()
  shift
  for word in "$@"; do
    case $word in
      "$flag") inside=yes words=() ;;
      "$flag="*) inside='' words=("${word#*=}") ;;
      --*) inside='' ;;
      *) [[ -z $inside ]] || words+=("$word") ;;
    esac
  done
  ((${#words[@]} == 0)) || printf '%s\0' "${words[@]}"
}

flag_value() { # $1: flag; $2: default; then a command line. Prints the flag's last value there
  local flag=$1 value=$2
  shift 2
  while (($#)); do
    case $1 in
      "$flag") value=${2:-} ;;
      "$flag="*) value=${1#*=} ;;
    esac
    shift
  done
  printf '%s' "$value"
}
