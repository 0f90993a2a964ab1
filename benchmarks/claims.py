"""Numbers in the documentation that link to a line of the report, held against its figures."""

import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks.report import REPORT, Report, printed, printed_ratio

LINK = re.compile(r"\[([^\[\]]+)\]\(([^()\s#]+)(?:#([^()\s]*))?\)")
# Not within a word such as p99.
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?x?(?!\w)")


def claimable(report: Report) -> dict[str, set[str]]:
    """Return the report's anchors, and which numbers a link to each of them may claim."""
    anchors: dict[str, set[str]] = {"machine": set()}
    for section in report.sections:
        anchors[section.id] = set()
        for line in section.measurements:
            ratios = (line.ratio(system) for system in line.values)
            anchors[line.id] = {
                *(printed(line.median(system)) for system in line.values),
                *(printed_ratio(ratio) for ratio in ratios if ratio is not None),
            }
    return anchors


def links(document: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the text and the anchor of each link of a document to the report in ``folder``."""
    for text, target, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        if (document.parent / target).resolve() == (folder / REPORT).resolve():
            yield text, anchor


def wrong(report: Report, document: Path, folder: Path) -> Iterator[str]:
    """Yield what is wrong with a document's links to the report in ``folder``."""
    anchors = claimable(report)
    for text, anchor in links(document, folder):
        if anchor and anchor not in anchors:
            yield f"{document.name}: [{text}]: the report has no line #{anchor}"
            continue
        true = anchors.get(anchor, set())
        for number in NUMBER.findall(text):
            if number not in true:
                says = ", ".join(sorted(true)) or "no numbers"
                yield f"{document.name}: [{text}]: {number} is not in #{anchor}, which has {says}"
