"""Continuous decoding: where a response ends the next prompt takes its slot, so that none waits for the longest."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from data.batching.collate import pad
from ppo.decoding.cuda_graphs import StepGraphs, bucket_of
from ppo.decoding.kv_cache import SlotCache, columns_for, slots_for
from ppo.decoding.sampling import Sampling, sample, uniforms
from utils.distributed import any_rank
from utils.models.chunked_logprobs import logprobs_and_entropy
from utils.tensors import position_ids, to_device
from utils.tokenizer import stop_ids


@dataclass(frozen=True)
class Room:
    """What decoding may take of a device: speed and memory, nothing else."""

    max_slots: int
    """Sequences at once"""
    prefill_tokens: int
    """Tokens of a forward over prompts, padding included; a longer prompt stands alone"""
    cache_tokens: int = 0
    """Tokens of the key-value cache: fewer slots where it is less than they would take, but one; 0: no bound"""
    alone_from: int | None = None
    """Columns from which on attention gets the length of every slot in place of a mask: attention.py. None:
    never"""
    steps_per_look: int = 1
    """Forwards between two looks at which responses have ended: on a GPU each look waits for it"""
    straight: bool = False
    """New tokens go through the layers without the model's own forward: ppo/decoding/llama_step.py"""
    ragged: bool = False
    """New tokens attend to their slot's own columns by the kernels of ragged_attention.py; needs `straight`"""
    graphs: bool = False
    """Decoding steps run as CUDA graphs (ppo/decoding/cuda_graphs.py); needs `ragged`"""


