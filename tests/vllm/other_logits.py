"""train_ppo.main with a vLLM that multiplies logits by a factor that the policy lacks; the weights are equal."""

from vllm.model_executor.layers.logits_processor import LogitsProcessor

import train_ppo
from ppo import vllm_sampler


def main(argv: list[str]) -> None:
    start = vllm_sampler.VLLMSampler.__init__

    def start_with_a_factor(self, policy, tokenizer, config, engine, *others):
        start(self, policy, tokenizer, config, engine, *others)
        (processor,) = (module for module in engine.model.modules() if isinstance(module, LogitsProcessor))
        processor.scale = 1.3

    vllm_sampler.VLLMSampler.__init__ = start_with_a_factor
    train_ppo.main(argv)
