"""Teaches a language model to answer as the assistant does:   python -m sft.train --data_path … (see --help)

Next-token loss on the assistant's tokens alone, up to the end of each turn.
"""

import sys

from sft.config import SFTConfig
from utils.errors import UserError
from utils.flags.parser import entry_point, parse_args


def train(config: SFTConfig) -> None:
    """One run, from flags to final/. Nothing is written before model and data are loaded and found to be usable."""
    from data.choose_template import first_prompt, settle
    from sft.model import AnswerModel
    from sft.samples import prompt_length
    from sft.stage import load, load_encoded, spread, stage_of
    from utils.distributed import world_size
    from utils.engine.engine import TrainEngine, device_room, shutdown_distributed
    from utils.memory.recompute import settle_checkpointing
    from utils.models.load import FLAG, window_at
    from utils.models.routers import router_coef
    from utils.run.start import open_log, start_run
    from utils.run.supervised_loop import fit

    say, start = start_run(config)
    if config.batch_size < world_size():
        raise UserError(f"--batch_size {config.batch_size} is less than the {world_size()} ranks: give at least that")
    tokenizer, _ = settle(config, config.tokenizer_name_or_path, [(FLAG, config.hf_model_name_or_path)], say)
    config.fit_window(window_at(config.hf_model_name_or_path))
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
    """Command line in, a run's folder out. A wrong flag is reported before torch and deepspeed are imported."""
    config = parse_args(SFTConfig, argv)
    from utils.deterministic import repeatable

    with repeatable(config.deterministic):
        train(config)


if __name__ == "__main__":
    main()
