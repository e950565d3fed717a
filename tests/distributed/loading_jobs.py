"""What each rank does in test_split_loading.py: loads models whole and split over the ranks, and compares them."""

import ctypes
import json
from pathlib import Path

import torch
from torch import nn

from reward.model import load_scalar_model
from tests.helpers.parts import ppo_config
from utils.distributed import barrier, gather_objects, is_main, rank, world_size
from utils.engine.engine import DTYPES, init_distributed, shutdown_distributed
from utils.engine.split import splitter
from utils.errors import UserError
from utils.models.check import in_float32
from utils.models.load import load_causal_lm
from utils.models.split import Split, gathered, model_copy, not_finite, own_part
from utils.tokenizer import load_tokenizer

CPU = torch.device("cpu")
IDS = torch.arange(5, 25)[None]


def split_for(dtype: str = "fp32", **flags) -> Split:
    return splitter(ppo_config(zero_stage=3, dtype=dtype), DTYPES[dtype], **flags)


def differences(first: nn.Module, second: nn.Module) -> list[str]:
    """Names of parameters and buffers that two models do not have alike. The second one is split."""
    with gathered(second, by_layer=False):
        pairs = [(dict(first.named_parameters()), dict(second.named_parameters()))]
        pairs.append((dict(first.named_buffers()), dict(second.named_buffers())))
        found = [name for a, b in pairs for name in sorted(a.keys() ^ b.keys())]
        for a, b in pairs:
            found += [x for x in a.keys() & b.keys() if a[x].dtype != b[x].dtype or not torch.equal(a[x], b[x])]
    held = sum(p.numel() + own_part(p).numel() for p in second.parameters())
    share = sum(-(-p.numel() // world_size()) for p in first.parameters())
    return found + ([f"{held} elements on rank {rank()}, more than {share}"] if held > share else [])


@torch.no_grad()
def compare(folder: str, dtype: str) -> list[str]:
    """Differences of a causal LM that is loaded whole and split, and of its logits, in float32 too."""
    first = load_causal_lm(folder, DTYPES[dtype], CPU, say=str)
    second = load_causal_lm(folder, DTYPES[dtype], CPU, say=str, split=split_for(dtype))
    found = differences(first, second)
    with gathered(second):
        if not torch.equal(first(input_ids=IDS, use_cache=False).logits, second(input_ids=IDS, use_cache=False).logits):
            found.append("logits")
        with in_float32(first), in_float32(second):
            logits = [model(input_ids=IDS, use_cache=False).logits for model in (first, second)]
        if logits[1].dtype != torch.float32 or not torch.equal(*logits):
            found.append("logits in float32")
    return found + differences(first, second)


def load_families(file: str, folder: str, names: list[str]) -> None:
    """`file` gets {family: differences per rank}."""
    init_distributed(60)
    found = {name: compare(f"{folder}/{name}", "bf16" if name == "llama" else "fp32") for name in names}
    _write(file, found)


def load_others(file: str, folder: str) -> None:
    """Models with a grown embedding, scalar models, copies, and folders that must be refused."""
    init_distributed(60)
    found, lm, tokenizer = {}, f"{folder}/llama", load_tokenizer(f"{folder}/llama", "moss_zh")

    def scalar(path: str, **options) -> nn.Module:
        return load_scalar_model(f"{folder}/{path}", torch.float32, CPU, say=str, **options)

    first, second = (load_causal_lm(lm, torch.float32, CPU, None, tokenizer, str, split=x) for x in (None, split_for()))
    found["resized"] = [*differences(first, second), second.get_output_embeddings().weight.ds_shape[0]]
    found["copy of split"] = differences(first, model_copy(second, split_for()))
    found["copy of whole, offloaded"] = differences(first, model_copy(first, split_for(offload=True, frozen=True)))
    for parameter in second.parameters():  # NaN in the padding behind the elements that this rank holds
        parameter.ds_tensor[max(0, parameter.ds_numel - rank() * parameter.ds_tensor.ds_numel) :] = float("nan")
    found["finite"] = [not_finite(second)]
    first, second = (scalar("llama", seed=3, rows=500, split=x) for x in (None, split_for()))
    found["new head"] = differences(first, model_copy(second, split_for()))
    first, second = (scalar("reward", trained=True, split=x) for x in (None, split_for()))
    found["reward model"] = differences(first.backbone, second.backbone)
    if not torch.equal(first.head.weight, second.head.weight):
        found["reward model"].append("head")
    for name in ("missing", "nan", "shape"):
        texts = []
        for split in (None, split_for()):
            try:
                load_causal_lm(f"{folder}/{name}", torch.float32, CPU, say=str, split=split)
            except UserError as error:
                texts.append(str(error))
        found[name] = texts
    _write(file, found)


def load_large(file: str, folder: str) -> None:
    """`file` gets the anonymous memory in bytes that a rank needs at most while it splits a model, beyond its part."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: tensors that are freed go back to the kernel at once
    init_distributed(60)
    load_causal_lm(f"{folder}/llama", torch.float32, CPU, say=str, split=split_for())  # imports, hooks, buffers
    split, before, held, beyond = split_for(), _anonymous(), [], []

    def noted(parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            beyond.append(_anonymous() - before - sum(held))
            split([parameter])
            held.append(own_part(parameter).nbytes)

    load_causal_lm(f"{folder}/large", torch.float32, CPU, say=str, split=noted)
    _write(file, {"most": max(beyond)})


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _write(file: str, found: dict) -> None:
    """Writes {key: [what each rank found]}, and leaves the group."""
    everyone = gather_objects(found)
    if is_main():
        Path(file).write_text(json.dumps({key: [own[key] for own in everyone] for key in found}))
    barrier()
    shutdown_distributed()
