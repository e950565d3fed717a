"""The model card of a run's export: what its flags and metrics say, without what is private."""

import os
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from utils.files import atomic_file, read_json, sync
from utils.flags.parser import changed_defaults
from utils.flags.run import FREE_ON_RESUME, RunFlags
from utils.hub import public_name
from utils.models.adapter_folder import CONFIG
from utils.models.card import CARD, PICTURE, Card, card_text
from utils.report.read import metrics_of
from utils.tokenizer import template_of


def run_card(config: RunFlags, tokenizer: PreTrainedTokenizerBase, metrics: dict[str, float]) -> Card:
    """Returns what a run says of its model. metrics: of the step of the export."""
    changed = {x: getattr(config, x) for x in changed_defaults(config) if x not in FREE_ON_RESUME}
    template, preset = template_of(tokenizer) or "", getattr(config, "preset", "")
    return Card(
        kind=config.trains, name=os.path.basename(os.path.abspath(config.model_save_path)),
        base=getattr(config, config.base_flag), data=list(config.data_path),
        flags={name: shown(name, value) for name, value in changed.items()}, metrics=metrics,
        language=config.lang if template.startswith("moss") or "lang" in config.given else "",
        method="PPO-max" if preset == "ppo_max" else preset, max_tokens=getattr(config, "maxlen_res", 256),
    )  # fmt: skip


def shown(name: str, value) -> str:
    """Returns a flag's value as it is typed, of paths the last part only, and nothing of addresses."""
    if isinstance(value, list):
        return " ".join(shown(name, x) for x in value)
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if "://" in text:
        return "…"
    is_path = name.endswith("_path") or name == "reward_fn" or text.startswith(("/", "~", "./", "../"))
    return public_name(text) if is_path and isinstance(value, str) else text


def picture_of(run: str) -> bytes | None:
    """Returns the curves of a run as PNG; None if they cannot be drawn."""
    try:
        from utils.report.charts import draw_overview

        return draw_overview(metrics_of(run))
    except Exception:  # noqa: BLE001 - matplotlib is missing, or set up in a way in which it raises all kinds
        return None


def write_card(folder: str, card: Card, tokenizer: PreTrainedTokenizerBase, picture: bytes | None = None) -> None:
    """Writes the card of a model that is in `folder`, and its picture (PNG). Call it on one rank."""
    adapter, config = Path(folder, CONFIG), read_json(Path(folder, "config.json"))
    if is_adapter := adapter.is_file():
        base = read_json(adapter)["base_model_name_or_path"]
        card = Card(**vars(card) | {"base": base})
    if picture:
        Path(folder, PICTURE).write_bytes(picture)
        sync(os.path.join(folder, PICTURE))
    with atomic_file(os.path.join(folder, CARD)) as file:
        file.write(card_text(card, tokenizer, is_adapter, config.get("score_center", 0.0), bool(picture)))
