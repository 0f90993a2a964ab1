"""Looking into folders in which others write and delete."""

import os
from pathlib import Path


def files_in(folder: Path) -> list[Path]:
    """Return all files below a folder. Unlike ``rglob``, mind no folder that goes meanwhile."""
    return [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
