"""The policies in a run's folder, and how they are loaded: folders of models, and checkpoints of any ZeRO stage."""

import os
from dataclasses import dataclass, fields
from types import SimpleNamespace

import torch

from ppo.finished_policies import load_policy
from ppo.models import PolicyModel
from utils.errors import UserError
from utils.flags.lora import LoraFlags
from utils.models.adapter_folder import merge_adapters
from utils.models.adapters import train_adapter, trained_parameters
from utils.models.load import share_adapters
from utils.run.checkpoint import all_checkpoints
from utils.run.restore import saved_weights

FLAG = "--checkpoints"


@dataclass(frozen=True)
class Kept:
    """A policy of a run. step: None for best/, whose step no file names. checkpoint: it is no folder of a model."""

    name: str
    step: int | None
    path: str
    checkpoint: bool = False


def kept_policies(run: str, start: str, saved: dict) -> list[Kept]:
    """Returns the first policy of a run and those that it has kept, by step, best/ last. Raises UserError if none.

    saved: its config.json. Left out: checkpoints of steps that trained the critic only, and one that is final/.
    """
    alone, steps = (saved.get(name) or 0 for name in ("critic_pretrain_steps", "train_steps"))
    if not all(isinstance(x, int) for x in (alone, steps)):
        raise UserError(f"{FLAG} {run}: config.json has no numbers of steps; copy it again")
    exported = {name: os.path.join(run, name) for name in ("final", "best") if os.path.isdir(os.path.join(run, name))}
    found = {step: path for step, path in all_checkpoints(os.path.join(run, "checkpoints")) if step > alone}
    kept = [Kept(f"step {step}", step, found[step], checkpoint=True) for step in sorted(found)]
    if "final" in exported:
        kept = [one for one in kept if one.step < alone + steps] + [Kept("final", alone + steps, exported["final"])]
    kept += [Kept("best", None, exported["best"])] if "best" in exported else []
    if not kept:
        raise UserError(f"{FLAG} {run}: it has no checkpoint of a policy, no best/ and no final/; train it first")
    return [Kept("start", 0, start), *kept]


def load_kept(kept: Kept, config, saved: dict, tokenizer) -> PolicyModel:
    """Returns a policy, frozen, in --dtype. A checkpoint's float32 weights are rounded to it as in an export."""
    if not kept.checkpoint:
        return load_policy(kept.path, "--policy_model_path" if kept.name == "start" else FLAG, config, tokenizer)
    path, flag, lora = config.policy_model_path, "--policy_model_path", _lora_flags(saved, config)
    model = load_policy(path, flag, config, tokenizer, merge=not lora).requires_grad_()
    if lora:
        share_adapters(model, model.decoder, path, flag)
        train_adapter(model, model.decoder, "policy", lora)
    read_checkpoint(model, kept.path)
    if lora:
        merge_adapters(model.decoder)
        model.share(model.decoder)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def read_checkpoint(model: PolicyModel, path: str) -> None:
    """Copies the policy's float32 weights in a checkpoint to a model, one tensor at a time. Raises UserError."""
    weights, trained = saved_weights(path, "policy"), trained_parameters(model)
    try:
        weights.check_sizes({name: parameter.numel() for name, parameter in trained.items()})
    except KeyError as error:
        problem = f"{path} does not fit the policy that the run began with ({error.args[0]})"
        raise UserError(f"{FLAG}: {problem}; pass the right one with --policy_model_path") from None
    for name, parameter in trained.items():
        flat = torch.empty(parameter.numel())
        weights.read("weight", name, 0, flat)
        if not bool(flat.isfinite().all()):
            raise UserError(f"{FLAG}: {path} holds weights that are not finite ({name}); remove it")
        parameter.copy_(flat.view_as(parameter))


def _lora_flags(saved: dict, config) -> SimpleNamespace | None:
    """Returns the flags of a run's adapters, None if it trained all weights."""
    if not saved.get("lora_rank"):
        return None
    own = {x.name: saved[x.name] for x in fields(LoraFlags) if x.name in saved}
    try:
        flags = LoraFlags(**own)
        return SimpleNamespace(**vars(flags), adapter_scale=flags.adapter_scale, seed=config.seed)
    except TypeError as error:
        raise UserError(f"{FLAG} {config.checkpoints}: config.json has wrong flags of adapters ({error})") from None
