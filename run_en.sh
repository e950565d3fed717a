#!/usr/bin/env bash
# PPO-max on English dialogues:            bash run_en.sh [flags of train_ppo.py, which win over those below]
# See it work first, on any machine:        bash run_en.sh --demo [--seed N] [flags of train_ppo.py]
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
source utils/launch.sh

NUM_GPUS=${NUM_GPUS:-$(count_gpus)} # on each machine; 0: one process on the CPU
HOSTFILE=${HOSTFILE:-}              # list of machines, when there are several, in DeepSpeed's format: node1 slots=8
LAUNCHER=${LAUNCHER:-auto}          # own, deepspeed, torchrun, srun or none; auto: srun in a Slurm job, else own if needed

# Algorithm: ppo_max, vanilla (plain PPO), rloo, grpo, dr_grpo, dapo, reinforce_pp, vapo (docs/algorithms.md)
PRESET=${PRESET:-ppo_max}
POLICY_MODEL=${POLICY_MODEL:-models/moss-rlhf-sft-model-7B-en/recover}
# Scores the answers; with --reward_fn the function does, and a REWARD_MODEL only if one is set
REWARD_MODEL=${REWARD_MODEL:-$(has_flag --reward_fn "$@" || echo models/moss-rlhf-reward-model-7B-en/recover)}
CRITIC_MODEL=$(flag_value --critic_model_path "${CRITIC_MODEL:-$REWARD_MODEL}" "$@") # where the critic starts from
TOKENIZER=${TOKENIZER:-$POLICY_MODEL}
DATA=${DATA:-data/ppo_data} # a folder with *train* and *valid* files, a file, or a hub id
OUTPUT=${OUTPUT:-outputs/ppo_en}
LORA=${LORA:-0}                     # 1: train adapters instead of all weights, by LORA_ARGS below (docs/lora.md)

# Trains SmolLM2-135M-Instruct to give friendlier answers. A sentiment lexicon labels pairs of real replies, a reward
# model is trained on these labels, PPO uses the reward model only, and the table at the end has the scores of both.
demo() { # "$@" goes to train_ppo.py
  local seed cache=.demo/en output=${OUTPUT_DEMO:-outputs/demo_en} reward
  seed=$(flag_value --seed 1 "$@")
  reward=$cache/reward-seed$seed
  begin_demo "$output"

  echo "1 of 4: model, prompts and preferences"
  TQDM_DISABLE=1 python -m data.demo.english --out "$cache"

  local reward_args=(
    --hf_model_name_or_path "$cache/reward_base" # the lower third of the model's layers
    --data_path "$cache/preferences"
    --model_save_path "$reward"
    --seed "$seed"
    --dtype "$DTYPE"
    --lr 1e-4               # 5e-6 in the paper, for 7 billion parameters
    --train_steps 30        # 1000 in the paper
    --warmup_steps 3        # the first tenth
    --batch_size 24         # pairs
    --context_truncate 128  # tokens; the longest pair has about 80
    --micro_batch_tokens 1024
  )
  echo "2 of 4: the reward model learns which of two replies is the friendlier one (accuracy rises from 0.5)"
  run_once "$reward/final" "$output/reward.log" -m reward.train "${reward_args[@]}"

  local ppo_args=(
    --policy_model_path "$cache/model"
    --critic_model_path "$reward/final" # the reward model, and where the critic starts from
    --tokenizer_name_or_path "$cache/model"
    --data_path "$cache/prompts"
    --model_save_path "$output"
    --logdir "$output/tensorboard"
    --dtype "$DTYPE"
    --zero_stage 2
    --lr 6e-5
    --critic_lr 2e-4
    --train_steps 10
    --warmup_steps 2
    --lr_schedule cosine
    --critic_pretrain_steps 2
    --kl_penalty_weight 0.1
    --reward_clip 2
    --missing_eos_penalty 1 # or the answers grow until they are cut off
    --num_rollouts 32
    --batch_size 16
    --rollout_batch_size 32
    --micro_batch_tokens 512
    --maxlen_prompt 100 # of which 52 for the prompt
    --maxlen_res 48     # most answers end before
    --temperature 0.8   # as in evaluations; at 1 more answers of this small model are cut off
    --save_per_step 12 # steps between evaluations: one, at the end
    --num_eval_prompts 32
    --seed "$seed"
  )
  if [[ $LORA == 1 ]]; then
    ppo_args+=(--lora_rank 16 --export both --lr 6e-4)
  fi
  if [[ -d $output/final ]]; then
    ppo_args+=(--overwrite) # a finished run is made anew; one that was stopped goes on from its checkpoint
  fi
  echo "3 of 4: PPO; first the critic learns alone, then the score of the answers rises"
  launch "$output/ppo.log" train_ppo.py "${ppo_args[@]}" "$@"

  local compare_args=(
    --policies "$cache/model" "$output/final"
    --reward_model_path "$reward/final"
    --reward_fn data/demo/annotators.py:vader
    --data_path "$cache/prompts"
    --dtype "$DTYPE"
    --num_prompts 200
    --micro_batch_tokens 2048
    --maxlen_prompt 100
    --maxlen_res 48
    --output "$output/comparison.json"
  )
  echo "4 of 4: 200 held-out prompts, answered before and after training"
  launch "$output/compare.log" -m ppo.compare "${compare_args[@]}"
  end_demo "$output"
}

