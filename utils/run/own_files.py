"""Files in a run's folders: those that the run wrote, and foreign ones, a user's, which are kept."""

import os
import shutil
from fnmatch import fnmatchcase

from utils.files import ASIDE, remove, remove_empty, sync


def files_in(folder: str) -> list[str]:
    """Returns the paths, relative to a folder, of files, links and empty folders in it; none for a link."""
    found = []
    for path, folders, files in os.walk(folder) if not os.path.islink(folder) else ():
        links = [name for name in folders if os.path.islink(os.path.join(path, name))]
        empty = [""] if path != folder and not folders and not files else []
        found += [os.path.normpath(os.path.relpath(os.path.join(path, x), folder)) for x in files + links + empty]
    return found


def foreign_files(folder: str, names: list[str]) -> list[str]:
    """Returns the paths in a folder, as `files_in`, that match none of `names`."""
    deep = [(name, name.count("/")) for name in names]
    return [x for x in files_in(folder) if not any(fnmatchcase(x, name) and x.count("/") == n for name, n in deep)]


def remove_own(path: str, names: list[str]) -> None:
    """Removes a file, or a folder without its `foreign_files`, and temporary copies. A kill leaves no part of it."""
    for end in (".partial", ".partial.partial", ASIDE):
        remove(path + end)
    foreign = foreign_files(path, names)
    if not foreign and os.path.lexists(path):
        os.replace(path, f"{path}.partial")
        remove(f"{path}.partial")
    for name in set(files_in(path)) - set(foreign):
        os.remove(os.path.join(path, name))
        remove_empty(os.path.dirname(os.path.join(path, name)), path)


def carry_over(old: str, new: str, names: list[str]) -> None:
    """Links, or copies, the `foreign_files` of a folder into the one that is to replace it. Raises OSError."""
    for name in foreign_files(old, names):
        source, target = os.path.join(old, name), os.path.join(new, name)
        if os.path.isdir(source) and not os.path.islink(source):
            os.makedirs(target, exist_ok=True)
            continue
        if os.path.lexists(target):
            raise OSError(f"{source} was not written by this run; move it")
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:  # the file system has no links
            shutil.copy2(source, target, follow_symlinks=False)
            sync(target)
