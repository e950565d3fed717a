"""Rebuild the Chinese 7B reward model from LLaMA-7B and its published weight diff.

  python merge_weight_zh.py recover --path_raw models/llama-7b-hf \\
      --path_diff models/moss-rlhf-reward-model-7B-zh/diff --path_tuned models/moss-rlhf-reward-model-7B-zh/recover
  python merge_weight_zh.py verify --path_tuned models/moss-rlhf-reward-model-7B-zh/recover
  python merge_weight_zh.py make_diff --path_raw BASE --path_tuned MY_MODEL --path_diff NEW_FOLDER

The base is LLaMA-7B in Hugging Face layout: the model was trained from OpenChineseLLaMA, but the diff was made against
LLaMA-7B. See merge_weight_en.py --help for the rest. `COMMAND --help` lists the flags of a command.
"""

from utils.weight_diff.commands import run
from utils.weight_diff.published import Release

RELEASE = Release(
    base="LLaMA-7B in Hugging Face layout, not OpenChineseLLaMA",
    totals={"reward": 49954.0859375, "sft": None, "policy": None},  # only the sum of the reward model is published
    template="moss_zh",
    default_type="reward",
)

if __name__ == "__main__":
    run(RELEASE, __doc__)
