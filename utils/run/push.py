"""Uploads an exported folder to the Hugging Face hub, without local paths; checks token and target beforehand."""

import contextlib
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from utils.errors import UserError, problem_of
from utils.files import first_names, json_text, read_json
from utils.flags.run import RunFlags
from utils.hub import is_hub_id, public_name
from utils.models.adapter_folder import CONFIG
from utils.models.card import CARD, LICENSE, PICTURE, PLACE
from utils.models.load import whole_model
from utils.run.own_files import files_in, foreign_files
from utils.watchdog import downloading

# What belongs to a model; other files in its folder are the user's, and stay here.
FILES = (
    CARD, PICTURE, "LICENSE*", "*.safetensors", "*.safetensors.index.json", "config.json", CONFIG,
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip
PLACES = ("path", "dir", "file")  # ends of the names of settings that are places


def check_push(config: RunFlags) -> None:
    """Raises UserError if final/ cannot be uploaded as --push_to_hub says. Asks the hub. Call it on one rank."""
    flag, base = "--push_to_hub", getattr(config, config.base_flag)
    if config.export == "adapter" and not is_hub_id(whole_model(base, f"--{config.base_flag}")):
        why = f"final/ would be an adapter of a local model, {public_name(base)}, which others do not have"
        later = "upload it later with python -m utils.push_to_hub --base_model"
        raise UserError(f"{flag}: {why}; pass --export both, start from a hub id, or {later}")
    check_access(config.push_to_hub, config.hub_private, flag)


def check_access(target: str, private: bool, flag: str) -> None:
    """Raises UserError if the token may not write to `target`, or if that is public and `private` is asked for."""
    api, owner = HfApi(), target.split("/")[0]
    with hub_errors(target, flag):
        me = api.whoami()
        owners = [me["name"], *(each["name"] for each in me.get("orgs", ()))]
        role = me.get("auth", {}).get("accessToken", {}).get("role", "")
        if role == "read":
            raise UserError(f"{flag} {target}: the token can only read; make one that can write, and set HF_TOKEN")
        if owner not in owners:
            raise UserError(f"{flag} {target}: the token is of {me['name']}; use one of {', '.join(owners)} as owner")
        try:
            is_public = not api.model_info(target).private
        except RepositoryNotFoundError:
            return
    if private and is_public:
        raise UserError(f"{flag} {target} is there already, and public; use another name, or ask for a public one")


@contextlib.contextmanager
def hub_errors(target: str, flag: str) -> Iterator[None]:
    """Context in which errors of the hub and of the network become UserErrors."""
    try:
        with downloading():
            yield
    except LocalTokenNotFoundError:
        raise UserError(f"{flag} {target}: there is no token; run hf auth login, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        code, reason = error.response.status_code, " ".join(str(error).split())
        advice = "make a token that can write there, and set HF_TOKEN" if code in (401, 403) else "try again later"
        raise UserError(f"{flag} {target}: {constants.ENDPOINT} refuses it ({code}: {reason}); {advice}") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{flag} {target}: {' '.join(str(error).split())}; if it is the card, mend {CARD}") from error
    except (OSError, HTTPError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{flag} {target}: cannot reach {constants.ENDPOINT} ({reason}); try again later") from error


def push_folder(folder: str, target: str, private: bool, flag: str, base: str = "") -> str:
    """Uploads a model's folder and returns its address. base: hub id of an adapter's model. Raises UserError."""
    names = set(files_in(folder)) - set(foreign_files(folder, FILES))
    if not any(name.endswith(".safetensors") for name in names):
        raise UserError(f"{folder} holds no model (*.safetensors); give the folder final/ or best/ of a run")
    check_access(target, private, flag)
    with downloading():  # it reads all files
        files = [CommitOperationAdd(name, public_content(Path(folder, name), target, base)) for name in sorted(names)]
    with hub_errors(target, flag):
        address = HfApi().create_repo(target, private=private, exist_ok=True)
        HfApi().create_commit(target, files, commit_message=f"Upload {target.split('/')[1]}")
    return str(address)


def public_content(file: Path, target: str, base: str) -> bytes | str:
    """Returns what is uploaded of a file: its path, or bytes without local paths and with `target` in the card."""
    if file.name == CARD:
        text = file.read_text("utf-8").replace(PLACE, target)
        if base and "\nbase_model:" not in text:
            text = text.replace("---\n", f"---\nbase_model: {json.dumps(base)}\nbase_model_relation: adapter\n", 1)
        return text.encode()
    if not file.name.endswith("config.json"):
        return str(file)
    content = read_json(file, "FOLDER")
    if file.name == CONFIG:
        content["base_model_name_or_path"] = base = base or content["base_model_name_or_path"]
        if not is_hub_id(base):
            why = f"is an adapter of a local model, {public_name(base)}, which others do not have"
            raise UserError(f"{file.parent} {why}; name its id on the hub: --base_model OWNER/NAME")
    return json_text(without_places(content)).encode()


def without_places(content):
    """Returns JSON in which settings that are local paths are their last parts."""
    if isinstance(content, list):
        return [without_places(x) for x in content]
    if not isinstance(content, dict):
        return content
    places = {k: public_name(x) for k, x in content.items() if isinstance(x, str) and k.endswith(PLACES)}
    return {k: without_places(x) for k, x in content.items()} | places


def push_final(config: RunFlags) -> None:
    """Uploads final/ of a finished run if it was asked for. A failure is a warning. Call it on one rank."""
    if not config.push_to_hub:
        return
    folder = os.path.join(config.model_save_path, "final")
    try:
        print(f"uploaded: {push_folder(folder, config.push_to_hub, config.hub_private, '--push_to_hub')}", flush=True)
    except Exception as error:  # noqa: BLE001 - the run is complete, whatever the hub answers
        again = shlex.join([folder, config.push_to_hub, *([] if config.hub_private else ["--public"])])
        print(
            f"warning: {problem_of(error) or repr(error)}. To upload it later: python -m utils.push_to_hub {again}",
            flush=True,
        )


def left_here(folder: str) -> str:
    """Returns a line on what `push_folder` does not upload, and on a license that is not filled in; or nothing."""
    names, card = foreign_files(folder, FILES), Path(folder, CARD)
    lines = [f"not uploaded: {first_names(sorted(names))}"] if names else []
    if card.is_file() and LICENSE in card.read_text("utf-8"):
        lines.append(f"{card} names no license yet; fill it in and repeat this")
    return "\n".join(lines)
