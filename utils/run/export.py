"""Writes a run's models, best/ and final/, with their model cards."""

import os
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from utils.distributed import gather_objects, is_main
from utils.errors import UserError
from utils.files import disk_errors, read_bytes, remove, replace
from utils.flags.run import RunFlags
from utils.models.card import CARD, LICENSE, PICTURE
from utils.run.card import metrics_of, picture_of, run_card, write_card
from utils.run.index import read_index, record
from utils.run.own_files import carry_over, files_in, foreign_files
from utils.watchdog import report_progress

Save = Callable[[str], None]  # writes a model to the folder of this path


def export_models(
    config: RunFlags, name: str, tokenizer: PreTrainedTokenizerBase, save: Save, save_adapter: Save,
    metrics: dict[str, float] | None = None,
) -> str | None:  # fmt: skip
    """Calls `export_model` for a whole model, an adapter or both (--export), with cards. Collective.

    metrics: for the card, with their `step`; None: those of the run's last step.
    """
    run, what = config.model_save_path, config.export

    def with_card(save: Save) -> Save:
        def write(folder: str) -> None:
            save(folder)
            try:
                card = run_card(config, tokenizer, (metrics_of(run) or [{}])[-1] if metrics is None else metrics)
                write_card(folder, card, tokenizer, picture_of(run) if name.startswith("final") else None)
            except Exception as error:  # noqa: BLE001 - a model without a card is better than none
                print(f"warning: {name}/ has no model card: {error or type(error).__name__}", flush=True)

        return write

    problem = export_model(run, name, with_card(save)) if what != "adapter" else None
    if what != "merged" and problem is None:
        problem = export_model(run, name if what == "adapter" else f"{name}_adapter", with_card(save_adapter))
    return problem


def _own_files(run: str, name: str) -> list[str]:
    """Returns the files of the run in best/ or final/, without a card in which the user has filled in the license."""
    own, card = read_index(run).names.get(name, []), os.path.join(run, name, CARD)
    is_theirs = os.path.isfile(card) and LICENSE not in read_bytes(card).decode(errors="replace")
    return [file for file in own if file != CARD or not is_theirs]


def export_model(run: str, name: str, save: Save) -> str | None:
    """Replaces a run's best/ or final/ by the folder that `save(path)` writes, on rank 0. Collective.

    Returns None, or on all ranks why it could not be written; then the earlier folder is as it was.
    """
    problem, path = None, os.path.join(run, name)
    if is_main():
        partial = f"{path}.partial"
        try:
            with disk_errors(path):
                remove(partial)
                save(partial)
                own = _own_files(run, name)
                for theirs in {CARD, PICTURE} & set(foreign_files(path, own)):  # a user's card stays
                    remove(os.path.join(partial, theirs))
                written = files_in(partial)
                carry_over(path, partial, own)
                record(run, name, *written)
                replace(partial, path)
        except UserError as error:
            problem = str(error).replace(partial, path)
            with disk_errors(path):
                remove(partial)
    problem = gather_objects(problem)[0]
    report_progress(f"export of {name}/")
    return problem
