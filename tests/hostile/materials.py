"""Sound inputs, of which the cases change copies: models, tokenizers, runs with checkpoints, data."""

import shutil
from collections.abc import Callable
from pathlib import Path

import sft.train
import train_ppo
from tests.bad_inputs import materials as bad
from tests.bad_inputs.commands import FIT, PPO
from tests.helpers.families import FAMILIES, family_tokenizer
from tests.helpers.tiny import tiny_llama
from tests.helpers.tiny_run import SIZES, as_argv

NAMES = ("judge", "other_judge", "pairs", "eight", "records", "raw", "diff", "file")
TWO_STEPS = {"train_steps": 2, "checkpoint_per_step": 1, "report_to": "none"}
FIT_RUN, PPO_RUN = FIT | TWO_STEPS, PPO | TWO_STEPS | {"critic_pretrain_steps": 0}


class Materials(dict):
    """Name -> path. paths: the same as text, for command lines. forked: calls a command in a process of its own."""

    def __init__(self, folder: Path, forked: Callable):
        folder.mkdir(parents=True)
        found = bad.Materials(folder)
        super().__init__({name: found[name] for name in NAMES} | vars_of(found))
        self["chat"] = chat_folder(folder / "chat")
        self.paths = {name: str(path) for name, path in self.items()}
        self["fit_run"] = self._run(sft.train.main, FIT_RUN, folder / "fit_run", forked)
        self["ppo_run"] = self._run(train_ppo.main, PPO_RUN, folder / "ppo_run", forked)

    def _run(self, main: Callable, flags: dict, folder: Path, forked: Callable) -> Path:
        """A run of two steps that was stopped after the first."""
        argv = as_argv({k: self.fill(v) for k, v in (flags | {"model_save_path": str(folder)}).items()})
        outcome = forked(main, argv, folder.with_suffix(".log"), folder.parent)
        assert outcome["code"] == 0, outcome["log"]
        shutil.rmtree(folder / "final")
        shutil.rmtree(folder / "checkpoints" / "step_2")
        return folder

    def fill(self, value):
        """The value with paths for names in braces."""
        return value.format_map(self.paths) if isinstance(value, str) else value


def vars_of(found: bad.Materials) -> dict[str, Path]:
    """What every Materials begins with."""
    return {name: path for name, path in found.items() if name not in NAMES}


def chat_folder(folder: Path) -> Path:
    """A policy with a byte-level tokenizer.json and the chat template of ChatML."""
    tokenizer = family_tokenizer(FAMILIES["ChatML"])
    model = tiny_llama(len(tokenizer), 1, **SIZES | {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
