"""Teaches a language model to answer as the assistant does:   python -m sft.train --data_path … (see --help)

Next-token loss on the assistant's tokens alone, up to the end of each turn.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from data.batching.micro_batch_plan import rank_plan
from data.choose_template import first_prompt, settle
from data.dialogues import EncodedDialogue, batches, encode_dialogues, load_dialogues
from data.order import BLOCK
from sft.model import AnswerModel, packing_failure
from sft.packed_batches import Layout, Row
from sft.samples import prompt_length, sample_answers
from utils.deterministic import repeatable
from utils.distributed import rank, world_size
from utils.engine.engine import DTYPES, TrainEngine, device, device_room, shutdown_distributed
from utils.errors import UserError
from utils.flags.checks import check_range
from utils.flags.parser import entry_point, parse_args
from utils.flags.router import RouterFlags
from utils.flags.supervised import FitConfig
from utils.flags.text import StopFlags
from utils.memory.recompute import settle_checkpointing
from utils.models.compile import compile_layers
from utils.models.export import check_names, save_causal_lm, saved_tensors
from utils.models.load import FLAG, check_window, enable_checkpointing, load_causal_lm
from utils.models.padding_free import decoder_of, has_varlen_kernel
from utils.models.routers import ROUTER_METRICS, router_coef
from utils.run.start import open_log, start_run
from utils.run.supervised_loop import Stage, evaluate, fit
from utils.tensors import to_device
from utils.tokenizer import template_of


@dataclass
class SFTConfig(StopFlags, RouterFlags, FitConfig):
    """Fine-tune a language model on dialogues."""

    data_path: list[str] = field(default_factory=list)
    """One or more: folders of *train.json(l) and *valid.json(l), files, hub ids"""
    data_weights: list[float] = field(default_factory=list)
    """A share of the samples for each --data_path, whatever their sizes; default: every dialogue once an epoch"""
    model_save_path: str = "outputs/sft"
    """Folder of the run: config.json, metrics.jsonl, samples.jsonl, best/, final/"""
    lr: float = 9.5e-6
    """Peak learning rate"""
    batch_size: int = 32
    """Dialogues an optimizer step, over all ranks"""
    packing: bool = True
    """Put several dialogues into one row of a forward pass, each seeing itself alone: speed and memory only.
    Switched off for models in which they would see each other, and for those that run without padding anyway: models
    of LLaMA's kind in bf16 on a GPU"""
    num_valid: int = 100
    """Dialogues taken off each --data_path for evaluation when it comes without a *valid* file; 0: none"""
    num_samples: int = 4
    """Held-out prompts that are answered, greedily, at each evaluation, for samples.jsonl and TensorBoard; 0: none"""
    maxlen_res: int = 128
    """Tokens of such an answer at most"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, num_samples=(0, None), maxlen_res=(1, None))
        if not all(self.data_path):
            raise UserError("--data_path holds an empty name: give folders, files or hub ids")
        if not self.data_weights:
            return
        if len(self.data_weights) != len(self.data_path):
            raise UserError(
                f"--data_weights gives {len(self.data_weights)} weights for {len(self.data_path)} of --data_path: "
                "give one each"
            )
        for weight in self.data_weights:
            if not BLOCK * weight >= sum(self.data_weights) > 0 or not math.isfinite(weight):
                raise UserError(
                    f"--data_weights {weight:g}: give positive numbers, none below a thousandth of their sum"
                )


def load_encoded(
    config: SFTConfig, tokenizer, say: Callable[[str], None]
) -> tuple[list[list[EncodedDialogue]], list[EncodedDialogue]]:
    """(a training set for each --data_path, all held-out dialogues). UserError when too few are left for a batch."""
    template = template_of(tokenizer)
    sets, valid = [], []
    for path in config.data_path:
        splits = load_dialogues(path, config.num_valid, config.seed, say)
        own, held_out = (encode_dialogues(tokenizer, split, template, config.context_truncate, say) for split in splits)
        if not own:
            raise UserError(
                f"--data_path {path}: no dialogue is short enough for --context_truncate {config.context_truncate}; "
                "raise it"
            )
        sets.append(own)
        valid += held_out
    total = sum(map(len, sets))
    if total < config.batch_size:
        raise UserError(
            f"--data_path {' '.join(config.data_path)}: {total} dialogues to train on are fewer than --batch_size "
            f"{config.batch_size}; add data or lower --batch_size"
        )
    return sets, valid


def spread(items: list, count: int) -> list:
    """At most `count` of the items, from all over the list: held-out dialogues stand there set by set."""
    return items[:: max(1, len(items) // count)][:count] if count else []


def answer_sums(
    engine: Callable, rows: list[Row], layout: Layout, with_hits: bool = False, with_routers: bool = False
) -> dict[str, torch.Tensor]:
    """The summed NLL of the answers' tokens; with hits also how many of them were the model's likeliest.

    engine: an AnswerModel, or the engine around it. with_routers: ROUTER_METRICS too, over all tokens of the rows.
    """
    inputs = [None if x is None else to_device(x, device()) for x in layout.collate(rows)]
    routed = to_device(layout.real(rows), device()) if with_routers else None
    sums = engine(*inputs, with_hits=with_hits, routed=routed)
    return dict(zip(answer_counts(rows, with_hits, with_routers), sums.view(-1), strict=True))


def answer_counts(rows: list[Row], with_hits: bool = False, with_routers: bool = False) -> dict[str, float]:
    """What these are divided by: the answers' tokens, and all tokens for what concerns routers."""
    names = ("lm_loss", "token_accuracy") if with_hits else ("lm_loss",)
    counts = dict.fromkeys(names, sum(row.answer_tokens for row in rows))
    return counts | (dict.fromkeys(ROUTER_METRICS, sum(row.tokens for row in rows)) if with_routers else {})


