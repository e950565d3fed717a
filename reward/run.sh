#!/usr/bin/env bash
# A reward model from human preferences:    bash reward/run.sh [flags of reward.train, which win over those below]
# Its evaluation and plots follow:          $OUTPUT/evaluation
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
source utils/launch.sh

NUM_GPUS=${NUM_GPUS:-$(count_gpus)} # on each machine; 0: one process on the CPU
HOSTFILE=${HOSTFILE:-}              # list of machines, when there are several, in DeepSpeed's format: node1 slots=8
LAUNCHER=${LAUNCHER:-auto}          # own, deepspeed, torchrun, srun or none; auto: srun in a Slurm job, else own if needed

MODEL=${MODEL:-outputs/sft/final} # where it starts from: the SFT model, or a reward model with --reward_lm_loss_factor 0
TOKENIZER=${TOKENIZER:-$MODEL}
DATA=${DATA:-data/preference_data} # a folder with *train* and *valid* files, a file, or a hub id
OUTPUT=${OUTPUT:-outputs/reward}

answer_help '-m reward.train' "$@"
activate_repository_venv
OUTPUT=$(flag_value --model_save_path "$OUTPUT" "$@")
use_devices "$NUM_GPUS"
mkdir -p -- "$OUTPUT"

# One flag per line; the values are those of Part I and II for 7 billion parameters. `--help all` lists the rest.
ARGS=(
  --lang en # template for a tokenizer without a chat template: <s>Human:question</s>Assistant:answer</s>
  --hf_model_name_or_path "$MODEL"
  --tokenizer_name_or_path "$TOKENIZER"
  --data_path "$DATA"
  --model_save_path "$OUTPUT"
  --logdir "$OUTPUT/tensorboard"
  --seed 42

  # Length and batch sizes, over all GPUs together
  --train_steps 1000         # Part I: 1000
  --batch_size 32            # pairs per step at the mean length; a step takes 4 to 128, by their token count
  --warmup_steps 100         # of the learning rate; Part I: the first tenth
  --context_truncate 2048    # tokens of a dialogue; longer ones lose their oldest turns, the same for all answers to a prompt
  --micro_batch_tokens 8192  # tokens per forward pass on a GPU; changes speed and memory only

  # Optimizer
  --lr 5e-6                  # Part I: 5e-6
  --lr_schedule cosine       # to a tenth
  --gradient_clip 1.0

  # Loss
  --reward_lm_loss_factor 1.0 # weight of the language-model loss on the chosen answer; Part I: 1. Needs a model with an LM head
  --label_smoothing 0.0      # probability that a label is wrong
  --use_margin False         # True: subtract each pair's margin from its score difference (Part II)
  --flip_negative False      # True: swap pairs of negative preference strength (Part II), which python -m reward.strength measures
  --simcse_coef 0.0          # weight of the contrastive loss on pair differences; Part II: 1
  --simcse_dropout 0.1       # dropout that makes its two views of a pair
  --simcse_temperature 0.05

  # Saved model
  --center_scores True       # shift scores so that held-out chosen answers have mean 0
  --validation_metric accuracy # chooses best/; or loss, calibration_error, worst_subset_accuracy, ... (--help)
  --save_per_step 100        # steps between evaluations

  # Memory
  --zero_stage 2
  --gradient_checkpoint True # recompute activations: less memory, a third more time; auto: in as few layers as needed
  --offload_optimizer False  # True: keep optimizer state in host memory
)
launch "$OUTPUT/train.log" -m reward.train "${ARGS[@]}" "$@"

EVALUATION=(
  --model "$OUTPUT/best" # picked by --validation_metric
  --dtype "$(flag_value --dtype auto "$@")"
  --output "$OUTPUT/evaluation"
)
for flag in --data_path --split --valid_split --columns --prompt_template --preferred_by --reasoning \
  --lang --template --chat_template_kwargs --context_truncate; do # data and text are those of the training
  mapfile -d '' -t words < <(flag_words "$flag" "${ARGS[@]}" "$@")
  [[ $flag != --data_path ]] || words=("${words[@]/#-/./-}")
  ((${#words[@]} == 0)) || EVALUATION+=("$flag" "${words[@]}")
done
launch_one "$OUTPUT/evaluation.log" -m reward.evaluate "${EVALUATION[@]}"
