"""Flags of other PPO and fine-tuning libraries, and what they are called here."""

import difflib

# Our flags (the answer is the first that a command has): names in TRL, OpenRLHF, verl, transformers, DeepSpeed-Chat.
_TABLE = """
policy_model_path hf_model_name_or_path model: model_name_or_path model_name pretrain sft_model_path base_model
critic_model_path: critic_pretrain critic_model_name_or_path value_model_path
reward_model_path: reward_pretrain reward_model_name_or_path reward_model
reward_fn: reward_func reward_funcs remote_rm_url
reward_fn_weights: reward_weights
tokenizer_name_or_path: tokenizer_name tokenizer tokenizer_path
data_path: dataset_name dataset prompt_data train_file train_files data
model_save_path output: output_dir save_path save_dir
template: chat_template apply_chat_template
lr: learning_rate actor_learning_rate
critic_lr: critic_learning_rate
lr_schedule: lr_scheduler_type lr_scheduler
warmup_steps: warmup_ratio lr_warmup_steps num_warmup_steps lr_warmup_ratio
train_steps: num_train_epochs max_steps num_epochs epochs max_epochs num_episodes total_episodes total_training_steps
ppo_epochs: num_ppo_epochs
batch_size: per_device_train_batch_size train_batch_size micro_train_batch_size mini_batch_size ppo_mini_batch_size \
gradient_accumulation_steps num_mini_batches
maxlen_prompt context_truncate: max_length max_seq_length max_seq_len max_len cutoff_len prompt_max_len
maxlen_res: max_new_tokens response_length generate_max_len max_response_length max_completion_length
kl_penalty_weight: kl_coef init_kl_coef kl_ctl beta kl_loss_coef
pg_clip: cliprange clip_range eps_clip epsilon clip_ratio
value_clip: cliprange_value clip_range_value value_clip_range
vf_loss_weight: vf_coef value_loss_coef
entropy_loss_weight: ent_coef entropy_coef entropy_coeff entropy_loss_coef
lam: gae_lambda lambd
topp: top_p
gradient_clip: max_grad_norm max_norm clip_grad
gradient_checkpoint: gradient_checkpointing
dtype: bf16 fp16 torch_dtype precision
zero_stage: deepspeed deepspeed_config
lora_rank: lora_r peft_r use_peft use_lora finetuning_type
lora_target_modules: lora_target target_modules
attn_implementation: flash_attn use_flash_attention_2
save_per_step: eval_steps evaluation_strategy
checkpoint_per_step: save_steps save_freq
log_every: logging_steps log_interval
report_to: use_wandb log_with
project: wandb_project project_name tracker_project_name
run_name: wandb_run_name experiment_name exp_name
resume: resume_from_checkpoint load_checkpoint
"""
OURS = {ours: others.split() for ours, others in (line.split(": ") for line in _TABLE.strip().splitlines())}
NOTES = {
    "batch_size": ", in samples per optimizer step over all devices and accumulation steps together "
    "(--micro_batch_tokens limits the tokens per forward pass on each device)",
    "train_steps": ", which counts steps, not epochs or episodes",
    "warmup_steps": ", which counts steps",
    "maxlen_prompt": ", the tokens of prompt and response together",
    "zero_stage": " and --offload_optimizer; no DeepSpeed file is needed",
    "dtype": " bf16 or fp32; fp16 is not supported",
}
ABSENT = {
    "data_weights": "each weight follows its path: --data_path a 2 b 1",
    "weight_decay": "AdamW has no weight decay here",
    "trust_remote_code": "code from model folders is never run",
}


def explain_unknown(words: list[str], known: set[str]) -> str:
    """An error text for words that no flag of a command took. known: the command's flags, without dashes."""
    unknown = [word.split("=")[0] for word in words if word.startswith("--")]
    if not unknown:
        return f"{words[0]!r} belongs to no flag (see --help)"
    return "; ".join(f"{flag} is unknown{_advice(flag, known)}" for flag in unknown) + " (see --help)"


def _advice(flag: str, known: set[str]) -> str:
    name = flag.removeprefix("--").replace("-", "_")
    if name in known:
        return f"; use --{name}"
    if name.removeprefix("no_") in known:
        return f"; use --{name.removeprefix('no_')} false"
    for group, others in OURS.items():
        answer = next((ours for ours in group.split() if ours in known), None)
        if answer and name in others:
            return f"; use --{answer}{NOTES.get(answer, '')}"
    if name in ABSENT:
        return f": {ABSENT[name]}"
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean --{close[0]}?" if close else ""
