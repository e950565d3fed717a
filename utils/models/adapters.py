"""LoRA adapters on frozen decoders, by peft: several on one decoder, of which each forward says which it uses."""

import contextlib
import re
import warnings
from collections.abc import Iterator

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from utils.errors import UserError
from utils.optional import check_peft

ALL_LINEAR = "all-linear"  # what peft calls all linear layers but the head
# Families whose written or merged adapters are not those that were trained (tests/unit/test_adapter_architectures.py).
NOT_READ = {"jamba", "laguna", "longcat_flash", "zamba"}
FALCONS = "FalconLinear"
BASE = "base_layer."  # in the names of the frozen weights of a layer with adapters
PART = re.compile(r"\.(base_layer|lora_\w+)(\.|$)")  # in the names of modules in such a layer


def add_adapter(decoder: nn.Module, name: str, config, rank: int = 0) -> None:
    """Freezes a decoder and adds a float32 adapter that is to be trained, whose output is 0 at first.

    config: with the flags of utils/flags/lora.py, and --seed. rank: of the adapter; 0: --lora_rank. Raises UserError
    without peft, or if no layer has one of the names in --lora_target_modules.
    """
    lora, kind = peft("--lora_rank"), getattr(getattr(decoder, "config", None), "model_type", "")
    if kind in NOT_READ:
        raise UserError(f"--lora_rank: peft 0.21 does not read or merge the adapters of {kind} models; leave it out")
    rank, names = rank or config.lora_rank, config.lora_target_modules
    settings = lora.LoraConfig(
        r=rank, lora_alpha=config.adapter_scale * rank / config.lora_rank, lora_dropout=config.lora_dropout,
        target_modules=ALL_LINEAR if names == [ALL_LINEAR] else names, use_dora=config.use_dora,
        use_rslora=config.use_rslora,
    )  # fmt: skip
    if names != [ALL_LINEAR]:
        check_targets(decoder, names)
    try:
        if settings.target_modules == ALL_LINEAR:
            leave_experts_out(settings, decoder)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)  # the same on all ranks, and after a resume
            inject(decoder, name, settings)
    except Exception as error:  # peft raises all kinds, for architectures that it does not know
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--lora_target_modules {' '.join(names)}: {reason}") from error
    if settings.target_parameters:
        why = "experts that transformers keeps in one tensor cannot have adapters here"
        raise UserError(f"--lora_target_modules {' '.join(names)}: {why}; name other layers")


def check_targets(decoder: nn.Module, names: list[str]) -> None:
    """Raises UserError for a name in --lora_target_modules that is no linear layer's."""
    layers = {path: x for path, x in decoder.named_modules() if path and not PART.search(path)}
    linear = {path for path, x in layers.items() if isinstance(x, nn.Linear | Conv1D) or hasattr(x, "lora_A")}
    known = ", ".join(sorted({path.rpartition(".")[2] for path in linear}))
    for name in names:
        found = {path for path in layers if f".{path}".endswith(f".{name}")}
        if not found or found - linear:
            what = "is not linear" if found else "does not exist"
            raise UserError(f"--lora_target_modules {name}: a layer of this name {what}; use all-linear, or {known}")


def leave_experts_out(settings, decoder: nn.Module) -> None:
    """Changes peft's settings for all-linear: no experts that are one tensor, no layers with a forward of their own.

    Those are routers, which return several tensors, and grouped layers. Falcon's is that of a linear layer.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    linear = {name: x for name, x in decoder.named_modules() if isinstance(x, nn.Linear)}
    other = [x for x in linear if type(linear[x]).forward != nn.Linear.forward and type(linear[x]).__name__ != FALCONS]
    settings.exclude_modules = other or None
    patterns = dict(settings.rank_pattern), dict(settings.alpha_pattern)
    convert_peft_config_for_transformers(settings, decoder, None)
    settings.target_parameters, (settings.rank_pattern, settings.alpha_pattern) = None, patterns


def peft(flag: str):
    """Returns the package. Raises UserError if it is not installed; flag: what needs it."""
    check_peft(flag)
    import peft

    return peft


def inject(decoder: nn.Module, name: str, settings, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Freezes a decoder and adds a float32 adapter to be trained. settings: peft's LoraConfig. Raises ValueError.

    tensors: of an adapter, by peft's names; their layers get one. None: layers by the settings.
    """
    from peft.tuners.tuners_utils import cast_adapter_dtype

    from utils.models.adapter_layer import use_base_dtype

    trained = [x for layer in adapted_layers(decoder) for x in layer.parameters() if x.requires_grad]
    decoder.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        peft("--lora_rank").inject_adapter_in_model(settings, decoder, name, state_dict=tensors)
    cast_adapter_dtype(decoder, name)
    use_base_dtype(adapted_layers(decoder))
    for parameter in trained:  # of other adapters, which peft freezes
        parameter.requires_grad_(True)


