"""What the sections of ``python -m benchmarks`` return; report.py makes the report of it."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Measurement:
    """One line of the report: one quantity of each system, measured side by side.

    ``values`` has, for each system (or engine, or number of rows), one figure per round; the same
    place is the same round. Its order is the order of the columns. The report shows medians, the
    smallest and largest round, and the median of the ratios to ``baseline`` within a round.
    """

    id: str  # also the line's anchor in the report, to which README.md links; does not change
    what: str
    unit: str
    better: Literal["higher", "lower"]
    values: Mapping[str, Sequence[float]]
    baseline: str | None = None
    note: str = ""
    headline: bool = False  # Is in the report's summary, too.

    def __post_init__(self) -> None:
        rounds = {len(figures) for figures in self.values.values()}
        if len(rounds) != 1 or 0 in rounds:
            raise ValueError(f"{self.id}: each system needs one figure per round, not {rounds}")
        if self.baseline is not None and self.baseline not in self.values:
            raise ValueError(f"{self.id}: the baseline {self.baseline} was not measured")

    def median(self, system: str) -> float:
        """Return the median of the system's rounds."""
        return statistics.median(self.values[system])

    def ratio(self, system: str) -> float | None:
        """Return the median of the ratios to the baseline within a round, if there are any."""
        if self.baseline is None or system == self.baseline or not all(self.values[self.baseline]):
            return None
        pairs = zip(self.values[system], self.values[self.baseline], strict=True)
        return statistics.median(figure / baseline for figure, baseline in pairs)

    def from_best(self) -> list[str]:
        """Return the systems, the best median first."""
        return sorted(self.values, key=self.median, reverse=self.better == "higher")


@dataclass(frozen=True)
class Plot:
    """A picture of some lines of a section; they share a unit.

    ``bars``: a group for each measurement, a bar for each system. ``lines``: a line for each
    measurement, its systems, which are numbers such as rows, from left to right on a logarithmic
    axis.
    """

    id: str
    title: str
    kind: Literal["bars", "lines"]
    measurements: Sequence[str]
    logarithmic: bool = False


@dataclass(frozen=True)
class Section:
    """A chapter of the report. ``method`` says in Markdown what was run, and how."""

    id: str
    title: str
    method: str
    measurements: Sequence[Measurement]
    plots: Sequence[Plot] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)  # system -> why it was not measured
    versions: Mapping[str, str] = field(default_factory=dict)  # of what was compared here


# Measures with so many rounds; ``quick`` with sizes that only show that it works.
Measure = Callable[[int, bool], Section]
