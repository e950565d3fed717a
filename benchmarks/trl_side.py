"""TRL's side of benchmarks/vs_trl.py, run by TRL's own Python: waits before every update for a message to make it.

usage: trl_side.py CONNECTION_FD MODEL_FOLDER UPDATES CHECKPOINTING(0, 1) bf16|fp32 DTYPE BATCH
"""

import contextlib
import os
import sys
import tempfile
import time
from multiprocessing.connection import Connection

import torch
from datasets import Dataset
from timing import peak, wait  # this file's folder is on the path of a script
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

SAMPLES, RESPONSE = 8, 64


class Turns(TrainerCallback):
    """Makes the trainer wait for its turn; tells how long an update took, and at the end the peak of memory."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def on_train_begin(self, args, state, control, **kwargs):
        self._wait()

    def on_step_end(self, args, state, control, **kwargs):
        wait()
        self.connection.send(time.perf_counter() - self.start)
        self._wait()

    def _wait(self) -> None:
        if self.connection.recv() == "step":
            self.start = time.perf_counter()
        else:
            self.connection.send((peak(), None))


def tokenizer() -> PreTrainedTokenizerFast:
    """What the trainer asks for: special ids, and padding on the left. No text is ever encoded."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    model = Tokenizer(WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=model, **special, padding_side="left")


def prompts() -> Dataset:
    """The prompts of benchmarks/ppo_step.py, by the same draws. As many as a batch: every update gets all of them."""
    generator = torch.Generator().manual_seed(0)
    lengths = (32 * (448 / 32) ** torch.rand(SAMPLES, generator=generator)).int().tolist()
    ids = [torch.randint(3, 32000, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids})


def main(
    connection: Connection, folder: str, updates: int, checkpointing: bool, mode: str, dtype: str, batch: int
) -> None:
    """Builds the trainer, and trains when told. batch: samples a forward."""

    def scalar(kind: torch.dtype):
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0, dtype=kind)

    trained, frozen, data = getattr(torch, dtype), torch.bfloat16 if mode == "bf16" else torch.float32, prompts()
    with tempfile.TemporaryDirectory() as out:
        config = PPOConfig(
            output_dir=out, use_cpu=not torch.cuda.is_available(), bf16=mode == "bf16", learning_rate=5e-7,
            total_episodes=SAMPLES * updates,
            per_device_train_batch_size=batch, gradient_accumulation_steps=SAMPLES // batch, num_ppo_epochs=1,
            local_rollout_forward_batch_size=batch,
            response_length=RESPONSE, temperature=1.0, gradient_checkpointing=checkpointing,
            num_sample_generations=0, save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        trainer = PPOTrainer(
            config, tokenizer(), AutoModelForCausalLM.from_pretrained(folder, dtype=trained),
            AutoModelForCausalLM.from_pretrained(folder, dtype=frozen), scalar(frozen), data, scalar(trained),
            eval_dataset=data, callbacks=[Turns(connection)],
        )  # fmt: skip
        trainer.train()


if __name__ == "__main__":
    fd, folder, updates, checkpointing, mode, dtype, batch = sys.argv[1:]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # the trainer prints its metrics
        main(Connection(int(fd)), folder, int(updates), checkpointing == "1", mode, dtype, int(batch))
