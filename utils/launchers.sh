# Which launcher starts the ranks, and with which options. Sourced by utils/launch.sh.
# LAUNCHER: auto, own (utils/launcher.py), deepspeed, torchrun, srun, none (this process, or this task of srun)

# The shells of sbatch and salloc have SLURM_JOB_ID. What srun starts has SLURM_STEP_ID, too. salloc may run its shell as
# a step whose number is near 2^32.
in_allocation() { [[ -n ${SLURM_JOB_ID:-} && ${SLURM_STEP_ID:-} =~ ^(4294967[0-9]{3})?$ ]]; }

is_task() { [[ ${SLURM_STEP_NUM_TASKS:-1} != 1 && -z ${RANK:-} ]]; } # one of several, which become ranks (utils/slurm.py)

choose_launcher() { # $1: number of GPUs. Replaces auto in LAUNCHER. Stops with an error if the launcher cannot be used
  local problem=
  case ${LAUNCHER:=auto} in
    auto)
      LAUNCHER=none
      if is_task; then
        :
      elif [[ -n ${HOSTFILE:-} ]]; then
        LAUNCHER=own
      elif in_allocation; then
        LAUNCHER=srun
      elif (($1 > 1)); then
        LAUNCHER=own
      fi
      ;;
    own | none) ;;
    deepspeed | torchrun | srun)
      if ! command -v "$LAUNCHER" >/dev/null; then
        problem='it is not installed here; try LAUNCHER=auto'
      elif [[ $LAUNCHER == torchrun && ${NNODES:-1} != 1 && ( -z ${NODE_RANK:-} || -z ${MASTER_ADDR:-} ) ]]; then
        problem="NNODES=$NNODES needs NODE_RANK (0, 1, ...) and MASTER_ADDR (of machine 0) on each machine"
      fi
      ;;
    *) problem='set it to auto, own, deepspeed, torchrun, srun or none' ;;
  esac
  [[ -z $problem ]] || { printf 'error: LAUNCHER=%q: %s\n' "$LAUNCHER" "$problem" >&2 && exit 2; }
}

check_hosts() { # $1: number of GPUs. Stops with an error unless HOSTFILE is empty or can be used
  local problem=
  if [[ ! -f $HOSTFILE ]]; then
    problem="there is no such file; give a list of machines, one line such as 'node1 slots=8' for each"
  elif (($1 == 0)); then
    problem='NUM_GPUS is 0; set it to the number of GPUs of each machine, or leave HOSTFILE empty'
  elif [[ $LAUNCHER != own && $LAUNCHER != deepspeed ]]; then
    problem="LAUNCHER=$LAUNCHER does not read it; set LAUNCHER=own, or leave HOSTFILE empty"
  elif [[ $LAUNCHER == own ]] || command -v pdsh >/dev/null; then
    return 0
  elif (($(grep -c '^[^#[:space:]]' -- "$HOSTFILE") > 1)); then
    problem='DeepSpeed starts the other machines with pdsh, which is not installed here'
  fi
  [[ -z $problem ]] || { printf 'error: HOSTFILE=%q: %s\n' "$HOSTFILE" "$problem" >&2 && exit 2; }
}

tasks_per_node() { # $1: number of GPUs. Processes per machine; an allocation with several tasks per node keeps its layout
  local tasks=
  if [[ $LAUNCHER == none ]] && is_task; then
    tasks=$SLURM_STEP_TASKS_PER_NODE
  elif [[ $LAUNCHER == srun ]] && keeps_layout "$1"; then
    tasks=${SLURM_TASKS_PER_NODE:-1}
  else
    tasks=$(($1 > 1 ? $1 : 1))
  fi
  grep -oE '^[0-9]+' <<<"$tasks" # of the first node, in a list such as 8(x3),4
}

keeps_layout() { (($1 == 0 || ${SLURM_NTASKS:-1} > ${SLURM_NNODES:-1})); }

cpus_per_node() { # of the allocation's smallest node, or of this machine
  local cpus=${SLURM_JOB_CPUS_PER_NODE:-$(getconf _NPROCESSORS_ONLN)}
  tr , '\n' <<<"$cpus" | grep -oE '^[0-9]+' | sort -n | head -n 1
}

