"""One frozen decoder for all models of a run that start from the same weights (--share_base)."""

import re
from collections import Counter
from pathlib import Path

from torch import nn

from utils.models.adapter_folder import load_adapter
from utils.models.adapters import Adapted, check_sum
from utils.models.config import read_config
from utils.models.load import adapter_folders, model_folder
from utils.models.weight_files import tensor_files
from utils.run.fingerprints import known_sha256

Content = tuple[str, ...]  # settings, and SHA-256 of the weight files, of a model without its adapters
# Settings that do not change a decoder's function.
OTHER = re.compile("_.*|.*_token_id|architectures|(torch_)?dtype|transformers_version|use_cache|num_labels")
OTHER = re.compile(f"{OTHER.pattern}|id2label|label2id|score_center|value_pretrained|problem_type")


class SharedBases:
    """The decoders of a run's models, each loaded once, and the adapters on them, each once."""

    def __init__(self, models: list[tuple[str, str]], share: bool = True):
        """models: (flag, path) of each model that reads the policy's token ids. share: False: each has its own."""
        self.share = share
        self.content = {path: _content(model_folder(path, flag), flag) for flag, path in models}
        self.users = Counter(self.content[path] for _, path in models)
        self.decoders: dict[Content, nn.Module] = {}
        self.names: dict[tuple[int, Path], str] = {}  # of adapters, by decoder and folder

    def shares(self, path: str) -> bool:
        """Whether several models use the decoder of a path."""
        return self.share and self.users[self.content[path]] > 1

    def held(self, path: str) -> nn.Module | None:
        """Returns the decoder that a model shares with those before it; None if it must be loaded."""
        return self.decoders.get(self.content[path]) if self.share else None

    def is_shared(self, decoder: nn.Module) -> bool:
        """Whether several models use a decoder."""
        held = next((content for content, other in self.decoders.items() if other is decoder), None)
        return self.share and self.users[held] > 1

    def hold(self, model: Adapted, path: str, flag: str) -> None:
        """Keeps a model's decoder, and adds the adapters that `path` stands for, which its forwards then use."""
        decoder = model.decoder
        self.decoders.setdefault(self.content[path], decoder)
        model.share(decoder)
        names = []
        for folder in adapter_folders(path, flag):
            key = id(decoder), folder
            if key not in self.names:
                self.names[key] = f"read_{len(self.names)}"
                load_adapter(decoder, self.names[key], folder, flag)
            names.append(self.names[key])
        check_sum(decoder, *names)
        model.share(decoder, *names)


def _content(folder: Path, flag: str) -> Content:
    settings = {name: value for name, value in read_config(folder, flag).items() if not OTHER.fullmatch(name)}
    files = sorted(map(str, set(tensor_files(folder, flag).values())))
    return (repr(sorted(settings.items())), *known_sha256(files))
