"""How much host memory a process may still take."""

import os
import resource
from pathlib import Path

import psutil

from utils.distributed import world_size

# Control groups by the controllers that /proc/self/cgroup names, "" for version 2: the files of limit and usage, and
# the entry of memory.stat for pages of files, which the kernel gives up when memory is wanted.
_GROUPS = {
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "": ("memory.max", "memory.current", "inactive_file"),
}


def fits_on_host(size: int) -> bool:
    """Whether this process may take `size` bytes more and still has room for its highest use of memory so far.

    A tenth of `size` is left as a margin.
    """
    now, peak = psutil.Process().memory_info().rss, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1.1 * size + max(peak - now, 0) <= free_host_memory()


def free_host_memory() -> int:
    """Returns the bytes of host memory that each rank of this node may still take."""
    free = min(psutil.virtual_memory().available, group_room())
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def group_room(membership: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> float:
    """Returns the bytes that the limits of a job or container leave to this process; infinite where there are none."""
    room = float("inf")
    lines = Path(membership).read_text().splitlines() if os.path.exists(membership) else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers in _GROUPS:
            base = Path(root, controllers)
            inside = base / path.lstrip("/")
            for folder in (inside, *inside.parents):  # the limit may be that of a group around
                if folder.is_relative_to(base):
                    room = min(room, _room(folder, *_GROUPS[controllers]))
    return room


def _room(folder: Path, limit: str, usage: str, cache: str) -> float:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int((folder / limit).read_text()) - int((folder / usage).read_text()) + int(stat[cache])
    except (OSError, ValueError, KeyError):  # no such group here, or "max": no limit
        return float("inf")
