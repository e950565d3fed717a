"""Things that would run code if they were loaded without care, live: each leaves a file behind if it runs."""

import json
import os
from pathlib import Path

import torch


class Touch:
    """What runs when a pickle of it is loaded: a command that makes the file `mark`."""

    def __init__(self, mark: Path):
        self._mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self._mark}'",)


def live_pickle(file: Path, mark: Path, weights: dict | None = None, layout: str = "zip") -> Path:
    """A file of torch.save, among whose `weights` is a Touch (None: it is all there is). layout: zip or legacy."""
    content = Touch(mark) if weights is None else weights | {"extra": Touch(mark)}
    torch.save(content, file, _use_new_zipfile_serialization=layout == "zip")
    return file


def assert_live(file: Path, mark: Path) -> None:
    """The file has not run yet, and would have."""
    assert not mark.exists()
    with file.open("rb") as stream:  # not by its name: torch reads what is called safetensors as such
        torch.load(stream, weights_only=False)
    assert mark.exists()
    mark.unlink()


CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig): model_type = "own"
class OwnModel(LlamaForCausalLM): config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast): pass
"""


def bring_own_code(folder: Path, mark: Path, model_type: str = "own") -> Path:
    """A model folder becomes one that asks for classes of its own, in a file beside its weights."""
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel", "AutoModelForCausalLM": "own.OwnModel"}
    changes = {"model_type": model_type, "auto_map": auto, "architectures": ["OwnModel"]}
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def bring_own_tokenizer(folder: Path, mark: Path) -> Path:
    """The same for a tokenizer's folder."""
    (folder / "own.py").write_text(CODE.format(mark=str(mark)))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer.model").unlink(missing_ok=True)
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
