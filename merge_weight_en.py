"""Rebuild the English 7B models (reward, SFT, policy) from LLaMA-7B and their published weight diffs.

  python merge_weight_en.py recover --model_type sft --path_raw models/llama-7b-hf \\
      --path_diff models/moss-rlhf-sft-model-7B-en/diff --path_tuned models/moss-rlhf-sft-model-7B-en/recover
  python merge_weight_en.py verify --path_tuned models/moss-rlhf-sft-model-7B-en/recover
  python merge_weight_en.py make_diff --model_type sft --path_raw BASE --path_tuned MY_MODEL --path_diff NEW_FOLDER

The base is LLaMA-7B in Hugging Face layout: safetensors or .bin, in any number of files, in float16, bfloat16 or
float32. The result is a folder of safetensors with config and tokenizer, which `--policy_model_path` and transformers
load. Recovery needs memory for one file (--max_shard_size) plus 1.5 GB, and 13.5 GB of disk for a 16-bit result. It
checks the published sum of all weights and, if the diff has a manifest (as those of make_diff), the SHA-256 of every
tensor. `COMMAND --help` lists the flags of a command.
"""

from utils.weight_diff.commands import run
from utils.weight_diff.published import Release

RELEASE = Release(
    base="LLaMA-7B in Hugging Face layout",
    totals={"reward": 50810.703125, "sft": 50874.84765625, "policy": None},  # no sum is published for the policy
    template="moss_en",
)

if __name__ == "__main__":
    run(RELEASE, __doc__)
