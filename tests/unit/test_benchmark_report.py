import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import claims, report
from benchmarks.figures import Measurement, Plot, Section
from benchmarks.machine import REPO, Machine, without_paths
from benchmarks.plots import draw, short
from benchmarks.report import REPORTS, Report, printed, printed_ratio, render

COMMITTED = REPO / "benchmarks"
DOCUMENTS = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
MACHINE = Machine(
    date="2026-11-26 12:00 UTC",
    commit="b06f39f",
    dirty=False,
    processor="A processor",
    cores=2,
    memory_gib=23.5,
    load=0.1,
    system="Linux",
    versions={"Postgres": "18.4"},
)
DRAIN = Measurement(
    "drain-c100",
    "Drain",
    "jobs/s",
    "higher",
    {"old": [100.0, 200.0, 400.0], "new": [1000.0, 1000.0, 6001.0]},
    baseline="old",
    headline=True,
)
PICKUP = Measurement("pickup", "Pickup", "ms", "lower", {"new": [2.0, 3.0]}, note="idle")
GROWTH = Measurement("growth", "List", "ms", "lower", {"1,000": [1.0], "10,000": [2.5]})
SECTION = Section(
    "queue",
    "The queue",
    "What was run.",
    [DRAIN, PICKUP, GROWTH],
    [
        Plot("queue-drain", "Drain", "bars", ["drain-c100", "pickup"], logarithmic=True),
        Plot("queue-growth", "Growth", "lines", ["growth"]),
        Plot("queue-nothing", "Of what could not be measured", "bars", ["gone"]),
    ],
    {"absent": "not installed"},
    {"new": "1.0"},
)
RUN = Report(MACHINE, 3, quick=False, asked=["queue"], sections=[SECTION], seconds={"queue": 90.0})


def anchors(markdown: str) -> list[str]:
    return re.findall(r'<a id="([^"]+)">', markdown)


def test_the_report_and_its_plots_are_made_of_the_figures_alone(tmp_path: Path) -> None:
    files = render(RUN)
    assert set(files) == {"report.md", "plots/queue-drain.svg", "plots/queue-growth.svg"}
    report.save(RUN, tmp_path)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "stale.svg").write_text("of an earlier run")
    report.write(tmp_path)
    written = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert written == {*files, "report.json"}
    assert {name: (tmp_path / name).read_text() for name in files} == files


def test_a_line_has_medians_ratios_within_rounds_the_spread_and_the_better_direction() -> None:
    markdown = report.markdown(RUN)
    # The ratios of the rounds are 10, 5 and 15; the ratio of the medians would be 5.
    assert (
        '| <a id="drain-c100"></a>Drain | jobs/s ↑'
        " | 200<br><small>100 to 400</small>"
        " | **1,000** (10x)<br><small>1,000 to 6,000</small> |"
    ) in markdown
    assert '| <a id="pickup"></a>Pickup<br><small>idle</small> | ms ↓ |  | 2.50<br>' in markdown
    assert "| | unit | 1,000 | 10,000 |" in markdown  # nothing in common: a table of its own
    assert "| [Drain](#drain-c100), jobs/s ↑ | new 1,000, old 200 |" in markdown
    assert "- **absent**: not installed" in markdown
    assert DRAIN.from_best() == ["new", "old"]
    assert PICKUP.ratio("new") is None


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (5529.4, "5,530"),
        (12345.0, "12,300"),
        (2.666, "2.67"),
        (0.1, "0.100"),
        (99.96, "100.0"),
        (0.00012, "0.0001"),
        (0.0, "0"),
        (-3.14159, "-3.14"),
    ],
)
def test_figures_have_as_many_digits_as_they_are_worth(figure: float, text: str) -> None:
    assert printed(figure) == text


def test_ratios_have_two_digits() -> None:
    assert [printed_ratio(ratio) for ratio in (1.94, 37.6, 0.0542)] == ["1.9x", "38x", "0.054x"]


def test_plots_are_small_have_text_and_nothing_of_the_moment() -> None:
    svg = draw(SECTION.plots[0], [DRAIN, PICKUP], ["old", "new"])
    texts = [element.text for element in ET.fromstring(svg).iter() if element.text]
    assert {"old", "new", "Drain", "Pickup", "jobs/s, logarithmic"} <= set(texts)
    assert len(svg) < 30_000
    assert "dc:date" not in svg


def test_labels_are_without_what_all_of_them_share() -> None:
    assert short(["Drain, 1 at a time", "Drain, 10 at a time"]) == ["1 at a time", "10 at a time"]
    assert short(["1 connection, a row", "2 connections, a row"]) == [
        "1 connection",
        "2 connections",
    ]
    assert short(["Drain, 1 at a time"]) == ["Drain, 1 at a time"]
    assert short(["`GET /jobs`, 20 jobs", "`POST /process`"]) == [
        "GET /jobs, 20 jobs",
        "POST /process",
    ]


def test_a_missing_section_is_seen() -> None:
    failed = replace(RUN, asked=["queue", "api", "pages"], errors={"api": "OSError: no"})
    markdown = report.markdown(failed)
    assert "> **The section `api` is missing**: OSError: no" in markdown
    assert "> **The section `pages` is missing**: the run was ended before" in markdown
    assert failed.problems().keys() == {"api", "pages"}
    assert RUN.problems() == {}


