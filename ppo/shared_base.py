"""One frozen decoder for all models of a run that start from the same weights (--share_base)."""

from collections import Counter, defaultdict
from pathlib import Path

from torch import nn

from utils.models.adapters import Adapted
from utils.models.config import UNUSED, read_config
from utils.models.load import model_folder, share_adapters
from utils.models.weight_files import tensor_files
from utils.run.fingerprints import known_sha256

Content = tuple[str, ...]  # settings, and SHA-256 of the weight files, of a model without its adapters

# Settings of a head, not of the decoder below it; and an older name of dtype.
OF_HEADS = {"num_labels", "id2label", "label2id", "problem_type", "score_center", "value_pretrained", "torch_dtype"}


class SharedBases:
    """The decoders of a run's models, each loaded once, and the adapters on them, each once."""

    def __init__(self, models: list[tuple[str, str]], share: bool = True):
        """models: (flag, path) of each model that reads the policy's token ids. share: False: each has its own."""
        self.share = share
        self.content = {path: _content(model_folder(path, flag), flag) for flag, path in models}
        self.users = Counter(self.content[path] for _, path in models)
        self.decoders: dict[Content, nn.Module] = {}
        self.names = defaultdict(dict)  # decoder -> folder of an adapter on it -> name

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
        self.decoders.setdefault(self.content[path], model.decoder)
        share_adapters(model, model.decoder, path, flag, self.names[model.decoder])


def _content(folder: Path, flag: str) -> Content:
    settings = read_config(folder, flag)
    settings = {name: settings[name] for name in settings.keys() - OF_HEADS if not UNUSED.fullmatch(name)}
    files = sorted(map(str, set(tensor_files(folder, flag).values())))
    return (repr(sorted(settings.items())), *known_sha256(files))
