"""Continuous batching: when a response ends, the next prompt takes its cache slot, so no slot waits for the longest."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from data.batching.collate import pad
from ppo.decoding.cuda_graphs import StepGraphs, bucket_of
from ppo.decoding.kv_cache import SlotCache, columns_for, slots_for
from ppo.decoding.sampling import Sampling, sample, uniforms
from utils.distributed import max_ranks
from utils.models.chunked_logprobs import logprobs_and_entropy
from utils.run.stop_signal import requested
from utils.tensors import position_ids, to_device
from utils.tokenizer import stop_ids


@dataclass(frozen=True)
class DecodingOptions:
    """Sizes and kernels of decoding. They change speed and memory; they change results by rounding only."""

    max_slots: int
    """Sequences decoded at once"""
    prefill_tokens: int
    """Tokens of a forward over prompts, padding included; a longer prompt has a forward of its own"""
    cache_tokens: int = 0
    """Tokens of the key-value cache: reduces the number of slots, to at least 1; 0: no limit"""
    steps_per_check: int = 1
    """Forwards between two checks which responses have ended; each check waits for the device"""
    llama_step: bool = False
    """New tokens bypass the model's own forward: ppo/decoding/llama_step.py"""
    triton: bool = False
    """Attention by the kernels of ppo/decoding/ragged_attention.py; needs `llama_step`"""
    cuda_graphs: bool = False
    """Decoding steps run as CUDA graphs: ppo/decoding/cuda_graphs.py; needs `triton`"""


