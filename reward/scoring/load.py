"""Loads critics and reward models; a reward model with the tokenizer and template that it was trained on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from data.template import encode_dialogue
from data.texts import template_arguments
from reward.model import ScalarModel, load_scalar_model
from reward.scoring.ensemble import Encoding, Ensemble, Frozen, Member, check_labels
from reward.scoring.flags import RewardFlags
from utils.engine.engine import DTYPES, device
from utils.errors import Say, UserError
from utils.models.load import check_window, tokenizer_folder, window_of
from utils.models.split import Split, model_copy
from utils.tokenizer import has_tokenizer, load_tokenizer, template_of

PROBE = [
    {"role": "user", "content": "Why is 2 + 2 = 4?\n\n你好 🙂"},
    {"role": "assistant", "content": "Because; it is."},
    {"role": "user", "content": "ok  then"},
    {"role": "assistant", "content": "“Fine”."},
]


@dataclass(frozen=True)
class Reader:
    """A reward model on disk, and its own (tokenizer, template); None if it reads the policy's ids."""

    path: str
    own: tuple | None


def reward_readers(config: RewardFlags, tokenizer, say: Say) -> list[Reader]:
    """Compares tokenizers and templates of a run's reward models with the policy's; reads no weights."""
    template = template_of(tokenizer)
    check_labels(config.reward_paths, config.reward_flag)
    readers = []
    for path, tokenizer_path, reward_template in config.reward_sources():
        own = _own_encoding(path, config.reward_flag, tokenizer_path, reward_template, tokenizer, template)
        if own:
            say(f"{path} has another tokenizer or template ({own[1]}) than the policy: it encodes the answers again")
        readers.append(Reader(path, own))
    return readers


def _own_encoding(path: str, flag: str, source: str | None, name: str | None, tokenizer, template: str) -> tuple | None:
    """Returns (tokenizer, template) of a reward model, or None if they give the same ids as the policy's."""
    folder = tokenizer_folder(path, flag)
    source = source or (str(folder) if has_tokenizer(folder) else None)
    if source is None:
        if name not in (None, template):
            raise UserError(f"--reward_template {name}: {path} has no tokenizer; give --reward_tokenizer_name_or_path")
        return None
    load = partial(
        load_tokenizer, source, arguments=template_arguments(tokenizer), flag="--reward_tokenizer_name_or_path",
        template_flag="--reward_template",
    )  # fmt: skip
    theirs = load()
    borrowed = name is None and template == "chat" and not theirs.chat_template
    if borrowed:
        theirs.chat_template = tokenizer.chat_template
    else:
        name = name or template_of(theirs) or template
        theirs = load(name)
    if _same_ids(tokenizer, template, theirs, name or template):
        return None
    if borrowed:
        problem = f"{path} has another tokenizer than the policy, without a chat template"
        raise UserError(f"--reward_template is missing: {problem}; give the template that it was trained with")
    return theirs, name


def _same_ids(tokenizer, template: str, theirs, their_template: str) -> bool:
    """Returns whether a reward model can read the policy's ids: same ids of all tokens and of a dialogue."""
    if not tokenizer.get_vocab().items() <= theirs.get_vocab().items():
        return False
    return encode_dialogue(tokenizer, PROBE, template) == encode_dialogue(theirs, PROBE, their_template)


def load_ensemble(
    config: RewardFlags, readers: list[Reader], tokenizer, rows: int, freeze: Callable[[nn.Module], Frozen],
    say: Say, critic: tuple[str, ScalarModel] | None = None, split: Split | None = None,
    load: Callable[[str], ScalarModel] | None = None,
) -> Ensemble | None:  # fmt: skip
    """Loads and freezes the reward models one after the other; returns None if there are none.

    rows: number of the policy's embeddings. critic: its (path, model), copied if it is also a reward model. freeze:
    also moves a model to host memory if it is offloaded. split: as in `load_causal_lm`. load: loads those that read the
    policy's ids, instead of `load_scalar`.
    """
    load = load or (lambda path: load_scalar(config, path, tokenizer, rows, say, split=split))
    members = []
    for reader in readers:
        if reader.own:
            model = _load(config, reader.path, config.reward_flag, reader.own[0], say, trained=True, split=split)
            encoding = Encoding(*reader.own, window_of(model))
        else:
            same = critic is not None and reader.path == critic[0]
            model = model_copy(critic[1], split) if same else load(reader.path)
            encoding = None
        members.append(Member(freeze(model), window_of(model), encoding))
    return Ensemble(members, config.reward_ensemble, config.ensemble_std_coef) if members else None


def load_scalar(
    config: RewardFlags, path: str, tokenizer, rows: int, say: Say, flag: str | None = None, split: Split | None = None,
    merge: bool = True,
) -> ScalarModel:  # fmt: skip
    """Loads a critic, or a reward model that reads the policy's ids, with at least the policy's `rows` embeddings."""
    flag = flag or config.reward_flag
    trained = path in config.reward_paths
    model = _load(config, path, flag, tokenizer, say, trained=trained, rows=rows, split=split, merge=merge)
    check_window(model, config.maxlen_prompt, f"{flag} {path}: --maxlen_prompt")
    return model


def _load(config: RewardFlags, path: str, flag: str, tokenizer, say: Say, **options) -> ScalarModel:
    dtype, attention = DTYPES[config.dtype], config.attn_implementation
    return load_scalar_model(
        path, dtype, device(), attention, tokenizer, seed=config.seed, say=say, flag=flag, **options
    )


def check_same_tokenizer(path: str, flag: str, tokenizer, template: str) -> None:
    """Raises UserError if a critic's own tokenizer has other ids than the policy's, which the critic reads."""
    folder = tokenizer_folder(path, flag)
    if not has_tokenizer(folder):
        return
    template = template if template == "moss_zh" else None  # only its tags change ids
    theirs = load_tokenizer(str(folder), template, flag=flag)
    if not tokenizer.get_vocab().items() <= theirs.get_vocab().items():
        other = "another tokenizer than the policy's, whose ids the critic reads"
        raise UserError(f"{flag} {path} was trained with {other}; give another critic, and this as --reward_model_path")