@torch.no_grad()
def decode_all(
    decode: Callable, prompts: list[list[int]], places: list[int], limits: list[int], sampling: Sampling, seed: int,
    tokenizer, room: Room, device: torch.device, together: bool = False, watch: Callable | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """One response a prompt, its end included, of at most limits[i] tokens. decode: the policy, called with `decode=`.

    together: every rank does the same number of forwards, until the last response of all ranks has ended. watch: is
    called after each forward with the logits [slots, vocabulary] of its tokens, which are valid until the next.
    """
    decoder = _Decoder(decode, prompts, places, limits, sampling, seed, tokenizer, room, device)
    decoder.watch = watch
    decoder.run(together)
    return decoder.of_responses(decoder.tokens)


@torch.no_grad()
def decode_measured(*args, together: bool = False) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """(what `decode_all` returns of the same arguments, log-probabilities of the tokens, entropies before them).

    float32, at the sampling temperature, without top-p and penalty: what scoring calculates, from the decoder's logits.
    """
    decoder = _Decoder(*args)
    decoder.measured = torch.empty(2, *decoder.tokens.shape, device=decoder.device)
    decoder.run(together)
    tokens, logprobs, entropy = map(decoder.of_responses, (decoder.tokens, *decoder.measured))
    return tokens, logprobs, entropy


class _Decoder:
    """Prompts that wait, longest first, and slots that decode. `slots` holds a row a slot of what the device knows:

    prompt: index in `prompts`; start: its tokens; count: response tokens so far; last: the newest of them; ended;
    draws: a random number for each response token; seen: the vocabulary, True for tokens of the response (with a
    penalty).
    """

    def __init__(self, decode, prompts, places, limits, sampling, seed, tokenizer, room: Room, device: torch.device):
        self.decode, self.prompts, self.sampling, self.seed, self.room = decode, prompts, sampling, seed, room
        self.pad, self.device = tokenizer.pad_token_id, device
        self.stops = torch.tensor(stop_ids(tokenizer), device=device)
        # Padding is small among neighbours in length, and equal prompts are neighbours.
        self.waiting = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))
        longest = max((len(ids) + limit for ids, limit in zip(prompts, limits, strict=True)), default=0)
        columns = columns_for(longest + room.steps_per_look)
        num_slots = slots_for(min(room.max_slots, len(prompts)), columns, room.cache_tokens)
        self.cache = SlotCache(num_slots, columns, device)
        self.fill_from = max(1, num_slots // 8)  # a forward over a single prompt costs as much as one over a few
        self.places, self.limits = (torch.tensor(x, device=device) for x in (places, limits))
        most = max(limits, default=0) + 1
        self.tokens = torch.empty(len(prompts), most, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(len(prompts), dtype=torch.int64, device=device)
        self.slots = {
            name: torch.zeros(num_slots, dtype=torch.int64, device=device)
            for name in ("prompt", "start", "count", "last")
        }
        self.slots["ended"] = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self.slots["draws"] = torch.zeros(num_slots, most, dtype=torch.float64, device=device)
        self._idle(slice(None))
        self.graphs = StepGraphs() if room.graphs else None
        self.measured: torch.Tensor | None = None  # [log-probability and entropy, prompts, most], where asked for
        self.watch: Callable | None = None

    @property
    def busy(self) -> bool:
        """Something is left to do."""
        return bool(self.waiting or self.cache.live)

    def run(self, together: bool) -> None:
        """Until the last response, of all ranks if `together`, has ended."""
        while any_rank(self.busy, self.device) if together else self.busy:
            for _ in range(self.room.steps_per_look):
                self.forward()
            self.look()

    def of_responses(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Rows of prompts, each cut to its response."""
        return [row[:length] for row, length in zip(values, self.lengths.tolist(), strict=True)]

    def forward(self) -> None:
        """One forward of the model: over new prompts, over the live slots, or, with nothing left, over nothing."""
        free = self.cache.num_slots - self.cache.live
        if self.waiting and free >= min(self.fill_from, len(self.waiting)):
            self._fill(free)
        elif self.cache.live:
            self._advance()
        else:
            nothing = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            self.decode(decode={"input_ids": nothing, "use_cache": False, "logits_to_keep": 1})

    def look(self) -> None:
        """Asks the device which responses have ended, and frees their slots."""
        live = self.cache.live
        ended = self.slots["ended"][:live].tolist()
        if any(ended):
            self.lengths[self.slots["prompt"][:live]] = self.slots["count"][:live]
            if moved := self.cache.keep([i for i, over in enumerate(ended) if not over]):
                source, target = moved
                for x in self.slots.values():
                    x[target] = x[source]
            self._idle(slice(self.cache.live, live))

    def _idle(self, rows: slice) -> None:
        """Marks slots as not in use. As rows of a graph they draw tokens too, which go behind the longest response."""
        self.slots["count"][rows], self.slots["ended"][rows] = self.tokens.shape[1] - 1, True

    def _next_prompts(self, free: int) -> tuple[list[int], list[list[int]], list[int]]:
        """(indices, the different prompts among them, which of these each is)."""
        different, sources = [], []
        for i in self.waiting[:free]:
            if not different or self.prompts[i] != different[-1]:
                if different and (len(different) + 1) * len(different[0]) > self.room.prefill_tokens:
                    break
                different.append(self.prompts[i])
            sources.append(len(different) - 1)
        indices, self.waiting = self.waiting[: len(sources)], self.waiting[len(sources) :]
        return indices, different, sources

    def _fill(self, free: int) -> None:
        """New prompts into free slots: one forward, and their first response tokens."""
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
        """Sets the state of new slots before their first token: no token of the response has been seen."""
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

    def _advance(self) -> None:
        """The next token of every live slot."""
        mask, live = self.cache.advance(), self.cache.live
        if self.room.ragged:
            rows = bucket_of(live, self.cache.num_slots)
            step = partial(self._step, slice(0, rows), None)
            self._show((self.graphs.run(rows, step) if self.graphs else step())[:live])
            return
        if self.room.alone_from is not None and mask.shape[1] >= self.room.alone_from:
            mask = torch.tensor(self.cache.lengths).view(1, 1, 1, -1)  # transformers hands on what has four dimensions
        self._show(self._step(slice(0, live), mask))

    def _step(self, rows: slice, mask: torch.Tensor | None) -> torch.Tensor:
        """Draws a token for each of these slots; returns the logits. mask None: kernels read it from the device."""
        positions = self.slots["start"][rows] + self.slots["count"][rows] - 1
        logits = self._logits(self.slots["last"][rows, None], mask, positions[:, None], self.room.straight)
        self._draw(rows, logits)
        return logits

    def _show(self, logits: torch.Tensor) -> None:
        if self.watch:
            self.watch(logits)

    def _logits(
        self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, straight: bool = False
    ) -> torch.Tensor:
        """Returns the logits of the last position: [batch, vocabulary]."""
        return self.decode(
            decode={
                "input_ids": ids, "attention_mask": mask, "position_ids": positions,
                "past_key_values": self.cache, "use_cache": True, "logits_to_keep": 1, "straight": straight,
            }
        )  # fmt: skip

    def _draw(self, rows: slice, logits: torch.Tensor) -> None:
        """Draws one token per slot. A slot that has ended draws too until the next `look`; its tokens are not kept."""
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