class Adapted(nn.Module):
    """A model whose forwards use some adapters of its decoder, or none. Other models may share the decoder.

    The last one is the model's own: the trained one, in a model that is trained.
    """

    adapters: tuple[str, ...] = ()
    adapted: tuple[nn.Module, ...] = ()  # the decoder's layers with adapters; a tuple, so that they belong to it alone

    def share(self, decoder: nn.Module, *adapters: str) -> None:
        """Sets what forwards use: these adapters of the decoder's, added up; none: its frozen weights."""
        self.adapters, self.adapted = adapters, tuple(adapted_layers(decoder))
        place = next((name for name, x in self.named_modules() if x is decoder), "")
        if place.startswith("lm."):
            decoder.place = place.removeprefix("lm.")

    def activate(self) -> None:
        """Must be called before each forward, and before a backward pass that repeats one (gradient checkpointing)."""
        for layer in self.adapted:  # not layer.set_adapter, which freezes all other adapters
            layer._disable_adapters, layer._active_adapter = not self.adapters, [*self.adapters]

    @torch.no_grad()
    def is_unchanged(self) -> bool:
        """Whether the model's own adapter changes nothing, as before its first step."""
        own = self.adapters[-1]
        layers = [x for x in self.adapted if own in x.lora_B]
        return not any(own in x.lora_variant or bool(x.lora_B[own].weight.any()) for x in layers)


def train_adapter(model: Adapted, decoder: nn.Module, name: str, config, rank: int = 0) -> None:
    """Freezes a model and adds an adapter to its decoder (`add_adapter`), which its forwards then use."""
    for key, parameter in model.named_parameters():
        if "lora_" not in key:  # other models train their adapters
            parameter.requires_grad_(False)
    add_adapter(decoder, name, config, rank)
    check_sum(decoder, *model.adapters, name)
    model.share(decoder, *model.adapters, name)


def check_sum(decoder: nn.Module, *adapters: str) -> None:
    """Raises UserError if one of several adapters of a model is DoRA's: it does not act on the sum with the others."""
    if len(adapters) > 1 and any(decoder.peft_config[name].use_dora for name in adapters):
        why = "a model would have several adapters, of which one is DoRA's"
        raise UserError(f"--lora_rank: {why}; merge the first with python -m utils.merge_adapter")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns name -> parameter of what is trained in a model, without adapters of others that share its decoder."""
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    own = getattr(model, "adapters", ())[-1:]
    return {name: x for name, x in trained.items() if "lora_" not in name or name.split(".")[-2:-1] == [*own]}


def place_of(decoder: nn.Module) -> str:
    """Returns the name of a decoder in its causal LM: model, or for example model.decoder, with a dot at the end."""
    return f"{getattr(decoder, 'place', decoder.base_model_prefix)}."


def adapted_layers(module: nn.Module) -> list[nn.Module]:
    """Returns the layers with adapters."""
    return [layer for layer in module.modules() if hasattr(layer, "lora_A")]


@contextlib.contextmanager
def merged(layer: nn.Module, adapters: tuple[str, ...]) -> Iterator[torch.Tensor]:
    """Context with a layer's weight and adapters in one tensor, added in float32 and rounded once; it keeps both."""
    base = layer.get_base_layer()
    held = base.weight.data
    base.weight.data = held.float()
    try:
        layer.merge(safe_merge=True, adapter_names=[name for name in adapters if name in layer.lora_A])
        yield base.weight.data.to(held.dtype)
    finally:
        layer.merged_adapters.clear()
        base.weight.data = held
