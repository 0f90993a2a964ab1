"""Pictures of figures: SVG whose text is text, to be read on white and on black."""

import io
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.figures import Measurement, Plot

INK = "#737d88"  # As far from white as from GitHub's black.
OURS = "pgscribe"
OUR_COLOUR = "#e5484d"
COLOURS = ("#3e8fd9", "#12a594", "#d98f00", "#9a6dd7", "#8b8d98", "#d6609e", "#5b8c2a", "#2f4b7c")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pgscribe",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
WIDTH, HEIGHT = 8.2, 3.2  # inches
AXES = (0.11, 0.16, 0.645, 0.75)  # left, bottom, width, height, of the whole
PLACE = 74  # characters of all labels below the axis
LEGEND = 21  # characters of a line beside it
GROUP = 0.84  # of the place of a group of bars


def draw(plot: Plot, measurements: Sequence[Measurement], systems: Sequence[str]) -> str:
    """Return a plot as SVG; a system's colour is by its place in ``systems``, ours is our own."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT))
        axes = figure.add_axes(AXES)
        if plot.kind == "bars":
            bars(axes, measurements, systems)
        else:
            curves(axes, measurements)
        if plot.logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        better = {measurement.better for measurement in measurements}
        hint = f" ({better.pop()} is better)" if len(better) == 1 else ""
        axes.set_title(plot.title + hint, loc="left")
        scale = ", logarithmic" if plot.logarithmic else ""
        axes.set_ylabel(measurements[0].unit + scale)
        axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(
                loc="upper left",
                bbox_to_anchor=(1.01, 1),
                borderaxespad=0,
                frameon=False,
                labelcolor=INK,
            )
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata=NO_METADATA)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def bars(axes: Axes, measurements: Sequence[Measurement], systems: Sequence[str]) -> None:
    """Draw a group for each measurement and a bar for each system, with the rounds' spread."""
    shown = [system for system in systems if any(system in m.values for m in measurements)]
    width = GROUP / len(shown)
    for place, system in enumerate(shown):
        there = [(group, m) for group, m in enumerate(measurements) if system in m.values]
        medians = [m.median(system) for _, m in there]
        axes.bar(
            [group + (place + 0.5) * width - GROUP / 2 for group, _ in there],
            medians,
            width * 0.92,
            label=beside(system),
            color=colour(system, systems),
            yerr=spread([m.values[system] for _, m in there], medians),
            error_kw={"ecolor": INK, "elinewidth": 0.9},
        )
    room = PLACE // len(measurements)
    labels = [textwrap.fill(label, room) for label in short([m.what for m in measurements])]
    axes.set_xticks(range(len(measurements)), labels)
    axes.tick_params(axis="x", length=0)


def curves(axes: Axes, measurements: Sequence[Measurement]) -> None:
    """Draw a line for each measurement over its systems, which are numbers."""
    for place, measurement in enumerate(measurements):
        ordered = sorted(measurement.values, key=as_number)
        medians = [measurement.median(system) for system in ordered]
        axes.errorbar(
            [as_number(system) for system in ordered],
            medians,
            yerr=spread([measurement.values[system] for system in ordered], medians),
            label=beside(measurement.what),
            color=COLOURS[place % len(COLOURS)],
            marker="o",
            markersize=4,
            elinewidth=0.9,
        )
    axes.set_xscale("log")
    ticks = sorted({system for m in measurements for system in m.values}, key=as_number)
    axes.set_xticks([as_number(system) for system in ticks], ticks)
    axes.minorticks_off()


def colour(system: str, systems: Sequence[str]) -> str:
    """Return the colour of a system's bars."""
    others = [name for name in systems if name != OURS]
    return OUR_COLOUR if system == OURS else COLOURS[others.index(system) % len(COLOURS)]


def beside(label: str) -> str:
    """Return a label as the legend has room for it."""
    return textwrap.fill(plain(label), LEGEND)


def plain(label: str) -> str:
    """Return text without the Markdown of the tables."""
    return label.replace("`", "")


def short(labels: Sequence[str]) -> list[str]:
    """Return labels without what all of them begin or end with, as far as commas divide them."""
    parts = [plain(label).split(", ") for label in labels]
    for end in (0, -1) if len(labels) > 1 else ():
        if len({tuple(part[end:][:1]) for part in parts}) == 1 and all(len(p) > 1 for p in parts):
            for part in parts:
                del part[end]
    return [", ".join(part) for part in parts]


def spread(rounds: Sequence[Sequence[float]], medians: Sequence[float]) -> list[list[float]]:
    """Return how far below and above the medians the rounds reach."""
    pairs = list(zip(rounds, medians, strict=True))
    return [
        [median - min(figures) for figures, median in pairs],
        [max(figures) - median for figures, median in pairs],
    ]


def as_number(system: str) -> float:
    """Return the number at the start of a system's name, such as of ``10,000 rows``."""
    return float(system.split(maxsplit=1)[0].replace(",", ""))
