"""What is checked of a family: each stage loads the folder as its command does, and meets the plain forwards."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, PreTrainedModel

from data.dialogues import EncodedDialogue
from ppo.decoding.sampling import Sampling
from ppo.models import load_models
from ppo.rollout import PolicySampler
from reward.config import RewardConfig
from reward.model import load_scalar_model, save_scalar_model
from reward.stage import load as load_reward
from sft.config import SFTConfig
from sft.model import AnswerModel
from sft.packed_batches import Layout
from sft.stage import load as load_sft
from tests.architectures import plain
from tests.helpers.parts import ppo_config, prompts_of, token_ids
from utils.models.export import save_causal_lm
from utils.models.load import load_causal_lm, training_mode
from utils.tokenizer import load_tokenizer

PROMPT_LENGTHS = (23, 9, 16, 1, 9, 12, 3)
ROW_LENGTHS = (37, 12, 20, 7)
MOST_TOKENS = 64  # of a dialogue, for the checks of a model's window
NO_ID = -1
TOLERANCE = 1e-4
SUM_TOLERANCE = 1e-5  # of a sum over some fifty tokens, one of which may be wrong
GRADIENT_TOLERANCE = 1e-3
CPU = torch.device("cpu")


class Wrong(AssertionError):
    """Numbers differ from the plain ones. The message says which, and by how much."""


@dataclass
class Case:
    """One family's folder, and what the stages share. critic: a folder of LLaMA's kind with the same vocabulary."""

    folder: Path
    critic: Path

    @cached_property
    def plain(self) -> PreTrainedModel:
        """The model whose forwards are the truth."""
        return plain.load_plain(self.folder)

    @cached_property
    def tokenizer(self):
        """The folder's."""
        return load_tokenizer(str(self.folder))

    @cached_property
    def rows(self) -> list[torch.Tensor]:
        """Sequences of mixed lengths, longer than windows and chunks."""
        return [self.random_ids(length, seed) for seed, length in enumerate(ROW_LENGTHS)]

    @cached_property
    def starts(self) -> list[int]:
        """Where the response (or answer) of each row begins."""
        return [length // 3 for length in ROW_LENGTHS]

    def random_ids(self, length: int, seed: int) -> torch.Tensor:
        """Without the special ids, of which some embeddings make zeros."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, self.plain.config.get_text_config().vocab_size, (length,), generator=generator)

    @torch.no_grad()
    def answers_loss(self) -> torch.Tensor:
        """The plain loss of all answers, summed over their tokens."""
        pairs = zip(self.rows, self.starts, strict=True)
        return sum(-plain.logprobs_of(self.plain, row)[0][start - 1 :].sum() for row, start in pairs)

    def padded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sequences, attention_mask, response_mask) of the rows, right-padded."""
        masks = [torch.arange(len(row)) >= start for row, start in zip(self.rows, self.starts)]
        sequences, response = (pad_sequence(x, batch_first=True) for x in (self.rows, masks))
        real = pad_sequence([torch.ones_like(row) for row in self.rows], batch_first=True).bool()
        return sequences, real, response


def near(what: str, found: torch.Tensor, true: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Raises Wrong where numbers differ by more than the tolerance, in units of 1 + their size."""
    if found.shape != true.shape:
        raise Wrong(f"{what}: shape {list(found.shape)}, not {list(true.shape)}")
    far = ((found - true).abs() / (1 + true.abs())).max().item()
    if not far <= tolerance:
        raise Wrong(f"{what}: off by {far:.2g} (relative), {(found - true).abs().mean().item():.2g} on average")


def ppo(case: Case, scratch: Path) -> str:
    """train_ppo's models: scoring, its gradient, decoding, export."""
    config = ppo_config(
        policy_model_path=str(case.folder), critic_model_path=str(case.critic), reward_fn=["none.py:none"],
        rollout_batch_size=3, maxlen_prompt=MOST_TOKENS, maxlen_res=9, micro_batch_tokens=40,
    )  # fmt: skip
    policy = load_models(config, case.tokenizer, lambda _: None).policy
    causal(case)
    scoring(case, policy)
    gradient(case, policy.module)
    decoding(case, policy, config)
    state = {name.removeprefix("lm."): x for name, x in policy.full_state_dict().items()}
    folder = scratch / "policy"
    save_causal_lm(policy.module.lm.config, state, str(folder), case.tokenizer)
    exported(case, folder)
    return policy.module.decoding


@torch.no_grad()
def scoring(case: Case, policy: Callable) -> None:
    """Log-probs and entropy of right-padded rows."""
    sequences, _, mask = case.padded()
    for temperature in (1.0, 0.7):
        logprobs, entropy = policy(sequences, mask, temperature)
        for i, (row, start) in enumerate(zip(case.rows, case.starts)):
            true = plain.logprobs_of(case.plain, row, temperature)
            for what, found, wanted in zip(("log-probs", "entropy"), (logprobs, entropy), true):
                near(f"scoring: {what} at temperature {temperature:g}", found[i][mask[i]], wanted[start - 1 :])


def gradient(case: Case, model: torch.nn.Module) -> None:
    """Of a weighted sum of log-probs by every parameter, in the mode of the update."""
    sequences, _, mask = case.padded()
    training_mode(model)
    logprobs, _ = model(sequences, mask, 0.7)
    model.eval()
    own = {name: x for name, x in model.lm.named_parameters() if x.requires_grad}
    found = torch.autograd.grad(logprobs[mask] @ weights(int(mask.sum())), own.values(), allow_unused=True)
    parts = [plain.logprobs_of(case.plain, row, 0.7)[0][start - 1 :] for row, start in zip(case.rows, case.starts)]
    theirs = {name: x for name, x in case.plain.named_parameters() if x.requires_grad}
    true = torch.autograd.grad(torch.cat(parts) @ weights(int(mask.sum())), theirs.values(), allow_unused=True)
    true = {name: x for name, x in zip(theirs, true) if x is not None}
    largest = max(float(x.norm()) for x in true.values())
    for name, x in zip(own, found):
        wanted = true.get(name, torch.zeros(()))
        far = float((torch.zeros(()) if x is None else x).sub(wanted).norm())
        if not far <= GRADIENT_TOLERANCE * max(float(wanted.norm()), 1e-2 * largest):
            raise Wrong(f"gradient: of {name} off by {far:.2g}, its norm is {float(wanted.norm()):.2g}")


def weights(count: int) -> torch.Tensor:
    """Different ones, as a sum of all log-probs has little gradient in places."""
    return torch.linspace(-1.0, 1.0, count)


@torch.no_grad()
def decoding(case: Case, policy, config) -> None:
    """Responses of mixed prompts in few slots: what was sampled from is the plain distribution."""
    prompts = prompts_of(*(case.random_ids(length, 100 + length).tolist() for length in PROMPT_LENGTHS))
    for temperature in (1.0, 0.7):
        eos = NO_ID
        for _ in range(2):  # at first no response ends before the cap; then those that meet the commonest token
            rollout = PolicySampler(policy, token_ids(eos, 0), config, measure=True)(prompts, Sampling(temperature), 0)
            how = f"decoding at temperature {temperature:g}, " + ("none ends" if eos == NO_ID else "some end")
            for i, prompt in enumerate(prompts.ids):
                response = rollout.response_mask[i]
                if not rollout.ended[i] and response.sum() < config.maxlen_res:
                    raise Wrong(f"{how}: response {i} stops after {int(response.sum())} tokens")
                ids = rollout.sequences[i][rollout.attention_mask[i]]
                true = plain.logprobs_of(case.plain, ids, temperature)
                for what, found, wanted in zip(("log-probs", "entropy"), (rollout.old_logprobs, rollout.entropy), true):
                    near(f"{how}: {what}", found[i][response], wanted[len(prompt) - 1 :])
            eos = int(rollout.sequences[rollout.response_mask].mode().values)


def sft(case: Case, scratch: Path) -> str:
    """sft.train's model: the loss of packed and of single dialogues."""
    lm, layout = load_sft(SFTConfig(**flags(case)), case.tokenizer, lambda _: None)
    model = AnswerModel(lm)
    dialogues = [
        EncodedDialogue(ids=row.tolist(), answer_mask=[i >= start for i in range(len(row))], source="")
        for row, start in zip(case.rows, case.starts)
    ]
    with torch.no_grad():
        for packed in (False, True)[: 1 + layout.packing]:
            own = Layout(packing=packed, flat=False, max_tokens=MOST_TOKENS)
            loss = model(*own.collate(own.rows(dialogues, 1)))
            near(f"loss{' of packed dialogues' * packed}", loss, case.answers_loss(), SUM_TOLERANCE)
    causal(case)
    return "" if layout.packing else "not packed"


@torch.no_grad()
def causal(case: Case) -> None:
    """No token sees a later one: next-token losses are of a model that cannot read its targets."""
    row, half = case.rows[0], ROW_LENGTHS[0] // 2
    whole = plain.logits_of(case.plain, row)[:half]
    near("logits without the tokens behind", plain.logits_of(case.plain, row[:half]), whole)


def reward(case: Case, scratch: Path) -> None:
    """reward.train's model: a new head, every scalar; saved and loaded by transformers and by us."""
    model = load_reward(RewardConfig(**flags(case)), case.tokenizer, lambda _: None)
    backbone = plain.load_plain(case.folder, AutoModel)
    sequences, real, _ = case.padded()
    head = model.head.weight.float()[0]
    with torch.no_grad():
        true = [plain.states_of(backbone, row) @ head for row in case.rows]
        values = model(sequences, real)
        for i, wanted in enumerate(true):
            near("scalars", values[i][real[i]], wanted)
        save_scalar_model(model, str(scratch / "reward"), tokenizer=case.tokenizer)
        last = torch.stack([wanted[-1] for wanted in true])
        near("scores of the saved classifier", plain.score_of(scratch / "reward", case.rows), last)
        again = load_scalar_model(str(scratch / "reward"), torch.float32, CPU, say=lambda _: None, trained=True)
        near("scalars of the saved model", again(sequences, real), values)


def reward_lm(case: Case, scratch: Path) -> None:
    """reward.train's model with a language-model loss."""
    model = load_reward(RewardConfig(reward_lm_loss_factor=1.0, **flags(case)), case.tokenizer, lambda _: None)
    sequences, real, answer = case.padded()
    with torch.no_grad():
        near("loss", model(sequences, real, answer)[1], case.answers_loss(), SUM_TOLERANCE)


def flags(case: Case) -> dict:
    """Those that both trainers share."""
    folder = str(case.folder)
    return {"hf_model_name_or_path": folder, "data_path": ["D"], "dtype": "fp32", "context_truncate": MOST_TOKENS}


@torch.no_grad()
def exported(case: Case, folder: Path) -> None:
    """The folder has the tensors and the logits of the source."""
    before, after = (set().union(*map(load_file, x.glob("*.safetensors"))) for x in (case.folder, folder))
    if odd := before ^ after:
        raise Wrong(f"export: {len(odd)} tensor names differ from the source's, as {min(odd)}")
    again = load_causal_lm(str(folder), torch.float32, CPU, None, case.tokenizer, lambda _: None)
    row = case.rows[0]
    near("export: logits", plain.logits_of(again, row), plain.logits_of(case.plain, row))


# Each returns how it ran, where that differs between families.
STAGES: dict[str, Callable[[Case, Path], str | None]] = {
    "ppo": ppo,
    "sft": sft,
    "reward": reward,
    "reward with LM loss": reward_lm,
}
