"""The values of --preset: flags of `train_ppo.py` by the paper of each algorithm. No torch.

Flags win over a preset, a preset wins over the defaults, which are PPO-max. Sizes of models and buffers, learning rates
and lengths are not part of a preset, unless the algorithm needs them.
"""

_RAW_SCORES = {"use_reward_scaling": False, "use_reward_norm": False, "use_reward_clip": False}
_NO_CRITIC = {"critic_pretrain_steps": 0, **_RAW_SCORES}
_GROUPS = {**_NO_CRITIC, "use_advantage_norm": False, "num_responses_per_prompt": 8}
_GRPO = {**_GROUPS, "advantage_estimator": "grpo", "kl_in": "loss", "kl_estimator": "k3"}

PRESETS = {
    # Part I, §5.4.
    "ppo_max": {},
    # Plain PPO: clipped surrogate, GAE.
    "vanilla": {
        **_NO_CRITIC, "use_critic_loss_clip": False, "use_advantage_norm": False, "kl_penalty_weight": 0.0,
        "gradient_clip": 0.0,
    },
    # Ahmadian et al. 2024 (arXiv 2402.14740), §2.3 and appendix C: no ratio; the log-probability of a response is a sum
    # over its tokens; KL in the reward; β 0.03 for TL;DR (0.1 for HH); k 2 and 4.
    "rloo": {
        **_GROUPS, "advantage_estimator": "rloo", "num_responses_per_prompt": 4, "policy_ratio": "none",
        "loss_average": "constant", "kl_penalty_weight": 0.03,
    },
    # Shao et al. 2024 (arXiv 2402.03300), §4.2: β 0.04, 64 samples per question; here 8.
    "grpo": {**_GRPO, "kl_penalty_weight": 0.04, "loss_average": "sequence"},
    # Liu et al. 2025 (arXiv 2503.20783) and their code: neither deviation nor length divides; no KL; 8 responses.
    "dr_grpo": {**_GRPO, "advantage_estimator": "grpo_no_std", "kl_penalty_weight": 0.0, "loss_average": "constant"},
    # Yu et al. 2025 (arXiv 2503.14476), §2.3, §3 and §4.1: 16 responses, clip 0.2 and 0.28, no KL. Its overlong penalty
    # (over 4,096 of 20,480 tokens) depends on --maxlen_res, and is not part of the preset.
    "dapo": {
        **_GRPO, "num_responses_per_prompt": 16, "kl_penalty_weight": 0.0, "pg_clip_high": 0.28,
        "loss_average": "token", "drop_uniform_groups": True,
    },
    # Hu et al. 2025 (arXiv 2501.03262), §3.1: clipped ratio, KL (k1) in the reward; β: their code's default.
    "reinforce_pp": {**_NO_CRITIC, "advantage_estimator": "reinforce_pp", "kl_penalty_weight": 0.01},
    # Yue et al. 2025 (arXiv 2504.05118), §5.1: 50 steps of value pre-training, decoupled and length-adaptive GAE,
    # clip-higher, 16 responses. Their loss on correct answers (weight 0.1) is not implemented.
    "vapo": {
        **_RAW_SCORES, "advantage_estimator": "length_adaptive_gae", "critic_lam": 1.0, "length_alpha": 0.05,
        "critic_pretrain_steps": 50, "pg_clip_high": 0.28, "kl_penalty_weight": 0.0, "use_critic_loss_clip": False,
        "num_responses_per_prompt": 16,
    },
}  # fmt: skip