def test_anchors_are_unique() -> None:
    assert Counter(anchors(report.markdown(RUN))).most_common(1)[0][1] == 1
    with pytest.raises(ValueError, match="drain-c100, growth, pickup, queue"):
        replace(RUN, sections=[SECTION, SECTION])


def test_rounds_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="one figure per round"):
        replace(DRAIN, values={"old": [1.0, 2.0], "new": [1.0]})
    with pytest.raises(ValueError, match="was not measured"):
        replace(DRAIN, baseline="none")


def test_claims_are_held_against_the_line_that_they_link_to(tmp_path: Path) -> None:
    document = tmp_path / "docs" / "x.md"
    document.parent.mkdir()
    document.write_text(
        "[10x](../report.md#drain-c100), [1,000 jobs/s, p99](../report.md#drain-c100),"
        " [the queue](../report.md#queue), [more](../report.md), [7](other.md#drain-c100);"
        " [11x](../report.md#drain-c100) [200x](../report.md#drain-c100)"
        " [10x](../report.md#queue) [gone](../report.md#gone) [1000](../report.md#drain-c100)"
        " [3 of\n2.50 ms](../report.md#pickup) [10x](../report.md)"
    )
    wrong = list(claims.wrong(RUN, document, tmp_path))
    assert [
        re.findall(r"\[(.*?)\]: (?:the report has no line )?(\S+)", each, re.DOTALL)[0]
        for each in wrong
    ] == [
        ("11x", "11x"),
        ("200x", "200x"),
        ("10x", "10x"),
        ("gone", "#gone"),
        ("1000", "1000"),
        ("3 of\n2.50 ms", "3"),
        ("10x", "10x"),
    ]


def test_the_documentation_claims_what_the_committed_report_says() -> None:
    linked = [(d, link) for d in DOCUMENTS for link in claims.links(d, COMMITTED)]
    mentioned = sum(d.read_text().count("benchmarks/report.md") for d in DOCUMENTS)
    assert len(linked) == mentioned, "a link that is not of the form [text](path#anchor)"
    if not (COMMITTED / report.FIGURES).exists():
        assert [link for link in linked if link[1][1]] == []
        return
    run = report.load(COMMITTED)
    assert [w for d in DOCUMENTS for w in claims.wrong(run, d, COMMITTED)] == []


def test_what_is_committed_is_what_the_committed_figures_make() -> None:
    plots = {f"plots/{file.name}" for file in (COMMITTED / "plots").glob("*")}
    if not (COMMITTED / report.FIGURES).exists():
        assert not plots
        assert not (COMMITTED / report.REPORT).exists()
        return
    run = report.load(COMMITTED)
    files = render(run)
    assert {name: (COMMITTED / name).read_text(encoding="utf-8") for name in files} == files
    assert plots | {report.REPORT} == set(files)
    assert run.problems() == {}
    assert not run.quick
    assert set(run.asked) == set(command.SECTIONS)
    assert Counter(anchors(files[report.REPORT])).most_common(1)[0][1] == 1


def test_a_section_that_fails_does_not_lose_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sections = {"queue": "here", "twice": "here", "gone": "benchmarks.gone", "broken": "broken"}
    here, broken = ModuleType("here"), ModuleType("broken")
    here.measure = lambda rounds, quick: SECTION  # type: ignore[attr-defined]  # noqa: ARG005
    broken.measure = lambda rounds, quick: int(f"{REPO}/x\nmore")  # type: ignore[attr-defined]  # noqa: ARG005
    monkeypatch.setitem(sys.modules, "here", here)
    monkeypatch.setitem(sys.modules, "broken", broken)
    monkeypatch.setattr(command, "SECTIONS", sections)
    run = command.run(list(sections), 3, quick=False, folder=tmp_path)
    assert [section.id for section in run.sections] == ["queue"]
    assert run.errors == {
        "twice": "ValueError: Ids must be unique in the whole report: "
        "drain-c100, growth, pickup, queue",
        "gone": "ModuleNotFoundError: No module named 'benchmarks.gone'",
        "broken": "ValueError: invalid literal for int() with base 10: './x\\nmore'",
    }
    assert report.load(tmp_path) == REPORTS.validate_json(REPORTS.dump_json(run))
    assert run.machine.commit is None or len(run.machine.commit) == 40
    assert str(REPO) not in (tmp_path / report.FIGURES).read_text()


def test_the_command_says_by_its_exit_code_whether_all_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "SECTIONS", {"gone": "benchmarks.gone"})
    failed = CliRunner().invoke(command.main, ["--output", str(tmp_path)])
    assert failed.exit_code == 1
    assert "gone failed: ModuleNotFoundError" in failed.output
    without_plots = replace(RUN, sections=[replace(SECTION, plots=())])
    report.save(without_plots, tmp_path)
    rendered = CliRunner().invoke(command.main, ["--render", "--output", str(tmp_path)])
    assert rendered.exit_code == 0
    assert (tmp_path / report.REPORT).read_text() == report.markdown(without_plots)


def test_errors_in_the_report_name_no_path_and_no_password() -> None:
    error = f"could not open {REPO}/x: postgresql://postgres:secret@127.0.0.1/x, {Path.home()}/y"
    assert without_paths(error) == "could not open ./x: postgresql://127.0.0.1/x, ~/y"


def test_every_module_is_in_the_readme() -> None:
    readme = (COMMITTED / "README.md").read_text()
    modules = {file.name for file in COMMITTED.glob("*.py")} - {"__init__.py"}
    assert [name for name in sorted(modules) if f"`{name}`" not in readme] == []
