"""What two ranks that share a copy of the model in vLLM do in tests of this folder; see tests/vllm/jobs.py."""

import torch
from transformers import AutoModelForCausalLM

from ppo.models import PolicyModel
from ppo.vllm_sampler import VLLMSampler, start_vllm
from tests.helpers.parts import ppo_config
from utils.distributed import rank
from utils.engine.engine import TrainEngine, init_distributed, shutdown_distributed
from utils.tokenizer import load_tokenizer


def damage_shards(folder: str, stage: int) -> dict[str, list]:
    """Returns for each tensor what `explain` says of it, on this rank, if rank 1 loads it with another first element,
    and with another last element; under the key "" for the weights as they are.
    """
    init_distributed(60)
    config = ppo_config(zero_stage=stage, policy_model_path=folder, vllm_tensor_parallel_size=2)
    tokenizer = load_tokenizer(folder, "moss_en")
    vllm = start_vllm(config, folder, "--policy_model_path", tokenizer, 0.5, prompts=4)
    policy = TrainEngine(PolicyModel(AutoModelForCausalLM.from_pretrained(folder), even_tokens=64), config, "policy")
    sampler = VLLMSampler(policy, tokenizer, config, vllm)
    vllm.wake("weights")
    sampler.sync()
    said = {"": [sampler.explain()]}
    for name in [name for name, _ in sampler.weights()]:
        said[name] = []
        for place in (0, -1):
            vllm.load(changed(sampler, name, place if rank() == 1 else None))
            said[name].append(sampler.explain())
    shutdown_distributed()
    return said


def changed(sampler: VLLMSampler, name: str, place: int | None):
    """The policy's weights, where an element of the tensor `name` is larger by 1."""
    for other, tensor in sampler.weights():
        if other == name and place is not None:
            tensor = tensor.clone()
            with torch.no_grad():
                tensor.view(-1)[place] += 1
        yield other, tensor
