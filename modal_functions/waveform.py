"""What a recording looks like: its loudest sample in each of equal shares, for players to draw."""

from typing import Final

import numpy as np

from modal_functions.audio import Pcm

MOST_PEAKS: Final = 2000  # more than a player is wide
FULL: Final = 255  # the format's full range


def peaks(pcm: Pcm, most: int = MOST_PEAKS) -> tuple[int, ...]:
    """Return at most so many peaks, 0 to FULL, of samples that may be mapped from a file.

    Each is the largest absolute sample of its share. Shares are read one by one: of four hours
    they are 230 kB each.
    """
    count = min(most, len(pcm))
    edges = [len(pcm) * index // count for index in range(count + 1)] if count else [0]
    found = np.empty(count, np.int64)
    for index in range(count):
        share = pcm[edges[index] : edges[index + 1]]
        found[index] = max(int(share.max()), -int(share.min()))
    return tuple(np.rint(found * (FULL / 2**15)).astype(int).tolist())