answer_help train_ppo.py "$@"
run_demo_if_asked "$@"

has_flag --plan "$@" || require_models en POLICY_MODEL ${REWARD_MODEL:+REWARD_MODEL} CRITIC_MODEL TOKENIZER DATA
activate_repository_venv
use_devices "$NUM_GPUS"
mkdir -p -- "$OUTPUT"

# One flag per line, with what it does and what the paper ("Secrets of RLHF in Large Language Models Part I", arXiv
# 2307.04964) says about it. `python train_ppo.py --help all` lists all flags, `--help reward_clip` explains one.
ARGS=(
  --preset "$PRESET" # ppo_max: with TRICKS below
  --lang en        # template for a tokenizer without a chat template: <s>Human:question</s>Assistant:
  --policy_model_path "$POLICY_MODEL"
  ${REWARD_MODEL:+--reward_model_path "$REWARD_MODEL"}
  --critic_model_path "$CRITIC_MODEL"
  --tokenizer_name_or_path "$TOKENIZER"
  --data_path "$DATA"
  --model_save_path "$OUTPUT"
  --seed 42        # of the order of prompts, the responses and new heads

  # Length and batch sizes, over all GPUs together
  --train_steps 1000          # steps, of one buffer of responses each; paper: 1000, stable up to 10,000
  --num_rollouts 128          # responses in a buffer; paper: 128
  --batch_size 32             # responses per optimizer step: four per buffer; paper: 32
  --ppo_epochs 1              # passes over each buffer
  --warmup_steps 100          # of the policy's learning rate (the critic is pre-trained); paper: the first tenth
  --maxlen_prompt 2048        # tokens of prompt and response together; longer prompts lose their oldest turns
  --maxlen_res 512            # longest response, in tokens
  --rollout_batch_size auto   # sequences decoded at once on a GPU: as many as fit (7B: 0.5 MB per token each); or a number
  --rollout_engine own        # or vllm, after source utils/setup.sh vllm
  --micro_batch_tokens 8192   # tokens per forward pass on a GPU; changes speed and memory only

  # Optimizer
  --lr 5e-7                   # of the policy; paper: 5e-7
  --critic_lr 1.65e-6         # paper: 1.65e-6
  --lr_schedule inverse_sqrt  # after the warm-up; or cosine, linear, constant

  # Sampling. At other values than 1 the responses are not samples of the distribution that is trained
  --temperature 1.0           # log-probabilities are computed at it too; default of the released code: 0.8
  --topp 1.0                  # the probability ratio ignores other values; default of the released code: 0.9
  --repetition_penalty 1.0    # the same; default of the released code: 1.1

  # Memory
  --zero_stage 2              # paper: ZeRO-2
  --gradient_checkpoint True  # recompute activations; paper: True; auto: in as few layers as memory allows
  --offload_optimizer False   # True: keep optimizer state in host memory
  --offload_frozen False      # True: keep reference and reward model in host memory (27 GB for 7B, over all GPUs)

  # Evaluations and checkpoints
  --save_per_step 100         # steps between evaluations on held-out prompts; the best model so far is saved to best/
  --num_eval_prompts 128      # held-out prompts per evaluation
  --checkpoint_per_step 50    # steps between checkpoints, from which a stopped run is resumed
)
# The tricks of PPO-max. With another preset these lines are left out.
TRICKS=(
  --critic_pretrain_steps 10  # steps that train only the critic first; paper: part of PPO-max, no number given
  --critic_init_scale 0.3     # standard deviation of its first values, as a share of the returns'; 0: as loaded
  --gradient_clip 1.0         # global norm, of policy and critic each; paper: part of PPO-max, not enough by itself

  # Score and KL penalty
  --use_reward_scaling True   # divide by the running standard deviation; paper: part of PPO-max
  --use_reward_norm True      # subtract the running mean; paper: part of PPO-max
  --use_reward_clip True      # clip the result to [-reward_clip, reward_clip]; paper: part of PPO-max
  --reward_clip 0.3           # in standard deviations; paper: 0.3 is stable, 0.8 collapses
  --missing_eos_penalty 0.0   # subtracted from the score of a response cut at --maxlen_res; paper: none
  --kl_penalty_weight 0.05    # weight of the KL to the reference per token; paper: 0.05, 0.1 and 0.2 are stable
  --kl_in reward              # subtract the KL from each token's reward; paper: reward
  --kl_estimator k1           # log ratio; paper: k1

  # Advantages
  --gamma 1.0                 # discount per token; 1: no discount
  --lam 0.95                  # lambda of GAE; paper: 0.9 in the figures, 0.95 in the released scripts; 0 and 1 are unstable
  --use_advantage_norm True   # mean 0 and variance 1 over the buffer
  --use_advantage_clip False  # paper: an alternative to clipping the score
  --advantage_clip 0.12       # for --use_advantage_clip; paper: 0.12 is stable

  # Losses
  --use_policy_loss_clip True # clip the probability ratio, as in any PPO
  --pg_clip 0.2               # to [1 - 0.2, 1 + 0.2]; paper: not enough by itself
  --use_critic_loss_clip True # clip values around the old ones; paper: part of PPO-max
  --value_clip 0.2            # largest change of a value
  --vf_loss_weight 1.0        # weight of the value loss
  --use_entropy_loss False    # entropy bonus; paper: collapses without --entropy_clip
  --entropy_loss_weight 0.01  # for --use_entropy_loss
  --entropy_clip 3.5          # entropy above which a token gets no bonus, in nats; 0: no limit
  --use_ppo_pretrain_loss False # True, with --ppo_pretrain_data_path: keeps language ability; paper: part of PPO-max
  --ppo_pretrain_loss_weight 0.5 # for --use_ppo_pretrain_loss; paper: no number given
)
if [[ $(flag_value --preset ppo_max "${ARGS[@]}" "$@") == ppo_max ]]; then
  ARGS+=("${TRICKS[@]}")
fi
# Added with LORA=1; they win over ARGS. Models that start from the same weights share them: see docs/lora.md for memory.
LORA_ARGS=(
  --lora_rank 16              # of the policy's adapters, in all linear layers
  --critic_lora_rank 16       # of the critic's
  --lora_alpha 32             # the adapters' output is multiplied by alpha / rank
  --lora_target_modules all-linear # or names of layers, such as q_proj v_proj
  --share_base auto           # models with the same weights hold them once; never: each its own
  --lr 5e-6                   # ten times that of ARGS; the critic keeps its rate
  --export merged             # best/ and final/ are whole models; adapter: adapters alone; both
)
if [[ $LORA == 1 ]]; then
  ARGS+=("${LORA_ARGS[@]}")
fi
say_scores "$@"
launch "$OUTPUT/train.log" train_ppo.py "${ARGS[@]}" "$@"
