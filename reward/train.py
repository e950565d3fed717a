"""Trains a reward model on compared answers:   python -m reward.train --hf_model_name_or_path … --data_path …

Loss: -E[log sigmoid(chosen - rejected)] + beta x cross entropy of the chosen answer (Part I eq. 2, signs mended), and
what Part II adds to it by flags: margin, smoothing, flipped labels, a contrastive term.
"""

import sys

from reward.config import RewardConfig
from utils.errors import UserError
from utils.flags.parser import entry_point, parse_args


def train(config: RewardConfig) -> None:
    """One run, from flags to final/. Nothing is written before model and data are loaded and found to be usable."""
    from data.choose_template import first_prompt, settle
    from reward.encode import load_center_answers, load_comparisons
    from reward.stage import load, stage_of
    from utils.distributed import world_size
    from utils.engine.engine import TrainEngine, device_room, shutdown_distributed
    from utils.memory.recompute import settle_checkpointing
    from utils.models.load import FLAG, window_at
    from utils.run.start import open_log, start_run
    from utils.run.supervised_loop import fit

    say, start = start_run(config)
    if config.batch_size < world_size():
        raise UserError(f"--batch_size {config.batch_size} is less than the {world_size()} ranks: give at least that")
    models = [(FLAG, config.hf_model_name_or_path)]
    tokenizer, _ = settle(config, config.tokenizer_name_or_path, models, say)
    if config.delimiter not in (None, tokenizer.eos_token):
        raise UserError(f"--delimiter {config.delimiter!r}: utterances end in {tokenizer.eos_token!r}; leave it out")
    config.fit_window(window_at(config.hf_model_name_or_path))
    items, held_out_items = load_comparisons(config, tokenizer, say)
    say(first_prompt(tokenizer, items[0].answers[0][: items[0].prompt_length]))
    if config.center_scores and not held_out_items:
        raise UserError("--center_scores needs an evaluation: give a *valid* file, or a --num_valid above 0")
    answers = load_center_answers(config, tokenizer, say) if config.center_data_path else None
    model = load(config, tokenizer, say)
    log = open_log(config, start, config.train_steps)
    try:
        engine = TrainEngine(model, config, "reward model")
        stage = stage_of(config, model, tokenizer, items, answers)
        tokens = max(config.micro_batch_tokens, *map(stage.length, items))
        settle_checkpointing(engine, model.backbone, config, tokens, device_room(), log.say)
        code = fit(engine, stage, held_out_items, config, log, start)
    finally:
        log.close()
    shutdown_distributed()
    if code:
        sys.exit(code)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Command line in, a run's folder out. A wrong flag is reported before torch and deepspeed are imported."""
    config = parse_args(RewardConfig, argv)
    from utils.deterministic import repeatable

    with repeatable(config.deterministic):
        train(config)


if __name__ == "__main__":
    main()
