"""Tokenizers of all stages: loading, special tokens, check against a model's vocabulary, saving."""

import json
import os
from functools import partial
from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from utils.errors import UserError
from utils.hub import download, is_hub_id
from utils.llama_sentencepiece import (
    SentencePieceTokenizer,
    is_llama_format,
    load_sentencepiece,
    read_proto,
    to_tokenizer_json,
)
from utils.tokenizer_files import check_tokenizer_files, library_errors, read_chat_template, read_tokenizer_file

FLAG = "--tokenizer_name_or_path"
MOSS_ZH_TAGS = ("<|Human|>", "<|MOSS|>")
_TRIAL = "Hello, 7 worlds\n"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

_CHAT_TEMPLATE = (
    "{{% if bos_token %}}{{{{ bos_token }}}}{{% endif %}}{{% set ns = namespace(system='') %}}"
    "{{% for m in messages %}}{{% if m['role'] == 'system' %}}{{% set ns.system = m['content'] + '\\n\\n' %}}"
    "{{% elif m['role'] == 'user' %}}{{{{ '{human}' + ns.system + m['content'] + eos_token }}}}"
    "{{% set ns.system = '' %}}"
    "{{% else %}}{{{{ '{assistant}' + m['content'] + eos_token }}}}{{% endif %}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '{assistant}' }}}}{{% endif %}}"
)
# The moss templates of data/template.py as chat templates, for exported folders in other tools.
_MOSS_CHAT_TEMPLATES = {
    "moss_en": _CHAT_TEMPLATE.format(human="Human:", assistant="Assistant:"),
    "moss_zh": _CHAT_TEMPLATE.format(human=MOSS_ZH_TAGS[0], assistant=MOSS_ZH_TAGS[1]),
}


def load_tokenizer(
    path: str, template: str | None = None, arguments: dict | None = None, flag: str = FLAG,
    template_flag: str = "--template",
) -> PreTrainedTokenizerBase:  # fmt: skip
    """Returns the tokenizer in the folder, `tokenizer.model` file or hub id `path`, prepared for `template`.

    SentencePiece encodes for a LLaMA-format `tokenizer.model`, AutoTokenizer for others. `moss_zh` adds its two tags if
    absent. Pad: the tokenizer's own if it is neither eos nor bos, else unk, else eos. arguments: of the chat template.
    flag: of `path`. Raises UserError without a usable tokenizer, end token or chat template.
    """
    if is_hub_id(path):  # AutoTokenizer would not look for a tokenizer.model first
        path = str(download(path, flag, allow_patterns=["*.json", "*.model", "*.txt", "*.jinja"]))
    file = _sentencepiece_file(Path(path), flag)
    chat = read_chat_template(Path(path), flag) if os.path.isdir(path) else None
    fast = os.path.isfile(os.path.join(path, "tokenizer.json")) and _is_foreign(chat)
    with library_errors(f"{flag}: the tokenizer in {path} does not work"):
        tokenizer = _from_sentencepiece(file, flag) if file and not fast else _from_auto(str(path), flag)
        tokenizer.chat_template = chat or tokenizer.chat_template
        tokenizer.split_special_tokens = False  # a chat template writes special tokens
        ids = tokenizer.encode(_TRIAL, add_special_tokens=False)
        if not 0 < len(ids) < 1000 or not tokenizer.decode(ids):
            raise ValueError(f"it encodes {_TRIAL!r} as {len(ids)} ids, {tokenizer.decode(ids[:1000])[:80]!r}")
    if not tokenizer.eos_token:
        raise UserError(f"{flag}: the tokenizer in {path} has no end-of-sequence token; use one whose config names it")
    tokenizer.chat_template_kwargs = arguments or {}  # read by data/chat.py; not saved
    set_template(tokenizer, template, path, template_flag)
    _set_pad(tokenizer)
    return tokenizer


