"""Data, loss, evaluation and model of SFT, for utils/run/supervised_loop.py."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import is_flash_attention_requested

from data.batching.micro_batch_plan import rank_plan
from data.choose_template import prepare_tokenizer
from data.dialogues import DialogueEncoder, EncodedDialogue
from data.encoded import Mixture, form_options, load_encoded
from sft.config import SFTConfig
from sft.model import AnswerModel, packing_failure
from sft.packed_batches import Layout, PackedRow
from sft.samples import sample_answers
from utils.data_files import parse_sources
from utils.distributed import rank, world_size
from utils.engine.engine import DTYPES, TrainEngine, device
from utils.engine.split import splitter
from utils.errors import Say, UserError
from utils.flags.checks import is_default
from utils.models.compile import compile_layers
from utils.models.export import check_names, save_causal_lm, save_lm_adapter, saved_tensors
from utils.models.load import FLAG, check_window, enable_checkpointing, load_causal_lm, window_at
from utils.models.padding_free import decoder_of, has_varlen_kernel
from utils.models.routers import ROUTER_METRICS
from utils.models.split import gathered
from utils.run.supervised_loop import Stage, evaluate
from utils.tensors import to_device
from utils.tokenizer import template_of

Dialogues = tuple[PreTrainedTokenizerBase, Mixture[EncodedDialogue], list[EncodedDialogue]]


def load_data(config: SFTConfig, say: Say) -> Dialogues:
    """Returns (tokenizer, training dialogues, held-out ones). Raises UserError for less than a batch. Collective."""
    models = [(FLAG, config.hf_model_name_or_path)]
    tokenizer, _ = prepare_tokenizer(config, config.tokenizer_name_or_path, models, say)
    config.fit_window(window_at(config.hf_model_name_or_path))
    encoder = DialogueEncoder(tokenizer, template_of(tokenizer), config.context_truncate, form_options(config))
    lower = is_default(config, "num_valid")
    train, valid = load_encoded(config.data_path, encoder, config, config.num_valid, config.seed, say, lower=lower)
    for source, dialogues in zip(parse_sources(config.data_path), train.sets, strict=True):
        if not len(dialogues):
            limit = f"--context_truncate {config.context_truncate}"
            raise UserError(f"--data_path {source.path}: no dialogue fits {limit}; raise it")
    config.fit_batch(len(train), world_size())
    if len(train) < config.batch_size:
        few = f"{len(train)} dialogues to train on are fewer than --batch_size {config.batch_size}"
        raise UserError(f"--data_path {' '.join(config.data_path)}: {few}; add data or lower --batch_size")
    return tokenizer, train, valid


def evenly_spaced(items: list, count: int) -> list:
    """Returns at most `count` items at equal distances, because the held-out dialogues are ordered by set."""
    return items[:: max(1, len(items) // count)][:count] if count else []


def answer_sums(
    engine: Callable, rows: list[PackedRow], layout: Layout, with_hits: bool = False, with_routers: bool = False
) -> dict[str, torch.Tensor]:
    """Returns the summed NLL of the answer tokens, and with hits the number of tokens that are the most likely ones.

    engine: an AnswerModel, or the engine around it. with_routers: add sums of ROUTER_METRICS over all tokens.
    """
    inputs = [None if x is None else to_device(x, device()) for x in layout.collate(rows)]
    routed = to_device(layout.real(rows), device()) if with_routers else None
    sums = engine(*inputs, with_hits=with_hits, routed=routed)
    return dict(zip(answer_counts(rows, with_hits, with_routers), sums.view(-1), strict=True))


def answer_counts(rows: list[PackedRow], with_hits: bool = False, with_routers: bool = False) -> dict[str, float]:
    """Returns the denominators of `answer_sums`: the number of answer tokens, and of all tokens for router metrics."""
    names = ("lm_loss", "token_accuracy") if with_hits else ("lm_loss",)
    counts = dict.fromkeys(names, sum(row.answer_tokens for row in rows))
    return counts | (dict.fromkeys(ROUTER_METRICS, sum(row.tokens for row in rows)) if with_routers else {})


def evaluate_answers(engine: TrainEngine, rows: list[PackedRow], stage: Stage) -> dict[str, float]:
    """Returns loss, perplexity and token accuracy of held-out answers, without router losses. Collective."""
    options = {"with_hits": True, "with_routers": False}
    hits = {"sums": partial(stage.sums, **options), "counts": partial(stage.counts, **options)}
    metrics = evaluate(engine, replace(stage, **hits, loss_weights={"lm_loss": 1.0}), rows)
    perplexity = torch.tensor(metrics["loss"], dtype=torch.float64).exp().item()  # math.exp raises on overflow
    return metrics | {"perplexity": perplexity}


def build_stage(
    config: SFTConfig, model: AnswerModel, tokenizer, layout: Layout,
    batches: Iterator[list[EncodedDialogue]], shown: list[EncodedDialogue], balance: float = 0.0,
) -> Stage:  # fmt: skip
    """Returns SFT's `Stage`. shown: dialogues to answer in evaluations. balance: weight of the load-balancing loss."""
    lm = model.lm
    generation = lm.generation_config  # the model's own, which `sample_answers` replaces while it generates

    def save(state: dict[str, torch.Tensor], folder: str) -> None:
        state = {name.removeprefix("lm."): x for name, x in state.items()}
        save_causal_lm(lm.config, state, folder, tokenizer, generation)

    def save_adapter(folder: str) -> None:
        save_lm_adapter(model, decoder_of(lm), lm, config.hf_model_name_or_path, folder, tokenizer)

    def samples(engine: TrainEngine) -> list[dict]:
        return sample_answers(engine, shown, tokenizer, config.context_truncate, config.maxlen_res)

    stage = Stage(
        batches=(layout.rows(dialogues, world_size()) for dialogues in batches),
        length=lambda row: row.tokens,
        plan=lambda lengths: rank_plan(lengths, config.micro_batch_tokens, world_size(), rank(), layout.joined),
        sums=partial(answer_sums, layout=layout, with_routers=bool(balance)),
        counts=partial(answer_counts, with_routers=bool(balance)),
        loss_weights={"lm_loss": 1.0} | ({"router_aux_loss": balance} if balance else {}),
        best_by="loss",
        larger_is_better=False,
        save=save,
        save_adapter=save_adapter,
        tokenizer=tokenizer,
        samples=samples if shown else None,
    )
    return replace(stage, evaluate=partial(evaluate_answers, stage=stage))


def load(config: SFTConfig, tokenizer, say: Say) -> tuple[PreTrainedModel, Layout]:
    """Returns (the model to train, configured by the flags; the layout of its batches)."""
    path, dtype = config.hf_model_name_or_path, DTYPES[config.dtype]
    split = splitter(config, dtype)
    lm = load_causal_lm(
        path, dtype, device(), config.attn_implementation, tokenizer, say, split=split, merge=not config.lora_rank
    )
    check_window(lm, config.context_truncate, "--context_truncate")
    check_names(AutoModelForCausalLM, lm.config, saved_tensors(lm), f"{FLAG} {path}")
    joined = has_varlen_kernel(decoder_of(lm))
    packing = config.packing and not joined
    with gathered(lm):
        failure = packing_failure(lm, f"{FLAG} {path}") if packing else None
    if failure:
        say(f"--packing is off: packed dialogues would affect each other in {type(lm).__name__} ({failure})")
    if config.gradient_checkpoint is True:
        enable_checkpointing(lm)
    if config.compile:
        compile_layers(lm)
    flat = is_flash_attention_requested(lm.config)
    return lm, Layout(packing and not failure, flat, config.micro_batch_tokens, joined)
