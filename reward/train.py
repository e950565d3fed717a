"""Train a reward model on preferences:   python -m reward.train --hf_model_name_or_path … --data_path …

Loss: -E[log sigmoid(chosen - rejected)] + beta * cross entropy of the chosen answer (Part I eq. 2, signs corrected),
with the options of Part II as flags: margin, label smoothing, flipped labels, contrastive loss.
"""

from reward.config import RewardConfig
from utils.flags.parser import entry_point, parse_args
from utils.watchdog import Watchdog


def train(config: RewardConfig) -> None:
    """Runs the training. Nothing is written before model and data are loaded and checked."""
    from data.choose_template import first_prompt
    from reward.batches import MIN_PAIRS, dynamic_batches
    from reward.encode import load_data
    from reward.model import train_scalar_adapter
    from reward.stage import RewardState, build_stage, load
    from utils.distributed import world_size
    from utils.engine.engine import TrainEngine
    from utils.engine.memory import device_room
    from utils.memory.recompute import choose_checkpointing
    from utils.models.load import share_adapters
    from utils.run.start import start_run
    from utils.run.supervised_loop import fit
    from utils.run.together import together

    say, start = start_run(config, RewardState)
    with together():
        config.check_ranks(world_size())
        tokenizer, items, held_out_items, answers = load_data(config, say)
        (first,) = items.first(1)
        say(first_prompt(tokenizer, first.answers[0][: first.prompt_length]))
        model = load(config, tokenizer, say)
        if config.lora_rank:
            share_adapters(model, model.backbone, config.hf_model_name_or_path)
            train_scalar_adapter(model, "reward", config)
        engine = TrainEngine(model, config, "reward model")
        budget = config.batch_size * sum(row["tokens"] for row in items.each("tokens")) / len(items)
        batches = dynamic_batches(items.take, budget, max(MIN_PAIRS, world_size()))
        stage = build_stage(config, model, tokenizer, batches, answers)
        longest = max(row["padded_tokens"] for row in items.each("padded_tokens"))
        tokens = max(config.micro_batch_tokens, longest * (2 if config.simcse_coef else 1))
        choose_checkpointing(engine, model.backbone, config, tokens, device_room(), say)
    fit(engine, stage, held_out_items, config, start)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Entry point of `python -m reward.train`. Flags are checked before torch and deepspeed are imported."""
    config = parse_args(RewardConfig, argv)
    with Watchdog(config.hang_timeout):
        from utils.deterministic import repeatable
        from utils.run.lock import held

        with repeatable(config.deterministic), held:
            train(config)


if __name__ == "__main__":
    main()
