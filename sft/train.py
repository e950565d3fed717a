"""Fine-tune a language model on dialogues:   python -m sft.train --data_path … (see --help)

The loss is the next-token loss on the assistant's tokens, up to the end of each turn.
"""

from sft.config import SFTConfig
from utils.flags.parser import entry_point, parse_args
from utils.watchdog import Watchdog


def train(config: SFTConfig) -> None:
    """Runs the training. Nothing is written before model and data are loaded and checked."""
    from data.choose_template import first_prompt
    from sft.model import AnswerModel
    from sft.samples import prompt_length
    from sft.stage import build_stage, evenly_spaced, load, load_data
    from utils.distributed import world_size
    from utils.engine.engine import TrainEngine
    from utils.engine.memory import device_room
    from utils.memory.recompute import choose_checkpointing
    from utils.models.adapters import train_adapter
    from utils.models.load import FLAG, share_adapters
    from utils.models.padding_free import decoder_of
    from utils.models.routers import router_coef
    from utils.run.start import start_run
    from utils.run.supervised_loop import FitState, fit
    from utils.run.together import together

    say, start = start_run(config, FitState)
    with together():
        config.check_ranks(world_size())
        tokenizer, dialogues, valid = load_data(config, say)
        (first,) = dialogues.first(1)
        say(first_prompt(tokenizer, first.ids[: prompt_length(first)]))
        lm, layout = load(config, tokenizer, say)
        balance = router_coef(lm, config.router_aux_loss_coef, f"{FLAG} {config.hf_model_name_or_path}", say)
        model = AnswerModel(lm, config.even_tokens)
        if config.lora_rank:
            share_adapters(model, decoder_of(lm), config.hf_model_name_or_path)
            train_adapter(model, decoder_of(lm), "sft", config)
        engine = TrainEngine(model, config, "model")
        tokens = max(config.micro_batch_tokens, config.context_truncate)
        choose_checkpointing(engine, lm, config, tokens, device_room(), say)
        batches, shown = dialogues.batches(config.batch_size), evenly_spaced(valid, config.num_samples)
        stage = build_stage(config, model, tokenizer, layout, batches, shown, balance)
    fit(engine, stage, layout.rows(valid, world_size()), config, start)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m sft.train`. Flags are checked before torch and deepspeed are imported."""
    config = parse_args(SFTConfig, argv)
    with Watchdog(config.hang_timeout):
        from utils.deterministic import repeatable
        from utils.run.lock import held

        with repeatable(config.deterministic), held:
            train(config)


if __name__ == "__main__":
    main()
