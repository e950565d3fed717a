"""Samples responses to prompts: the `Sampler` protocol and the sampler that decodes with the policy's engine."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from data.template import decode_answer
from ppo.config import PPOConfig
from ppo.decoding.attention import grouped
from ppo.decoding.cuda_graphs import is_capturable
from ppo.decoding.llama_step import can_run_llama_step, can_run_triton
from ppo.decoding.sampling import Sampling
from ppo.decoding.scheduler import Decoder, DecodingOptions
from ppo.types import MeasuredRollout, PromptBatch, Rollout
from utils.engine.engine import InferenceEngine, TrainEngine, device
from utils.models.compile import eager
from utils.tensors import at_tokens, to_device
from utils.tokenizer import stop_ids

# How new tokens are decoded, fastest first. triton: as llama_step, with the kernels of ragged_attention.py and CUDA
# graphs, on a GPU. llama_step: through the layers by llama_step.py; grouped is used instead for other architectures and
# split weights. grouped: the model's forward with the attention of attention.py. transformers: the model's forward.
DECODING = ("triton", "llama_step", "grouped", "transformers")


class Sampler(Protocol):
    """Samples one response per row of a rank's prompts with the policy's newest weights. Called by all ranks together.

    A sampler that also computes the policy's log-probabilities returns a `MeasuredRollout`, from which `score` takes
    them. It should check `stop_signal.requested` often and, if it is True, return any rollout of these prompts at once;
    `score` discards it.
    """

    def __call__(self, prompts: PromptBatch, sampling: Sampling, seed: int) -> Rollout:
        """Random numbers depend on (seed, place of the prompt, member of its group, position of the token) only."""
        ...


@dataclass(frozen=True)
class PolicySampler:
    """Samples with the policy's own engine; config.rollout_batch_size sequences at once, continuously refilled.

    Under ZeRO-3 the weights are gathered once if they fit (--gather_for_generation); otherwise all ranks step together.
    measure: return a `MeasuredRollout` if tokens are drawn from the policy's own distribution. watch: as for `Decoder`.
    """

    policy: TrainEngine | InferenceEngine
    tokenizer: object
    config: PPOConfig
    measure: bool = False
    watch: Callable[[torch.Tensor], None] | None = None

    @torch.no_grad()
    def __call__(self, prompts: PromptBatch, sampling: Sampling, seed: int) -> Rollout:
        measure = self.measure and sampling.from_model
        with self._decoder(prompts, sampling, seed, measure) as (decoder, lockstep):
            responses = decoder.run(lockstep)
        rollout = assemble(prompts.ids, responses, stop_ids(self.tokenizer), self.tokenizer.pad_token_id)
        return with_measured(rollout, *decoder.measurements()) if measure else rollout

    def stream(self, prompt: PromptBatch, sampling: Sampling, seed: int) -> Iterator[int]:
        """Yields the response tokens that a call returns for one prompt, each as soon as it is drawn. One process."""
        with self._decoder(prompt, sampling, seed) as (decoder, _):
            yield from decoder.stream()

    @contextlib.contextmanager
    def _decoder(
        self, prompts: PromptBatch, sampling: Sampling, seed: int, measure: bool = False
    ) -> Iterator[tuple[Decoder, bool]]:
        """Context in which the policy decodes. Yields the decoder, and whether all ranks have to step together."""
        policy, config = self.policy, self.config
        model = policy.module.eval()
        lockstep = policy.zero_stage == 3 and (
            config.gather_for_generation == "never"
            or (config.gather_for_generation == "auto" and not policy.fits_gathered())
        )
        limits = [config.maxlen_res] * len(prompts.ids)
        options = decoding_options(config, model, lockstep)
        attention = contextlib.nullcontext() if model.decoding == "transformers" else grouped(model.lm.config)
        weights = contextlib.nullcontext(policy) if lockstep else policy.gathered()
        with weights as whole, attention, eager(model):
            decoder = Decoder(
                whole, prompts.ids, prompts.streams, limits, sampling, seed, self.tokenizer, options, device(), measure,
                self.watch,
            )  # fmt: skip
            yield decoder, lockstep


def decoding_options(config: PPOConfig, model: nn.Module, split: bool = False) -> DecodingOptions:
    """Returns the options for a `PolicyModel`. split: its weights stay split over ranks (ZeRO-3)."""
    llama_step = model.decoding in ("triton", "llama_step") and not split and can_run_llama_step(model.decoder.config)
    triton = model.decoding == "triton" and llama_step and can_run_triton(model.decoder)
    return DecodingOptions(
        max_slots=model.slots if config.rollout_batch_size == "auto" else config.rollout_batch_size,
        prefill_tokens=config.micro_batch_tokens, cache_tokens=config.rollout_cache_tokens,
        steps_per_check=4 if device().type == "cuda" else 1, llama_step=llama_step, triton=triton,
        cuda_graphs=triton and is_capturable(model.decoder),
    )  # fmt: skip


def assemble(
    prompts: list[list[int]], responses: list[torch.Tensor], stops: int | tuple[int, ...], pad_id: int
) -> Rollout:
    """Joins prompts and their responses in a right-padded rollout. stops: the id, or ids, that end a response."""
    device = responses[0].device
    sizes = [len(prompt) for prompt in prompts]
    together = to_device(torch.tensor([i for prompt in prompts for i in prompt], dtype=torch.int64), device)
    rows = [torch.cat(pair) for pair in zip(together.split(sizes), responses, strict=True)]
    starts, lengths = (to_device(torch.tensor(x), device) for x in (sizes, [len(row) for row in rows]))
    sequences = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    places = torch.arange(sequences.shape[1], device=device)
    attention_mask = places < lengths[:, None]
    response_mask = attention_mask & (places >= starts[:, None])
    last = sequences.gather(1, (lengths - 1)[:, None])
    ended = (last == to_device(torch.tensor(stops), device)).any(1) & (lengths > starts)
    return Rollout(sequences, attention_mask, response_mask, ended)


def with_measured(rollout: Rollout, logprobs: list[torch.Tensor], entropy: list[torch.Tensor]) -> MeasuredRollout:
    """Adds the log-probabilities and entropies of each response's tokens to the rollout."""
    columns = (at_tokens(torch.cat(x), rollout.response_mask) for x in (logprobs, entropy))
    return MeasuredRollout(**vars(rollout), **dict(zip(("old_logprobs", "entropy"), columns, strict=True)))


def response_ids(rollout: Rollout) -> list[list[int]]:
    """Returns the response tokens of each row, the end token included."""
    sequences, masks = rollout.sequences.cpu(), rollout.response_mask.cpu()
    return [row[mask].tolist() for row, mask in zip(sequences, masks, strict=True)]


def response_texts(rollout: Rollout, tokenizer) -> list[str]:
    """Returns the responses as text, without end tokens."""
    return [decode_answer(tokenizer, ids) for ids in response_ids(rollout)]


def prompt_texts(rollout: Rollout, tokenizer) -> list[str]:
    """Returns the prompts as the model saw them: decoded from their tokens, with special tokens."""
    prompts = (rollout.attention_mask & ~rollout.response_mask).cpu()
    rows = zip(rollout.sequences.cpu(), prompts, strict=True)
    return [tokenizer.decode(row[mask].tolist(), clean_up_tokenization_spaces=False) for row, mask in rows]
