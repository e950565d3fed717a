#!/usr/bin/env bash
# A model that answers, from dialogues:     bash sft/run.sh [flags of sft.train, which win over those below]
# Next comes a reward model that starts from it: bash reward/run.sh
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source utils/launch.sh

NUM_GPUS=${NUM_GPUS:-$(count_gpus)} # on each machine; 0: one process on the CPU
HOSTFILE=${HOSTFILE:-}              # list of machines, when there are several, in DeepSpeed's format: node1 slots=8
LAUNCHER=${LAUNCHER:-auto}          # own, deepspeed, torchrun, srun or none; auto: srun in a Slurm job, else own if needed

MODEL=${MODEL:-models/llama-7b} # where it starts from: a Hugging Face folder or a hub id
TOKENIZER=${TOKENIZER:-$MODEL}
read -rd '' -a DATA <<<"${DATA:-data/sft_data}" || true # folders of *train* and *valid* files, files or hub ids; a number after each is its share: a 2 b 1
OUTPUT=$(flag_value --model_save_path "${OUTPUT:-outputs/sft}" "$@")

answer_help '-m sft.train' "$@"
activate_repository_venv
use_devices "$NUM_GPUS"
mkdir -p -- "$OUTPUT"

# One flag per line, with what the papers ("Secrets of RLHF in Large Language Models", Part I arXiv 2307.04964,
# Part II arXiv 2401.06080) say about it for 7 billion parameters. `python -m sft.train --help all` lists the rest.
ARGS=(
  --lang en # template for a tokenizer without a chat template: <s>Human:question</s>Assistant:answer</s>; zh: the Chinese one
  --hf_model_name_or_path "$MODEL"
  --tokenizer_name_or_path "$TOKENIZER"
  --data_path "${DATA[@]/#-/./-}"
  --model_save_path "$OUTPUT"
  --seed 42

  # Length and batch sizes, over all GPUs together
  --batch_size 1024          # dialogues per step; Part I: 1024, Part II: 32
  --train_steps 400          # Part I: 2 epochs, so 2 x dialogues / batch_size
  --warmup_steps 40          # of the learning rate; the papers give no number
  --context_truncate 2048    # tokens of a dialogue; longer ones lose their oldest turns
  --micro_batch_tokens 8192  # tokens per forward pass on a GPU; changes speed and memory only
  --packing True             # several dialogues per row, each attending to itself only; changes speed and memory only

  # Optimizer
  --lr 9.5e-6                # Part I: 9.5e-6, Part II: 2e-5
  --lr_schedule cosine       # to a tenth; Part I: the same
  --gradient_clip 1.0        # global norm

  # Memory
  --zero_stage 2
  --gradient_checkpoint True # recompute activations: less memory, a third more time; auto: in as few layers as needed
  --offload_optimizer False  # True: keep optimizer state in host memory

  # Evaluations
  --save_per_step 50         # steps between evaluations; the model with the lowest held-out loss is saved to best/
  --num_valid 100            # dialogues held out of each data set without a *valid* file
  --num_samples 4            # held-out prompts that are answered at each evaluation, for samples.jsonl
  --maxlen_res 256           # longest of these answers, in tokens
)
launch "$OUTPUT/train.log" -m sft.train "${ARGS[@]}" "$@"
