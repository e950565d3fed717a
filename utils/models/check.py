"""Checks, when a model is loaded, that it gives the same results here as in its own plain forward.

The reference is that forward of one row at a time, in the run's dtype, without padding, mask or cache. It differs for a
model that mixes tokens, or changes logits after the head, in a way that is unknown here.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from utils.distributed import any_rank
from utils.errors import Say, UserError
from utils.models.chunked_logprobs import head_logits
from utils.models.padding_free import decoder_of, joins_rows, states_of
from utils.models.split import is_split, whole_shape

LENGTHS = (29, 17, 6)  # tokens of the rows
LEAST_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.01}
MARGIN = 4  # correct paths (dense and mixture models, 2 to 32 layers, bf16) deviated by 0.06 to 1.08 sensitivities
DOUBT = 0.3  # share of the tolerance above which the check is repeated in float32
SMALL = 0.2  # share of the tolerance if both results come from the same layers
# Errors of a model that is called in a way that it does not support.
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError
)  # fmt: skip


class Probe:
    """A few rows and the model's own outputs for each: logits of a causal LM, or states of a decoder.

    `true` holds [length, n] per row. `tolerance` is MARGIN times the model's deviation when embeddings change by the
    dtype's epsilon: rounding errors grow with depth. Raises UserError, which calls the model `what`, if it does not
    run.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, what: str, with_head: bool = True):
        self.model, self.with_head = model, with_head
        self.decoder = decoder_of(model) if with_head else model
        self.what, self.kind = what, type(model).__name__
        self.rows = probe_rows(model)
        if failure := self.deviation(self._run_alone):
            raise UserError(f"{what}: {self.kind} does not run on text alone ({failure}); use another model")

    def _run_alone(self) -> float:
        dtype = next(self.model.parameters()).dtype
        self.epsilon, self.tolerance = torch.finfo(dtype).eps, LEAST_TOLERANCE[dtype]
        self.true = [self.alone(row) for row in self.rows]
        hook = self.model.get_input_embeddings().register_forward_hook(self._round)
        try:
            sensitivity = distance([self.alone(self.rows[0])], self.true[:1])
            self.tolerance = max(self.tolerance, MARGIN * sensitivity)
        finally:
            hook.remove()
        return 0.0

    def _round(self, module: nn.Module, args: tuple, embedded: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(embedded.shape, generator=torch.Generator().manual_seed(0)).to(embedded.device)
        return (embedded.float() * (1 + self.epsilon * (2 * noise - 1))).to(embedded.dtype)

    def alone(self, row: torch.Tensor) -> torch.Tensor:
        """Returns the outputs of the model's own forward for ids [length]: [length, n]."""
        output = self.model(input_ids=row[None], use_cache=False)
        return (output.logits if self.with_head else output.last_hidden_state)[0]

    def of_states(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the outputs that this repository computes from states [n, hidden] of the decoder."""
        if not self.with_head:
            return states
        return head_logits(self.model.get_output_embeddings(), self.model.config.get_text_config(), states)

    def head(self) -> float:
        """Returns the deviation of the head for a row alone."""
        states = self.decoder(input_ids=self.rows[0][None], use_cache=False).last_hidden_state[0]
        return distance([self.of_states(states)], self.true[:1])

    def beginning(self) -> float:
        """Returns the deviation of the first half of a row alone from the same positions of the whole row."""
        half = len(self.rows[0]) // 2
        return distance([self.alone(self.rows[0][:half])], [self.true[0][:half]])

    def together(self) -> float:
        """Returns the deviation of rows that share a forward, as in scoring and training."""
        read = pad_sequence([torch.ones_like(row) for row in self.rows], batch_first=True).bool()
        states = states_of(self.decoder, pad_sequence(self.rows, batch_first=True), read)
        return distance(self.of_states(states).split(LENGTHS), self.true)

    @torch.no_grad()
    def deviation(self, run: Callable[[], float], share: float = 1.0) -> str | None:
        """Returns None if `run` deviates by at most `share` * tolerance on all ranks, else the reason. Collective."""
        failure, far, limit, place = None, 0.0, 0.0, self.rows[0].device
        try:
            far = run()
            limit = share * self.tolerance
        except torch.OutOfMemoryError:
            raise
        except FAILURES as error:
            failure = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        # Forwards may be collective: all ranks decide together whether there are more.
        is_far = f"off by {far:.2g} standard deviations"
        if any_rank(failure is not None or not far <= limit, place):
            return failure or (is_far if not far <= limit else "off on another rank")
        if any_rank(far > DOUBT * limit, place) and any_rank(self._is_off(run, share), place):
            return is_far
        return None

    def _is_off(self, run: Callable[[], float], share: float) -> bool:
        """Whether `run` deviates in float32 too, that is, not by rounding. False if the model cannot run in float32."""
        kept = self.true, self.epsilon, self.tolerance
        try:
            with in_float32(self.model):
                self._run_alone()
                return not run() <= share * self.tolerance
        except (torch.OutOfMemoryError, *FAILURES):  # as with flash attention
            return False
        finally:
            self.true, self.epsilon, self.tolerance = kept


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Context in which the parameters are float32 copies, of 4 bytes each."""
    parts = [parameter.ds_tensor for parameter in model.parameters() if is_split(parameter)]
    kept = [(tensor, tensor.data) for tensor in (*model.parameters(), *parts)]
    try:
        for tensor, data in kept:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def probe_rows(model: PreTrainedModel) -> list[torch.Tensor]:
    """Returns rows of LENGTHS ids without special ones, the same in every call, on the model's device."""
    device, rows = model.get_input_embeddings().weight.device, whole_shape(model.get_input_embeddings().weight)[0]
    parts = (model.config, model.config.get_text_config())
    taken = {x for part in parts for name, x in vars(part).items() if "token" in name and isinstance(x, int)}
    free = torch.tensor([i for i in range(min(rows, 50_000)) if i not in taken])
    generator = torch.Generator().manual_seed(0)
    return [free[torch.randint(len(free), (length,), generator=generator)].to(device) for length in LENGTHS]


def distance(found: list[torch.Tensor], true: list[torch.Tensor]) -> float:
    """Returns the largest deviation of a row from its reference [positions, n], in standard deviations over n.

    Means over n do not count (softmax). The deviation of a row is the mean over its positions, so that a router whose
    choice changes at one position by rounding is no error.
    """

    def centred(x: torch.Tensor) -> torch.Tensor:
        return x.float() - x.float().mean(-1, keepdim=True)

    pairs = [(centred(a), centred(b)) for a, b in zip(found, true, strict=True)]
    rows = [(a - b).norm(dim=-1) / b.norm(dim=-1) for a, b in pairs]
    return max(float(row.nan_to_num(torch.inf, torch.inf).mean()) for row in rows)


def check_forward(model: PreTrainedModel, what: str, say: Say = print, with_head: bool = True) -> None:
    """Raises UserError if results here would differ from those of the model's own forward. Collective.

    If only rows joined end to end differ, prints a line and pads rows from then on. with_head: False for a decoder.
    """
    probe = Probe(model, what, with_head)
    if far := with_head and probe.deviation(probe.head, SMALL):
        raise UserError(
            f"{what}: {probe.kind} changes its logits after the head in a way that "
            f"utils/models/chunked_logprobs.py does not implement ({far}); add it to head_logits, or use another model"
        )
    if far := probe.deviation(probe.beginning):
        raise UserError(f"{what}: {probe.kind} attends to later tokens ({far}); use a causal model")
    far = probe.deviation(probe.together)
    if far and joins_rows(probe.decoder):
        probe.decoder.keeps_padding = True
        say(f"{what}: rows of {probe.kind} are padded, since joined rows fail the check ({far})")
        far = probe.deviation(probe.together)
    if far:
        raise UserError(f"{what}: {probe.kind} gives other results in a padded batch ({far}); use another model")
