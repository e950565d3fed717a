"""What an engine has to keep to go on exactly: float32 weights and optimizer state, as this rank holds them.

DeepSpeed's own `load_checkpoint` unpickles whatever the file holds; here it is plain tensors, in safetensors. The
weights that the forward reads follow from the float32 ones, so they are not stored. Knows the names under which
DeepSpeed's ZeRO optimizers hold them (tests/end_to_end/test_resume.py runs every stage).
"""

import torch


def _master_weights(optimizer, zero_stage: int) -> list[torch.Tensor]:
    """The tensors that the inner optimizer steps: the parameters themselves, or this rank's flat float32 shares."""
    if zero_stage == 0:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return optimizer.fp32_partitioned_groups_flat if zero_stage == 3 else optimizer.single_partition_of_fp32_groups


def state_tensors(optimizer, zero_stage: int) -> dict[str, torch.Tensor]:
    """Name -> tensor, not copied: `weight.0`, and `exp_avg.0`, `exp_avg_sq.0`, `step.0` once a step has been made."""
    inner = optimizer.optimizer if zero_stage else optimizer
    tensors = {}
    for i, weight in enumerate(_master_weights(optimizer, zero_stage)):
        tensors[f"weight.{i}"] = weight.detach()
        for key, value in inner.state.get(weight, {}).items():
            tensors[f"{key}.{i}"] = torch.as_tensor(value)
    return tensors


@torch.no_grad()
def load_state_tensors(optimizer, zero_stage: int, tensors: dict[str, torch.Tensor]) -> None:
    """Takes over what `state_tensors` gave. Collective: the weights of the forward are gathered anew.

    Raises KeyError or RuntimeError where names or shapes are of another model, stage or number of ranks.
    """
    inner = optimizer.optimizer if zero_stage else optimizer
    if zero_stage == 3:
        optimizer.checkpoint_event_prologue()  # no rank holds whole weights from here to the epilogue
    for i, weight in enumerate(_master_weights(optimizer, zero_stage)):
        if tensors[f"weight.{i}"].shape != weight.shape:
            raise RuntimeError(f"weight.{i} has shape {tuple(tensors[f'weight.{i}'].shape)}, not {tuple(weight.shape)}")
        weight.copy_(tensors[f"weight.{i}"])
        names = [name for name in tensors if name.endswith(f".{i}") and not name.startswith("weight.")]
        inner.state.pop(weight, None)
        for name in names:
            value = tensors[name]
            counter = value.dim() == 0 and not value.is_floating_point()  # DeepSpeed's CPU Adam counts in a plain int
            inner.state[weight][name.removesuffix(f".{i}")] = (
                int(value) if counter else value.to(weight.device, copy=True)
            )
    if zero_stage == 3:
        for i in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        optimizer.checkpoint_event_epilogue()  # gathers the small ones that every rank keeps whole
    elif zero_stage:
        optimizer.update_lp_params()


def num_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes that these take on disk, but for a header."""
    return sum(x.numel() * x.element_size() for x in tensors.values())
