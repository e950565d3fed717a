"""From a family's name to what became of each stage."""

import shutil
import time
import traceback
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.architectures.checks import STAGES, Case, Wrong
from tests.architectures.configs import tiny_config
from tests.architectures.folders import save_folder
from tests.tiny import tiny_llama_folder
from utils.engine import init_distributed
from utils.errors import UserError
from utils.models import quiet_transformers

SHORT = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma2", "gemma3_text", "phi3", "gpt_oss",
    "deepseek_v3", "gpt2",
)  # fmt: skip


@dataclass
class Outcome:
    """Of one family. stages: name -> what became of it, "equal", "refused: …" or "wrong: …"."""

    name: str
    not_built: str = ""
    stages: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def kind(self) -> str:
        """equal, refused, wrong or not built."""
        if self.not_built:
            return "not built"
        kinds = {text.split(":")[0] for text in self.stages.values()}
        return next(kind for kind in ("wrong", "refused", "equal") if kind in kinds)

    def __str__(self) -> str:
        if self.not_built:
            return f"{self.name} not built: {self.not_built}"
        lines: dict[str, list[str]] = {}
        for stage, text in self.stages.items():
            kind, _, rest = text.partition(": ")
            if kind == self.kind:
                lines.setdefault(rest, []).append(stage)
        if self.kind == "equal":
            return f"{self.name} equal"
        return f"{self.name} {self.kind} " + "; ".join(f"({', '.join(names)}): {rest}" for rest, names in lines.items())


def check_family(name: str, scratch: Path) -> Outcome:
    """Builds a tiny model of the family and runs all stages on it. scratch: where its folders are for the while."""
    begin = time.monotonic()
    with quiet_transformers():
        outcome = _checked(name, scratch)
    outcome.seconds = time.monotonic() - begin
    return outcome


def _checked(name: str, scratch: Path) -> Outcome:
    outcome, folder = Outcome(name), scratch / name
    try:
        config = tiny_config(name)
        if config.is_encoder_decoder:
            outcome.not_built = "encoder-decoder"
            return outcome
        save_folder(config, folder / "source")
        case = Case(folder / "source", critic_folder(scratch))
        case.plain  # noqa: B018 - transformers itself loads it
    except Exception as error:  # noqa: BLE001 - whatever transformers has against it is the finding
        outcome.not_built = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return outcome
    init_distributed()
    for stage, check in STAGES.items():
        outcome.stages[stage] = _result(check, case, folder)
    shutil.rmtree(folder)
    return outcome


@cache
def critic_folder(scratch: Path) -> Path:
    """The critic of all."""
    return tiny_llama_folder(scratch / "critic", hidden_size=32, intermediate_size=48)


def _result(check, case: Case, folder: Path) -> str:
    try:
        check(case, folder)
    except UserError as error:
        return f"refused: {error}".replace(str(folder) + "/", "")
    except Wrong as error:
        return f"wrong: {error}"
    except Exception as error:  # noqa: BLE001 - any other failure is a finding too
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:160]
        return f"wrong: {type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"
    return "equal"


def write_table(outcomes: list[Outcome], file: Path) -> None:
    """One row a family."""