use_threads() { # $1: processes on this machine. Shares its cores out, unless OMP_NUM_THREADS is set already
  local cores
  cores=$(cpus_per_node)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}
}

set_launcher() { # Sets `launcher` of `launch`. With `alone`, it starts one process, on the first machine
  local tasks cpus
  tasks=$(tasks_per_node "$NUM_GPUS")
  cpus=$(cpus_per_node)
  case ${alone:+one-}$LAUNCHER in
    own) launcher=(python -m utils.launcher ${HOSTFILE:+--hostfile "$HOSTFILE"} "$tasks") ;;
    deepspeed)
      export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o ServerAliveInterval=15" # a lost machine ends it
      launcher=(deepspeed --num_gpus "$tasks" ${HOSTFILE:+--hostfile "$HOSTFILE"})
      launcher+=(${MASTER_PORT:+--master_port "$MASTER_PORT"})
      if [[ -z ${HOSTFILE:-} && -n ${CUDA_VISIBLE_DEVICES:-} ]]; then # which --num_gpus would ignore
        launcher[1]=--include launcher[2]=localhost:$(cut -d , -f "1-$tasks" <<<"$CUDA_VISIBLE_DEVICES")
      fi
      ;;
    torchrun)
      launcher=(torchrun --nproc_per_node "$tasks" --signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2)
      if [[ ${NNODES:-1} == 1 && -z ${MASTER_PORT:-} ]]; then
        launcher+=(--standalone) # on a free port
      else
        launcher+=(--nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-127.0.0.1}")
        launcher+=(--master_port "${MASTER_PORT:-29500}")
      fi
      # Seconds that ranks have after a signal. torch 2.13 reads it; torch 2.11 kills them after 30
      export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-86400}
      ;;
    srun | one-srun)
      # After a signal ranks end one by one, with codes such as 75: --kill-on-bad-exit=1 would kill the last ones
      launcher=(srun --export=ALL --input=none --kill-on-bad-exit=0 --wait=60)
      if [[ -n ${alone:-} ]]; then
        launcher+=(--nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task="$cpus")
      elif ! keeps_layout "$NUM_GPUS"; then
        launcher+=(--ntasks-per-node="$tasks" --ntasks="$((tasks * ${SLURM_NNODES:-1}))")
        launcher+=(--cpus-per-task="$((cpus > tasks ? cpus / tasks : 1))" --overcommit)
      elif [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
        launcher+=(--cpus-per-task="$SLURM_CPUS_PER_TASK") # which srun does not take from sbatch
      fi
      launcher+=(python)
      ;;
    one-none) launcher=(env -u SLURM_STEP_NUM_TASKS python) ;; # so that a task of srun is no rank
    *) launcher=(python) ;;
  esac
}

# DeepSpeed passes few variables on to other machines, but reads a file of more, which the shells there evaluate between
# double quotes. They show in its command line there, as with DeepSpeed alone; here the file is readable by its owner only.
write_deepspeed_env() { # Sets `env_file` of `launch`, and DS_ENV_FILE
  local name given=$DS_ENV_FILE
  env_file=$(mktemp)
  for name in $(compgen -e | grep -E "$FORWARDED" | grep -vxE 'DS_ENV_FILE|CUDA_VISIBLE_DEVICES'); do
    printf '%s=$(echo %s|base64 -d)\n' "$name" "$(printf %s "${!name}" | base64 -w 0)"
  done >"$env_file"
  grep -hE '^[^#]+=' -- ~/"$given" "$given" >>"$env_file" 2>/dev/null || true # the user's own ones win
  export DS_ENV_FILE=$env_file
}
FORWARDED='^((OMP|MKL|HF|TRANSFORMERS|TOKENIZERS|WANDB|SWANLAB|MLFLOW|DS|TORCH|TORCHINDUCTOR|PYTORCH|TRITON'
FORWARDED+='|CUDA|NCCL|GLOO|MALLOC|LC)_'
FORWARDED+='|(PATH|LD_LIBRARY_PATH|LANG|TMUX|STY)$)'
