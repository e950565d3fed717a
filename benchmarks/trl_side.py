"""TRL's side of benchmarks/vs_trl.py, run by TRL's Python; waits for a message before each update.

usage: trl_side.py CONNECTION_FD SETTINGS; SETTINGS are the arguments of `main` as JSON
"""

import contextlib
import json
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection

import torch
from random_inputs import MODELS, random_classifier, random_lm, random_prompts  # this script's folder is on the path
from timing import peak, wait
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer


class Turns(TrainerCallback):
    """Makes the trainer wait before each update but the first; sends the seconds, and at the end the peak memory."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        wait()
        self.connection.send(time.perf_counter() - self.start)
        if self.connection.recv() == "step":
            self.start = time.perf_counter()
        else:
            self.connection.send((peak(), None))


def tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with special ids and left padding, which the trainer needs; no text is encoded."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=model, **special, padding_side="left")


def main(
    connection: Connection, model: str, samples: int, response: int, updates: int, checkpointing: bool, bf16: bool,
    dtype: str, batch: int, rollout_batch: int, cpu: bool,
) -> None:  # fmt: skip
    """Builds the trainer after the first message, and trains.

    The prompts are those of benchmarks/ppo_step.py; each update uses all of them. dtype: of trained models. batch,
    rollout_batch: samples per forward pass in the update, and in generation and scoring.
    """
    connection.recv()
    trained, frozen = getattr(torch, dtype), torch.bfloat16 if bf16 else torch.float32
    sizes, device = MODELS[model], torch.device("cpu" if cpu else "cuda")
    data = [{"input_ids": ids} for ids in random_prompts(samples)]
    with tempfile.TemporaryDirectory() as out:
        config = PPOConfig(
            output_dir=out, use_cpu=cpu, bf16=bf16, learning_rate=5e-7, total_episodes=samples * updates,
            per_device_train_batch_size=batch, gradient_accumulation_steps=samples // batch, num_ppo_epochs=1,
            local_rollout_forward_batch_size=rollout_batch,
            response_length=response, temperature=1.0, gradient_checkpointing=checkpointing,
            num_sample_generations=0, save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = PPOTrainer(
            config, tokenizer(), random_lm(sizes, trained, device), random_lm(sizes, frozen, device),
            random_classifier(sizes, frozen, device), data, random_classifier(sizes, trained, device),
            eval_dataset=data, callbacks=[Turns(connection)],
        )  # fmt: skip
        trainer.train()


if __name__ == "__main__":
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # the trainer prints its metrics
        main(Connection(int(sys.argv[1])), **json.loads(sys.argv[2]))
