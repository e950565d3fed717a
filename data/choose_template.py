"""Choose a command's tokenizer, template and stop ids from its flags and model folders."""

import inspect
import json
import os
from collections import defaultdict
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from data.chat import turn_end
from data.texts import render, template_arguments
from utils.errors import Say, UserError
from utils.files import read_json
from utils.flags.text import StopFlags, TextFlags
from utils.models.load import adapter_folders, model_folder, tokenizer_folder
from utils.tokenizer import has_tokenizer, load_tokenizer, set_template, template_of

Models = Iterable[tuple[str, str]]  # (flag, path)
MAX_SHOWN = 800  # characters of the first prompt that are printed
PROBE = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
]


def prepare_tokenizer(
    config: TextFlags, source: str, models: Models, say: Say, others: Models = ()
) -> tuple[PreTrainedTokenizerBase, str]:
    """Returns (tokenizer of `source`, template name); prints the template, the reason for it, and the stop ids.

    models: (flag, path) of those that generate or are trained, whose generation_config.json can add stop ids; others:
    that read the same ids. Raises UserError if one was trained with another template, unless --template is explicit.
    """
    models = list(models)
    for flag, path in [*models, *others]:
        model_folder(path, flag)
    if source in {path for _, path in [*models, *others]} and adapter_folders(source):
        source = str(tokenizer_folder(source))
    tokenizer = load_tokenizer(source, arguments=config.template_arguments)
    _check_arguments(tokenizer, config)
    template, why = choose_template(config, tokenizer)
    set_template(tokenizer, template, source)
    say(f"{source}: template {template}, {why} (--template {config.template})")
    if config.template == "auto":
        for flag, path in [*models, *others]:
            _check_same_template(flag, path, source, tokenizer, template, why)
    reasons = stop_reasons(tokenizer, template, config.stop_token if isinstance(config, StopFlags) else [], models)
    tokenizer.stop_ids = tuple(sorted(reasons))
    words = (f"{tokenizer.convert_ids_to_tokens(i)!r} ({i}: {', '.join(reasons[i])})" for i in tokenizer.stop_ids)
    say(f"an answer ends in {' or '.join(words)}")
    return tokenizer, template


def choose_template(config: TextFlags, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Returns (template name, reason). The name `chat` stands for chat templates other than the moss templates."""
    own = template_of(tokenizer)
    if config.template in ("auto", "chat") and own:
        return own, "the tokenizer's own chat template"
    if config.template == "auto":
        return f"moss_{config.lang}", f"by --lang {config.lang}, because the tokenizer has no chat template"
    return config.template, "as requested"


def stop_reasons(
    tokenizer: PreTrainedTokenizerBase, template: str, stop_tokens: list[str], models: Models
) -> dict[int, list[str]]:
    """Returns stop id -> reasons. stop_tokens: values of --stop_token, one token each, which replace all others."""
    reasons = defaultdict(list)
    if stop_tokens:
        for text in stop_tokens:
            reasons[_token_id(tokenizer, text)].append("--stop_token")
        return reasons
    if template == "chat":
        reasons[turn_end(tokenizer, template).stop].append("the template's end of a turn")
    reasons[tokenizer.eos_token_id].append("EOS")
    for flag, path in models if template == "chat" else ():
        file = model_folder(path, flag) / "generation_config.json"
        ids = read_json(file, flag).get("eos_token_id") if file.is_file() else None
        for i in ids if isinstance(ids, list) else [ids]:
            if isinstance(i, int) and 0 <= i < len(tokenizer) and str(file) not in reasons[i]:
                reasons[i].append(str(file))
    return reasons


def first_prompt(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Returns a line with the prompt as the model reads it: decoded, with special tokens and escaped newlines."""
    text = tokenizer.decode(ids)
    if len(text) > MAX_SHOWN:
        text = f"{text[: MAX_SHOWN // 2]} … {text[-MAX_SHOWN // 2 :]}"
    return f"first prompt as the model sees it: {json.dumps(text, ensure_ascii=False)}"


def _token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    known = tokenizer.get_vocab().get(text)
    ids = tokenizer.encode(text, add_special_tokens=False) if known is None else [known]
    if len(ids) != 1:
        raise UserError(f"--stop_token {text!r} is not one token, but {len(ids)}; use one, as {tokenizer.eos_token}")
    return ids[0]


def _check_arguments(tokenizer: PreTrainedTokenizerBase, config: TextFlags) -> None:
    """Raises UserError for arguments of the function that renders the template, which the template cannot receive."""
    taken = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"tools", "documents"}
    wrong = sorted(taken & config.template_arguments.keys())
    if wrong:
        raise UserError(f"--chat_template_kwargs: {wrong[0]!r} is not an argument of a chat template; remove it")


def _check_same_template(
    flag: str, path: str, source: str, tokenizer: PreTrainedTokenizerBase, template: str, why: str
) -> None:
    """Raises UserError if the tokenizer in the model's folder shows that it was trained with another template."""
    folder = tokenizer_folder(path, flag)
    if not has_tokenizer(folder) or os.path.realpath(folder) == os.path.realpath(source) or path == source:
        return
    try:
        theirs = load_tokenizer(str(folder), arguments=template_arguments(tokenizer))
    except UserError:  # unusable: possibly the reason why the user passed another one
        return
    other = template_of(theirs)
    if other is None or (other == template and (other != "chat" or _rendered(theirs) == _rendered(tokenizer))):
        return
    name = "another chat template" if other == template else f"the template {other}"
    agree = f"use a model and a tokenizer that agree, or pass --template {' or '.join(sorted({template, other}))}"
    raise UserError(f"{flag} {path} was trained with {name}, and this run uses {template}, {why}; {agree}")


def _rendered(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [render(tokenizer, PROBE, open_answer=True), render(tokenizer, PROBE[:2], open_answer=False)]
