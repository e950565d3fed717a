"""From a family's name to what became of each stage."""

import shutil
import time
import traceback
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from tests.architectures.checks import STAGES, Case, Wrong
from tests.architectures.configs import tiny_config
from tests.architectures.folders import save_folder
from tests.helpers.tiny import tiny_llama_folder
from utils.engine.engine import init_distributed
from utils.errors import UserError
from utils.models.load import quiet_transformers

KINDS = ("equal", "refused", "wrong", "not built")  # from good to bad, but for the last


class Result(NamedTuple):
    """Of one stage. text: how it ran where it is equal, else the refusal's line or the difference."""

    kind: str
    text: str = ""


class NoDecoder(Exception):
    """A family that this toolkit is not for."""


@dataclass
class Outcome:
    """Of one family. reason: why it is not built."""

    name: str
    reason: str = ""
    stages: dict[str, Result] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def kind(self) -> str:
        """The worst of its stages."""
        return max((result.kind for result in self.stages.values()), key=KINDS.index, default="not built")

    def __str__(self) -> str:
        """One line: the stages of this kind by what they say."""
        if self.kind in ("equal", "not built"):
            return f"{self.name} {self.kind}{': ' * bool(self.reason)}{self.reason}"
        said = [f"{result.text} ({stage})" for stage, result in self.stages.items() if result.kind == self.kind]
        return f"{self.name} {self.kind}: {'; '.join(said)}"


def check_family(name: str, scratch: Path) -> Outcome:
    """Builds a tiny model of the family and runs all stages on it. scratch: where its folders are for the while."""
    begin, outcome, folder = time.monotonic(), Outcome(name), scratch / name
    init_distributed()
    with quiet_transformers():
        try:
            config = tiny_config(name)
            if config.is_encoder_decoder:
                raise NoDecoder("an encoder-decoder")
            save_folder(config, folder / "source")
            case = Case(folder / "source", critic_folder(scratch))
            case.plain.eval()  # has transformers load it again
        except Exception as error:  # noqa: BLE001 - whatever transformers has against it is the finding
            outcome.reason = f"{type(error).__name__}: {first_line(error)}".removeprefix("NoDecoder: ")
        else:
            outcome.stages = {stage: run(check, case, folder) for stage, check in STAGES.items()}
    shutil.rmtree(folder, ignore_errors=True)
    outcome.seconds = time.monotonic() - begin
    return outcome


@cache
def critic_folder(scratch: Path) -> Path:
    """The critic of all."""
    return tiny_llama_folder(scratch / "critic", hidden_size=32, intermediate_size=48)


def run(check, case: Case, folder: Path) -> Result:
    """The stage's result. What is neither a UserError nor a difference counts as wrong too: users would meet it."""
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # some models draw numbers in training mode
            return Result("equal", check(case, folder) or "")
    except UserError as error:
        return Result("refused", str(error).replace(f"{folder}/", ""))
    except Wrong as error:
        return Result("wrong", str(error))
    except Exception as error:  # noqa: BLE001 - as it says above
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return Result("wrong", f"{type(error).__name__} at {where}: {first_line(error)}")


def first_line(error: Exception) -> str:
    """What it says, short."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:160]
