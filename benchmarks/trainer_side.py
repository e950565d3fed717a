"""The Trainer's side of sft_step.py and reward_step.py; not imported on our side, whose memory it would increase."""

import argparse
import tempfile
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from benchmarks.timing import peak, wait


class PairTrainer(Trainer):
    """A Trainer with the pairwise loss of reward models."""

    def compute_loss(self, model, inputs, **_):
        """Returns the mean of -log sigmoid(chosen - rejected); the first half of the batch is chosen."""
        chosen, rejected = model(**inputs).logits.squeeze(-1).float().chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()


class _Turns(TrainerCallback):
    """Makes the Trainer wait for a message before each step and answer with the seconds of the step."""

    def __init__(self, connection):
        self.connection = connection

    def on_train_begin(self, *_, **__):
        self.connection.recv()
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        wait()
        self.connection.send(time.perf_counter() - self.start)
        self.connection.recv()
        self.start = time.perf_counter()


def trainer_steps(
    connection, options: argparse.Namespace, load: Callable[[torch.dtype], PreTrainedModel], data: list[dict],
    collate: Callable[[list[dict]], dict], kind: type[Trainer] = Trainer,
) -> None:  # fmt: skip
    """Runs the Trainer as a side of `alternate.measure`. load: returns the model in a dtype."""
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, per_device_train_batch_size=options.peer_batch_size, max_steps=options.rounds + 1, learning_rate=1e-5,
            gradient_accumulation_steps=options.batch_size // options.peer_batch_size, bf16=options.autocast,
            train_sampling_strategy="sequential", save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        model = load(torch.float32 if options.autocast else torch.bfloat16)
        turns = [_Turns(connection)]
        kind(model, arguments, train_dataset=data, data_collator=collate, callbacks=turns).train()
    connection.send(peak())
