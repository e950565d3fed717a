"""Encode the data of a training command ahead:   python -m data.prepare sft.train FLAGS   (reward.train, train_ppo.py)

Takes the flags of the command that is to follow, and fills --data_cache, on a machine without a GPU. The command then
starts at once, as long as its data, tokenizer and flags about them are the same. Weights of models are not needed.
"""

import sys
from importlib import import_module

from utils.errors import UserError
from utils.flags.parser import entry_point, parse_args

# Command -> module and class of its flags, module of its function `load_data`.
COMMANDS = {
    "sft.train": ("sft.config", "SFTConfig", "sft.stage"),
    "reward.train": ("reward.config", "RewardConfig", "reward.encode"),
    "train_ppo.py": ("ppo.config", "PPOConfig", "ppo.build"),
}


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Loads the data of a command as the command does, and ends."""
    command, *flags = sys.argv[1:] if argv is None else argv or [""]
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command not in COMMANDS:
        named = f", not {command}" if command else ""
        raise UserError(f"name a command first, one of {', '.join(COMMANDS)}{named}; its flags follow")
    module, name, loader = COMMANDS[command]
    module = import_module(module)
    presets = getattr(module, "PRESETS", None)
    config = parse_args(getattr(module, name), flags, presets, getattr(module, "AMOUNTS", None))
    from data.cache import folder_of  # imports transformers

    import_module(loader).load_data(config, print)
    print(f"data: ready. Files of 16 MB and more are in {folder_of(config)}; smaller data are encoded at each start")


if __name__ == "__main__":
    main()
