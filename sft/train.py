"""Teaches a language model to answer as the assistant does:   python -m sft.train --data_path … (see --help)

Next-token loss on the assistant's tokens and their EOS alone.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel

from data.collate import pad
from data.dialogues import EncodedDialogue, batches, encode_dialogues, load_dialogues
from data.shares import rank_plan
from data.template import template_for
from sft.loss import answer_loss
from utils.args import entry_point, parse_args
from utils.distributed import is_main, rank, world_size
from utils.engine import DTYPES, TrainEngine, device, init_distributed, shutdown_distributed
from utils.errors import UserError
from utils.export import save_causal_lm
from utils.fit import Stage, fit
from utils.fit_config import FitConfig
from utils.logger import RunLogger, check_outputs
from utils.models import check_window, enable_checkpointing, load_causal_lm
from utils.nll import head_logits
from utils.resume import begin_folder, find_checkpoint
from utils.tokenizer import load_tokenizer


@dataclass
class SFTConfig(FitConfig):
    """Fine-tune a language model on dialogues."""

    model_save_path: str = "outputs/sft"
    """Folder of the run: config.json, metrics.jsonl, best/, final/"""
    lr: float = 9.5e-6
    """Peak learning rate"""
    batch_size: int = 32
    """Dialogues an optimizer step, over all ranks"""


class AnswerModel(nn.Module):
    """A causal LM whose forward is the summed loss on answer tokens; no other logits are made."""

    def __init__(self, lm: PreTrainedModel, even_tokens: int = 0):
        """even_tokens: as in `utils.nll.sum_nll`."""
        super().__init__()
        self.lm = lm
        self.even_tokens = even_tokens

    def forward(self, sequences: torch.Tensor, answer_mask: torch.Tensor) -> torch.Tensor:
        """Summed NLL of the masked tokens, float32 scalar. Both inputs [batch, length], right-padded."""
        # Right padding needs no attention mask: causality hides it, and attention kernels are fastest so.
        hidden = self.lm.get_decoder()(input_ids=sequences, use_cache=False).last_hidden_state
        logits = partial(head_logits, self.lm.get_output_embeddings(), self.lm.config.get_text_config())
        return answer_loss(hidden, sequences, answer_mask, logits, even_tokens=self.even_tokens)


def load_encoded(
    config: SFTConfig, tokenizer, say: Callable[[str], None]
) -> tuple[list[EncodedDialogue], list[EncodedDialogue]]:
    """(train, valid) dialogues of --data_path. UserError when too few are left for a batch."""
    template = template_for(config.lang, config.template)
    splits = load_dialogues(config.data_path, config.num_valid, config.seed, say)
    train, valid = (encode_dialogues(tokenizer, split, template, config.context_truncate, say) for split in splits)
    if len(train) < config.batch_size:
        raise UserError(
            f"--data_path {config.data_path}: {len(train)} dialogues to train on are fewer than --batch_size "
            f"{config.batch_size}; add data, lower --batch_size or raise --context_truncate"
        )
    return train, valid


def nll_sums(engine: Callable, dialogues: list[EncodedDialogue]) -> dict[str, torch.Tensor]:
    """The summed NLL of the answers. engine: an AnswerModel, or the engine around it."""
    ids, _ = pad([dialogue.ids for dialogue in dialogues], 0)
    answers, _ = pad([dialogue.answer_mask for dialogue in dialogues], 0)
    return {"lm_loss": engine(ids.to(device()), answers.bool().to(device()))}


def stage_of(config: SFTConfig, lm: PreTrainedModel, tokenizer, train: list[EncodedDialogue]) -> Stage:
    """SFT's part in `utils.fit`."""

    def save(state: dict[str, torch.Tensor], folder: str) -> None:
        save_causal_lm(lm.config, {name.removeprefix("lm."): x for name, x in state.items()}, folder, tokenizer)

    return Stage(
        batches=batches([train], config.batch_size, config.seed),
        length=lambda dialogue: len(dialogue.ids),
        plan=lambda lengths: rank_plan(lengths, config.micro_batch_tokens, world_size(), rank()),
        sums=nll_sums,
        counts=lambda dialogues: {"lm_loss": sum(sum(dialogue.answer_mask) for dialogue in dialogues)},
        loss_weights={"lm_loss": 1.0},
        best_by="loss",
        larger_is_better=False,
        save=save,
    )


def train(config: SFTConfig) -> None:
    """One run, from flags to final/. Nothing is written before model and data are loaded and found to be usable."""
    check_outputs(config)
    init_distributed(config.hang_timeout)
    if config.batch_size < world_size():
        raise UserError(f"--batch_size {config.batch_size} is less than the {world_size()} ranks: give at least that")
    say = partial(print, flush=True) if is_main() else lambda text: None
    start = find_checkpoint(config, say)
    tokenizer = load_tokenizer(config.tokenizer_name_or_path, template_for(config.lang, config.template))
    train_items, valid_items = load_encoded(config, tokenizer, say)
    path, dtype = config.hf_model_name_or_path, DTYPES[config.dtype]
    lm = load_causal_lm(path, dtype, device(), config.attn_implementation, tokenizer, say)
    check_window(lm, config.context_truncate, "--context_truncate")
    if config.gradient_checkpoint:
        enable_checkpointing(lm)
    step = begin_folder(config, start)
    log = RunLogger(config.model_save_path, config.logdir, config.report_to, asdict(config), config.train_steps, step)
    try:
        engine = TrainEngine(AnswerModel(lm, config.even_tokens), config, "model")
        code = fit(engine, stage_of(config, lm, tokenizer, train_items), valid_items, config, log, start)
    finally:
        log.close()
    shutdown_distributed()
    if code:
        sys.exit(code)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m sft.train`."""
    train(parse_args(SFTConfig, argv))


if __name__ == "__main__":
    main()