def judge(engine: TrainEngine, rows: list[Row], stage: Stage) -> dict[str, float]:
    """Loss, perplexity and token accuracy over held-out answers, without routers. Collective."""
    options = {"with_hits": True, "with_routers": False}
    hits = {"sums": partial(stage.sums, **options), "counts": partial(stage.counts, **options)}
    metrics = evaluate(engine, replace(stage, **hits, loss_weights={"lm_loss": 1.0}), rows)
    perplexity = torch.tensor(metrics["loss"], dtype=torch.float64).exp().item()  # math.exp raises where it is infinite
    return metrics | {"perplexity": perplexity}


def stage_of(
    config: SFTConfig, lm: PreTrainedModel, tokenizer, layout: Layout, sets: list[list[EncodedDialogue]],
    shown: list[EncodedDialogue], balance: float = 0.0,
) -> Stage:  # fmt: skip
    """SFT's part in `utils.run.supervised_loop`. shown: the dialogues whose last answer is sampled at each evaluation.

    balance: weight of the routers' load-balancing loss, 0: none. Each forward's loss is weighted by its share of the
    global batch's tokens.
    """
    generation = lm.generation_config  # the model's own: while samples are drawn it has another

    def save(state: dict[str, torch.Tensor], folder: str) -> None:
        state = {name.removeprefix("lm."): x for name, x in state.items()}
        save_causal_lm(lm.config, state, folder, tokenizer, generation)

    def samples(engine: TrainEngine) -> list[dict[str, str]]:
        return sample_answers(engine, shown, tokenizer, config.context_truncate, config.maxlen_res)

    stream = batches(sets, config.batch_size, config.seed, config.data_weights or None)
    stage = Stage(
        batches=(layout.rows(dialogues, world_size()) for dialogues in stream),
        length=lambda row: row.tokens,
        plan=lambda lengths: rank_plan(lengths, config.micro_batch_tokens, world_size(), rank(), layout.joined),
        sums=partial(answer_sums, layout=layout, with_routers=bool(balance)),
        counts=partial(answer_counts, with_routers=bool(balance)),
        loss_weights={"lm_loss": 1.0} | ({"router_aux_loss": balance} if balance else {}),
        best_by="loss",
        larger_is_better=False,
        save=save,
        samples=samples if shown else None,
    )
    return replace(stage, evaluate=partial(judge, stage=stage))


def load(config: SFTConfig, tokenizer, say: Callable[[str], None]) -> tuple[PreTrainedModel, Layout]:
    """(the model to train, with what the flags want of it; how its dialogues are laid out)."""
    path, dtype = config.hf_model_name_or_path, DTYPES[config.dtype]
    lm = load_causal_lm(path, dtype, device(), config.attn_implementation, tokenizer, say)
    check_window(lm, config.context_truncate, "--context_truncate")
    check_names(AutoModelForCausalLM, lm.config, saved_tensors(lm), f"{FLAG} {path}")
    joined = has_varlen_kernel(decoder_of(lm))
    packing = config.packing and not joined
    failure = packing_failure(lm, f"{FLAG} {path}") if packing else None
    if failure:
        say(f"--packing is off: packed dialogues would see each other in {type(lm).__name__} ({failure})")
    if config.gradient_checkpoint is True:
        enable_checkpointing(lm)
    if config.compile:
        compile_layers(lm)
    flat = is_flash_attention_requested(lm.config)
    return lm, Layout(packing and not failure, flat, config.micro_batch_tokens, joined)


def train(config: SFTConfig) -> None:
    """One run, from flags to final/. Nothing is written before model and data are loaded and found to be usable."""
    say, start = start_run(config)
    if config.batch_size < world_size():
        raise UserError(f"--batch_size {config.batch_size} is less than the {world_size()} ranks: give at least that")
    tokenizer, _ = settle(config, config.tokenizer_name_or_path, [(FLAG, config.hf_model_name_or_path)], say)
    sets, valid = load_encoded(config, tokenizer, say)
    say(first_prompt(tokenizer, sets[0][0].ids[: prompt_length(sets[0][0])]))
    lm, layout = load(config, tokenizer, say)
    balance = router_coef(lm, config.router_aux_loss_coef, f"{FLAG} {config.hf_model_name_or_path}", say)
    log = open_log(config, start, config.train_steps)
    try:
        engine = TrainEngine(AnswerModel(lm, config.even_tokens), config, "model")
        tokens = max(config.micro_batch_tokens, config.context_truncate)
        settle_checkpointing(engine, lm, config, tokens, device_room(), log.say)
        stage = stage_of(config, lm, tokenizer, layout, sets, spread(valid, config.num_samples), balance)
        code = fit(engine, stage, layout.rows(valid, world_size()), config, log, start)
    finally:
        log.close()
    shutdown_distributed()
    if code:
        sys.exit(code)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m sft.train`."""
    config = parse_args(SFTConfig, argv)
    with repeatable(config.deterministic):
        train(config)


if __name__ == "__main__":
    main()
