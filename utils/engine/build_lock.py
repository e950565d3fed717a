"""Keeps a killed process from blocking all later ones: DeepSpeed builds its CPU optimizer under a lock file."""

import contextlib
import fcntl
import os
from pathlib import Path


@contextlib.contextmanager
def unblocked_builds():
    """Inside, DeepSpeed may build an op; a lock file that a killed build left behind is removed first, and said so.

    Such a file has no owner written on it, and whoever meets it waits for ever without a word. So every process of
    ours shares a lock that the system releases when its holder dies: whoever gets it alone knows that no build of ours
    is going on. (A build by another program in the same second would be mistaken for a dead one.)
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with (root / "builders").open("a") as builders:
        with contextlib.suppress(OSError):  # others hold it, or this file system has no locks
            fcntl.flock(builders, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):
                lock.unlink(missing_ok=True)
                print(f"removed {lock}: a build that was killed had left it behind", flush=True)
        with contextlib.suppress(OSError):
            fcntl.flock(builders, fcntl.LOCK_SH)
        yield
