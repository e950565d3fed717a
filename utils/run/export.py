"""Writes a run's models, best/ and final/."""

import os
from collections.abc import Callable

from utils.distributed import gather_objects, is_main
from utils.errors import UserError
from utils.files import disk_errors, remove, replace
from utils.run.index import read_index, record
from utils.run.own_files import carry_over, files_in
from utils.watchdog import report_progress


def export_models(
    run: str, name: str, what: str, save: Callable[[str], None], save_adapter: Callable[[str], None]
) -> str | None:  # fmt: skip
    """Calls `export_model` for a whole model, an adapter or both. what: --export."""
    problem = export_model(run, name, save) if what != "adapter" else None
    if what != "merged" and problem is None:
        problem = export_model(run, name if what == "adapter" else f"{name}_adapter", save_adapter)
    return problem


def export_model(run: str, name: str, save: Callable[[str], None]) -> str | None:
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
                written = files_in(partial)
                carry_over(path, partial, read_index(run).names.get(name, []))
                record(run, name, *written)
                replace(partial, path)
        except UserError as error:
            problem = str(error).replace(partial, path)
            with disk_errors(path):
                remove(partial)
    problem = gather_objects(problem)[0]
    report_progress(f"export of {name}/")
    return problem
