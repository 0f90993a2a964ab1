"""What processes occupy, as Linux counts it under /proc."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path


def resident(pid: int) -> float:
    """Return the resident set of a process in MB; 0 if there is none."""
    with contextlib.suppress(OSError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e6
    return 0.0


def resident_of_tree(pid: int) -> float:
    """Return the resident sets of a process and of all below it, in MB.

    A page that several of them share is counted for each.
    """
    return sum(resident(one) for one in _tree(pid))


def _tree(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                for child in (task / "children").read_text().split():
                    yield from _tree(int(child))
