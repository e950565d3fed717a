"""Merge an adapter into its model:   python -m utils.merge_adapter --adapter FOLDER --output FOLDER

Writes a whole model. Weights are added in float32 and rounded once to the model's dtype; the largest rounding error is
printed.
"""

import argparse
import os
from functools import partial

import torch
from transformers import AutoConfig

from reward.model import load_scalar_model, save_scalar_model
from utils.errors import UserError
from utils.flags.parser import entry_point
from utils.models.adapter_folder import read_head
from utils.models.export import save_causal_lm, saved_tensors
from utils.models.load import adapter_folders, load_causal_lm, model_folder, tokenizer_folder
from utils.tokenizer import load_tokenizer


@entry_point
@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Merges on the CPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", required=True, help="folder of an adapter in peft's format, or hub id")
    parser.add_argument("--output", required=True, help="folder of the whole model, which must not exist")
    options = parser.parse_args(argv)
    path, flag = options.adapter, "--adapter"
    folders = adapter_folders(path, flag)
    if not folders:
        raise UserError(f"{flag}: {path} is a whole model; pass the folder of an adapter")
    folder, cpu = model_folder(path, flag), torch.device("cpu")
    dtype = AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype or torch.float32
    if os.path.lexists(options.output):
        raise UserError(f"--output: {options.output} is there already; give another folder")
    tokenizer = load_tokenizer(str(tokenizer_folder(path, flag)), flag=flag)
    if read_head(folders[-1], flag) is not None:
        load = partial(load_scalar_model, path, device=cpu, tokenizer=tokenizer, say=str, flag=flag, trained=True)
        model, exact = load(dtype=dtype), load(dtype=torch.float32)
        save_scalar_model(model, options.output, tokenizer=tokenizer, value_pretrained=model.value_pretrained)
    else:
        load = partial(load_causal_lm, path, device=cpu, tokenizer=tokenizer, say=str, flag=flag)
        model, exact = load(dtype=dtype), load(dtype=torch.float32)
        save_causal_lm(model.config, saved_tensors(model), options.output, tokenizer, model.generation_config)
    pairs = zip(saved_tensors(model).values(), saved_tensors(exact).values(), strict=True)
    error = max(float((a.float() - b).abs().max()) for a, b in pairs)
    print(f"{options.output}: {str(dtype).removeprefix('torch.')}, largest rounding error of a weight {error:.3g}")


if __name__ == "__main__":
    main()
