"""Loading what scores: one or several reward models, each with the encoding that it was trained on."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from data.chat import template_arguments
from data.template import encode_dialogue
from reward.model import ScalarModel, load_scalar_model
from reward.scoring.ensemble import Encoding, Ensemble, Frozen, Member, check_labels
from reward.scoring.flags import RewardFlags
from utils.engine.engine import DTYPES, device
from utils.errors import UserError
from utils.models.load import check_window, model_folder, resize_embeddings, window_of
from utils.tokenizer import FLAG as TOKENIZER_FLAG
from utils.tokenizer import has_tokenizer, load_tokenizer, template_of

PROBE = [
    {"role": "user", "content": "Why is 2 + 2 = 4?\n\n你好 🙂"},
    {"role": "assistant", "content": "Because; it is."},
    {"role": "user", "content": "ok  then"},
    {"role": "assistant", "content": "“Fine”."},
]


@dataclass(frozen=True)
class Reader:
    """A reward model still on the disk, and how it reads: None, the policy's ids; else (tokenizer, template)."""

    path: str
    own: tuple | None


def reward_readers(config: RewardFlags, tokenizer, say: Callable[[str], None]) -> list[Reader]:
    """The reward models of a run, their tokenizers and templates held against the policy's; no weights are read.

    Raises UserError for folders, tokenizers or templates that are not there, and for labels of different meanings.
    """
    template = template_of(tokenizer)
    check_labels(config.reward_paths, config.reward_flag)
    readers = []
    for path, tokenizer_path, reward_template in config.reward_sources():
        own = _own_encoding(path, config.reward_flag, tokenizer_path, reward_template, tokenizer, template)
        if own:
            say(f"{path} has another tokenizer or template ({own[1]}) than the policy: it reads answers encoded anew")
        readers.append(Reader(path, own))
    return readers


def _own_encoding(path: str, flag: str, source: str | None, name: str | None, tokenizer, template: str) -> tuple | None:
    """(tokenizer, template) of a reward model, or None when they give the same ids as the policy's."""
    folder = model_folder(path, flag)
    source = source or (str(folder) if has_tokenizer(folder) else None)
    if source is None:
        if name not in (None, template):
            raise UserError(f"--reward_template {name}: {path} has no tokenizer; give --reward_tokenizer_name_or_path")
        return None
    arguments = template_arguments(tokenizer)
    theirs = _load_tokenizer(source, None, arguments)
    borrowed = name is None and template == "chat" and not theirs.chat_template
    if borrowed:
        theirs.chat_template = tokenizer.chat_template
    else:
        name = name or template_of(theirs) or template
        theirs = _load_tokenizer(source, name, arguments)
    if _same_ids(tokenizer, template, theirs, name or template):
        return None
    if borrowed:
        raise UserError(
            f"--reward_template is missing: {path} has another tokenizer than the policy, without a chat template; "
            "give the template that it was trained with"
        )
    return theirs, name


def _load_tokenizer(path: str, template: str | None, arguments: dict):
    try:
        return load_tokenizer(path, template, arguments)
    except UserError as error:  # which flag it came from is known here alone
        message = str(error).replace(TOKENIZER_FLAG, "--reward_tokenizer_name_or_path")
        raise UserError(message.replace("--template", "--reward_template")) from error


def _same_ids(tokenizer, template: str, theirs, their_template: str) -> bool:
    """Whether ids of the policy mean the same to a reward model: each token, and how a dialogue is put together."""
    if not tokenizer.get_vocab().items() <= theirs.get_vocab().items():
        return False
    return encode_dialogue(tokenizer, PROBE, template) == encode_dialogue(theirs, PROBE, their_template)


def load_ensemble(
    config: RewardFlags, readers: list[Reader], tokenizer, rows: int, freeze: Callable[[nn.Module], Frozen],
    say: Callable[[str], None], critic: tuple[str, ScalarModel] | None = None,
) -> Ensemble | None:  # fmt: skip
    """The reward models, loaded one after the other and frozen; None when there are none.

    rows: the policy's embeddings. critic: (path, model) of a critic already loaded, which is copied where it is asked
    for again. `freeze` takes a model out of training, and off the device where it has to wait in host memory.
    """
    members = []
    for reader in readers:
        if reader.own:
            model = _load(config, reader.path, config.reward_flag, reader.own[0], say, trained=True)
            encoding = Encoding(*reader.own, window_of(model))
        else:
            shared = critic is not None and reader.path == critic[0]
            model = copy.deepcopy(critic[1]) if shared else load_scalar(config, reader.path, tokenizer, rows, say)
            encoding = None
        members.append(Member(freeze(model), window_of(model), encoding))
    return Ensemble(members, config.reward_ensemble, config.ensemble_std_coef) if members else None


def load_scalar(
    config: RewardFlags, path: str, tokenizer, rows: int, say: Callable[[str], None], flag: str | None = None
) -> ScalarModel:
    """A critic, or a reward model that reads the policy's ids, with an embedding for each that could be sampled.

    rows: the policy's embeddings (some vocabularies are padded). Raises UserError when its window is too short, and
    when it has to score but has no head that was trained for it.
    """
    flag = flag or config.reward_flag
    model = _load(config, path, flag, tokenizer, say, trained=path in config.reward_paths)
    check_window(model, config.maxlen_prompt, f"{flag} {path}: --maxlen_prompt")
    if model.backbone.get_input_embeddings().weight.shape[0] < rows:
        resize_embeddings(model.backbone, rows)
    return model


def _load(config: RewardFlags, path: str, flag: str, tokenizer, say: Callable[[str], None], trained: bool):
    dtype, attention = DTYPES[config.dtype], config.attn_implementation
    return load_scalar_model(
        path, dtype, device(), attention, tokenizer, seed=config.seed, say=say, flag=flag, trained=trained
    )


def check_same_tokenizer(path: str, flag: str, tokenizer, template: str) -> None:
    """Raises UserError when a critic's folder has a tokenizer that gives other ids: it reads the policy's."""
    folder = model_folder(path, flag)
    if not has_tokenizer(folder):
        return
    theirs = load_tokenizer(str(folder), template if template == "moss_zh" else None)  # only its tags change ids
    if not tokenizer.get_vocab().items() <= theirs.get_vocab().items():
        raise UserError(
            f"{flag} {path} was trained with another tokenizer than the policy's, whose tokens the critic reads: give "
            "one of its vocabulary, and this one as --reward_model_path, which may differ"
        )