class Decoder:
    """Samples one response per prompt, of at most limits[i] tokens, its end token included.

    policy: called with `decode=`, the arguments of `PolicyModel.next_logits`. measure: keep log-probabilities and
    entropies of the tokens. watch: called after each forward with its logits [slots, vocabulary], which are valid until
    the next forward. `slots` holds one row per slot on the device: prompt: index in `prompts`; start: tokens of the
    prompt; count: response tokens so far; last: the newest of them; ended; draws: a random number per response token;
    seen (with a repetition penalty): [vocabulary], True for tokens of the response.
    """

    def __init__(
        self, policy: Callable, prompts: list[list[int]], places: list[int], limits: list[int], sampling: Sampling,
        seed: int, tokenizer, options: DecodingOptions, device: torch.device, measure: bool = False,
        watch: Callable[[torch.Tensor], None] | None = None,
    ):  # fmt: skip
        self.policy, self.prompts, self.sampling, self.seed, self.options = policy, prompts, sampling, seed, options
        self.pad, self.device, self.watch = tokenizer.pad_token_id, device, watch
        self.stops = torch.tensor(stop_ids(tokenizer), device=device)
        # Sorted, so that a forward over prompts has little padding, and equal prompts are neighbours.
        self.waiting = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
        longest = max((len(ids) + limit for ids, limit in zip(prompts, limits, strict=True)), default=0)
        columns = columns_for(longest + options.steps_per_check)
        num_slots = slots_for(min(options.max_slots, len(prompts)), columns, options.cache_tokens)
        self.cache = SlotCache(num_slots, columns, device)
        self.prefill_from = max(1, num_slots // 8)  # a forward over one prompt takes about as long as one over a few
        self.places, self.limits = (torch.tensor(x, device=device) for x in (places, limits))
        most = max(limits, default=0) + 1
        self.tokens = torch.empty(len(prompts), most, dtype=torch.int64, device=device)
        self.measured = torch.empty(2, *self.tokens.shape, device=device) if measure else None
        self.lengths = torch.zeros(len(prompts), dtype=torch.int64, device=device)
        self.slots = {
            name: torch.zeros(num_slots, dtype=torch.int64, device=device)
            for name in ("prompt", "start", "count", "last")
        }
        self.slots["ended"] = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.slots["draws"] = torch.zeros(num_slots, most, dtype=torch.float64, device=device)
        self._mark_unused(slice(None))
        self.graphs = StepGraphs() if options.cuda_graphs else None

    @torch.no_grad()
    def run(self, lockstep: bool = False) -> list[torch.Tensor]:
        """Returns the tokens of each response. lockstep: all ranks step until the last response has ended.

        Ends early, with incomplete responses, after a signal (`stop_signal.requested`).
        """
        while self._goes_on(lockstep):
            for _ in range(self.options.steps_per_check):
                self.forward()
            self._free_ended()
        return self._of_responses(self.tokens)

    @torch.no_grad()
    def stream(self) -> Iterator[int]:
        """Yields the tokens of the only prompt's response, each as soon as it is drawn: those of `run`."""
        for place in range(int(self.limits[0])):
            self.forward()
            yield int(self.tokens[0, place])
            if self.slots["ended"][0]:
                return

    def measurements(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Returns (log-probabilities, entropies) of each response's tokens, float32, as scoring computes them."""
        logprobs, entropy = map(self._of_responses, self.measured)
        return logprobs, entropy

    def _goes_on(self, lockstep: bool) -> bool:
        """Whether there is more to do, and no signal to stop; in lockstep, the same on all ranks."""
        state = 2 if requested() else int(self.busy)
        return (max_ranks(state, self.device) if lockstep else state) == 1

    @property
    def busy(self) -> bool:
        """Whether a prompt waits or a slot is in use."""
        return bool(self.waiting or self.cache.live)

    def forward(self) -> None:
        """Does one forward: over new prompts, over the slots in use, or, if neither is left, over a dummy token."""
        free = self.cache.num_slots - self.cache.live
        if self.waiting and free >= min(self.prefill_from, len(self.waiting)):
            self._prefill(free)
        elif self.cache.live:
            self._next_tokens()
        else:
            dummy = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            self.policy(decode={"input_ids": dummy, "use_cache": False, "logits_to_keep": 1})

    def _of_responses(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Cuts each prompt's row to the length of its response."""
        return [row[:length] for row, length in zip(values, self.lengths.tolist(), strict=True)]

    def _free_ended(self) -> None:
        """Frees the slots of responses that have ended. Waits for the device."""
        live = self.cache.live
        ended = self.slots["ended"][:live].tolist()
        if any(ended):
            self.lengths[self.slots["prompt"][:live]] = self.slots["count"][:live]
            if moved := self.cache.keep([i for i, over in enumerate(ended) if not over]):
                source, target = moved
                for x in self.slots.values():
                    x[target] = x[source]
            self._mark_unused(slice(self.cache.live, live))

    def _mark_unused(self, rows: slice) -> None:
        """Marks slots as not in use. A graph draws tokens for them too, into the last column, which is not read."""
        self.slots["count"][rows], self.slots["ended"][rows] = self.tokens.shape[1] - 1, True

    def _next_prompts(self, free: int) -> tuple[list[int], list[list[int]], list[int]]:
        """Returns (indices, the different prompts among them, for each index which of these it is)."""
        different, sources = [], []
        for i in self.waiting[:free]:
            if not different or self.prompts[i] != different[-1]:
                if different and (len(different) + 1) * len(different[0]) > self.options.prefill_tokens:
                    break
                different.append(self.prompts[i])
            sources.append(len(different) - 1)
        indices, self.waiting = self.waiting[: len(sources)], self.waiting[len(sources) :]
        return indices, different, sources

    def _prefill(self, free: int) -> None:
        """Puts new prompts into free slots with one forward, and draws their first response tokens."""
        indices, different, sources = self._next_prompts(free)
        ids, mask = (to_device(x, self.device) for x in pad(different, self.pad, side="left"))
        source, prompt = (to_device(torch.tensor(x), self.device) for x in (sources, indices))
        shared = source if len(different) < len(indices) else None
        new = slice(self.cache.live, self.cache.live + len(indices))
        self.cache.append(mask[source], [len(self.prompts[i]) for i in indices], shared)
        logits = self._logits(ids, mask, position_ids(mask))
        logits = logits if shared is None else logits[shared]
        self._start(new, prompt, mask[source], logits.shape[-1])
        self._draw(new, logits)
        self._show(logits)

    def _start(self, new: slice, prompt: torch.Tensor, mask: torch.Tensor, vocabulary: int) -> None:
        """Sets the state of new slots before their first response token."""
        slots = self.slots
        slots["prompt"][new], slots["start"][new] = prompt, mask.sum(1)
        slots["count"][new], slots["ended"][new] = 0, False
        positions = torch.arange(slots["draws"].shape[1], device=self.device)
        slots["draws"][new] = uniforms(self.seed, self.places[prompt][:, None], positions)
        if self.sampling.repetition_penalty != 1.0:
            if "seen" not in slots:
                shape = (self.cache.num_slots, vocabulary)
                slots["seen"] = torch.zeros(shape, dtype=torch.bool, device=self.device)
            slots["seen"][new] = False

    def _next_tokens(self) -> None:
        """Draws the next token of every slot in use."""
        mask, live = self.cache.advance(), self.cache.live
        if not self.options.triton:
            self._show(self._step_rows(slice(0, live), mask))
            return
        rows = bucket_of(live, self.cache.num_slots)
        step = partial(self._step_rows, slice(0, rows), None)
        self._show((self.graphs.run(rows, step) if self.graphs else step())[:live])

    def _step_rows(self, rows: slice, mask: torch.Tensor | None) -> torch.Tensor:
        """Draws a token for each of these slots; returns the logits. mask None: kernels read it from the device."""
        positions = self.slots["start"][rows] + self.slots["count"][rows] - 1
        logits = self._logits(self.slots["last"][rows, None], mask, positions[:, None], self.options.llama_step)
        self._draw(rows, logits)
        return logits

    def _show(self, logits: torch.Tensor) -> None:
        if self.watch:
            self.watch(logits)

    def _logits(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, llama_step: bool = False
    ) -> torch.Tensor:
        """Returns the logits after the last position: [batch, vocabulary]."""
        return self.policy(
            decode={
                "input_ids": ids, "attention_mask": mask, "position_ids": positions,
                "past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1, "llama_step": llama_step,
            }
        )  # fmt: skip

    def _draw(self, rows: slice, logits: torch.Tensor) -> None:
        """Draws one token per slot. A slot that has ended draws too until it is freed; its tokens are not kept."""
        slots = {name: x[rows] for name, x in self.slots.items()}
        uniform = slots["draws"].gather(1, slots["count"][:, None]).squeeze(1)
        token = sample(logits, uniform, self.sampling, slots.get("seen"))
        if "seen" in slots:
            slots["seen"].scatter_(1, token[:, None], True)
        self.tokens[slots["prompt"], slots["count"]] = token
        if self.measured is not None:
            numbers = logprobs_and_entropy(logits, token, self.sampling.temperature, with_entropy=True)
            self.measured[:, slots["prompt"], slots["count"]] = torch.stack(numbers)
        slots["last"].copy_(token)
        slots["count"] += ~slots["ended"]
        slots["ended"] |= (token[:, None] == self.stops).any(1) | (slots["count"] >= self.limits[slots["prompt"]])