def set_template(tokenizer: PreTrainedTokenizerBase, template: str | None, path: str, flag: str = "--template") -> None:
    """Sets tags and chat template of a tokenizer from `path` for `template`; None changes nothing."""
    if template == "moss_zh":
        missing = [tag for tag in MOSS_ZH_TAGS if tag not in tokenizer.get_vocab()]
        tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
    if template == "chat" and not tokenizer.chat_template:
        raise UserError(f"{flag} chat: the tokenizer in {path} has no chat template; use {flag} moss_en or moss_zh")
    tokenizer.chat_template = _MOSS_CHAT_TEMPLATES.get(template, tokenizer.chat_template)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a model folder contains a tokenizer."""
    return any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES)


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the template of a tokenizer by its chat template: moss_en, moss_zh or chat; None without one."""
    own = {text: name for name, text in _MOSS_CHAT_TEMPLATES.items()}
    if not tokenizer.chat_template:
        return None
    return own.get(str(tokenizer.chat_template), "chat")


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns all ids that end an answer: those that data/choose_template.py found, else EOS."""
    return getattr(tokenizer, "stop_ids", (tokenizer.eos_token_id,))


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, what: str, flag: str = FLAG) -> int:
    """Returns the number of embedding rows that a model of `vocab_size` rows needs for `tokenizer`.

    It exceeds `vocab_size` only for the tags of moss_zh. Raises UserError if other tokens exceed it. what: model and
    flag.
    """
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= vocab_size}
    others = sorted((i, token) for token, i in beyond.items() if token not in MOSS_ZH_TAGS)
    if others:
        raise UserError(
            f"{what} has {vocab_size} token embeddings, but {flag} has the token {others[0][1]!r} = "
            f"{others[0][0]} (and {len(others) - 1} more that do not fit); use the tokenizer of this model"
        )
    return max([vocab_size, *(i + 1 for i in beyond.values())])


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], split_special_tokens: bool) -> list[list[int]]:
    """Returns the ids of each text, as of `tokenizer.encode` without special tokens around it, in one call.

    split_special_tokens: special tokens written out in the texts stay text.
    """
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = split_special_tokens
        return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]
    if split_special_tokens and isinstance(tokenizer, SentencePieceTokenizer):
        found = tokenizer.sp_model.encode(texts, num_threads=1)
        unknown = tokenizer.sp_model.unk_id()  # transformers looks for it among the added tokens
        texts = [text if unknown in ids else "" for text, ids in zip(texts, found)]
    else:
        found = [[] for _ in texts]
    encode = partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=split_special_tokens)
    return [encode(text) if text else ids for text, ids in zip(texts, found)]


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes `tokenizer` so that `load_tokenizer(folder)` and AutoTokenizer give the same ids.

    For SentencePiece it writes `tokenizer.model` unchanged, and a `tokenizer.json` with the same merges, whose
    `apply_chat_template` gives the prompts of data.template unless a text contains a special token.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.save_pretrained(folder)
        return
    (folder / "tokenizer.model").write_bytes(tokenizer.sp_model.serialized_model_proto())
    opening = "Assistant:" if tokenizer.chat_template == _MOSS_CHAT_TEMPLATES["moss_en"] else None
    text = to_tokenizer_json(tokenizer, opening).to_str(pretty=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    added = {
        str(i): {"content": token.content, "special": True, "normalized": False}
        | {side: getattr(token, side) for side in ("lstrip", "rstrip")}
        for i, token in tokenizer.added_tokens_decoder.items()
    }
    config = {
        # This class loads tokenizer.json unchanged; the LLaMA class would rebuild it and change ids.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")},
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.chat_template,
    }
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")


def _sentencepiece_file(path: Path, flag: str) -> Path | None:
    """Returns the LLaMA-format model file at `path`, None if there is another kind of tokenizer."""
    file = path / "tokenizer.model" if os.path.isdir(path) else path
    if not os.path.isfile(file):
        return None
    proto = read_proto(file)
    if proto is None:
        # A tokenizer.json in the same folder may give other ids, so it is not used instead.
        raise UserError(f"{flag}: {file} is damaged, or not a SentencePiece model; copy it again")
    if is_llama_format(proto):
        return file
    if path.is_file():
        raise UserError(f"{flag}: {file} is not in LLaMA's format (BPE with dummy prefix); use its folder instead")
    return None


def _from_sentencepiece(file: Path, flag: str) -> SentencePieceTokenizer:
    tokenizer = load_sentencepiece(file)
    config = read_tokenizer_file(file.parent, "tokenizer_config.json", flag)
    recorded = {int(i): (token["content"], token) for i, token in (config.get("added_tokens_decoder") or {}).items()}
    added = read_tokenizer_file(file.parent, "added_tokens.json", flag)
    recorded |= {i: (token, {}) for token, i in added.items()}
    for i, (token, sides) in sorted(recorded.items()):
        if i < tokenizer.vocab_size or not token:
            continue
        strip = {side: sides.get(side) is True for side in ("lstrip", "rstrip")}
        added = AddedToken(token, special=True, normalized=False, **strip)
        tokenizer.add_special_tokens({"additional_special_tokens": [added]}, replace_extra_special_tokens=False)
        if tokenizer.convert_tokens_to_ids(token) != i:
            raise UserError(f"{flag}: {file.parent} gives the added token {token!r} the id {i}, which leaves a gap")
    tokenizer.chat_template = read_chat_template(file.parent, flag)
    # Configs of published base models have empty bos and eos; a chat model may have its own end token.
    names = ("pad_token", "bos_token", "eos_token") if _is_foreign(tokenizer.chat_template) else ("pad_token",)
    for name in names:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token and token in tokenizer.get_vocab():
            setattr(tokenizer, name, token)
    return tokenizer


def _is_foreign(template: str | None) -> bool:
    return template is not None and template not in _MOSS_CHAT_TEMPLATES.values()


def _from_auto(path: str, flag: str) -> PreTrainedTokenizerBase:
    local = Path(path)
    if not os.path.exists(local):
        raise UserError(f"{flag}: {path} does not exist; use a folder with a tokenizer, or a hub id (owner/name)")
    if local.is_dir() and not has_tokenizer(local):
        names = ", ".join(_TOKENIZER_FILES)
        raise UserError(f"{flag}: no tokenizer in {path} (looked for {names}); use the folder that has one")
    content = check_tokenizer_files(local, flag)
    from transformers import AutoTokenizer  # slow to import, and not needed for SentencePiece

    what, advice = f"{flag}: cannot load a tokenizer from {path}", "check the folder or hub id"
    if "auto_map" in content["tokenizer_config.json"]:
        what += ": it needs code of its own (auto_map in tokenizer_config.json), which is not run here"
    with library_errors(what, advice):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    for token in content["tokenizer.json"].get("added_tokens") or ():
        if tokenizer.convert_tokens_to_ids(token["content"]) != token["id"]:
            given = f"{token['content']!r} the id {token['id']}, which leaves a gap or is taken"
            raise UserError(f"{flag}: {local / 'tokenizer.json'} gives the added token {given}; copy it again")
    return tokenizer


def _set_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token and tokenizer.pad_token not in (tokenizer.eos_token, tokenizer.bos_token):
        return
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
