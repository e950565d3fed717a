"""One frozen decoder for all models of a run that start from the same weights (--share_base)."""

from collections import Counter
from pathlib import Path

from torch import nn

from utils.models.adapter_folder import load_adapter
from utils.models.load import adapter_folders, model_folder
from utils.models.weight_files import tensor_files
from utils.run.fingerprints import known_sha256

Content = tuple[str, ...]  # SHA-256 of a model's weight files, without those of adapters


class SharedBases:
    """The decoders that several models of a run use, by content; each is loaded once, each adapter on it once."""

    def __init__(self, paths: dict[str, str], share: bool = True):
        """paths: flag with path -> path, of each model that reads the policy's token ids. share: False: no others."""
        self.share = share
        self.content = {path: _content(model_folder(path, flag), flag) for flag, path in paths.items()}
        self.users = Counter(self.content[path] for path in paths.values())
        self.decoders: dict[Content, nn.Module] = {}
        self.names: dict[tuple[Content, Path], str] = {}  # of adapters

    def shares(self, path: str) -> bool:
        """Whether another model has the same base."""
        return self.share and self.users[self.content[path]] > 1

    def held(self, path: str) -> nn.Module | None:
        """Returns the decoder for a path; None if it is not loaded yet."""
        return self.decoders.get(self.content[path])

    def holds(self, decoder: nn.Module) -> bool:
        """Whether several models use a decoder."""
        return any(decoder is other for other in self.decoders.values())

    def hold(self, path: str, decoder: nn.Module, flag: str) -> tuple[str, ...]:
        """Keeps a decoder, and adds the adapters that `path` stands for. Returns their names."""
        content = self.content[path]
        self.decoders[content] = decoder
        names = []
        for folder in adapter_folders(path, flag):
            if (content, folder) not in self.names:
                name = f"read_{len(self.names)}"
                load_adapter(decoder, name, folder, flag)
                self.names[content, folder] = name
            names.append(self.names[content, folder])
        return tuple(names)


def _content(folder: Path, flag: str) -> Content:
    return tuple(known_sha256(sorted(map(str, set(tensor_files(folder, flag).values())))))
