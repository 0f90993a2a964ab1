"""The simulated tables of docs/scaling.md are what the commands above them print."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.simulate import HELP, SCENARIOS, loads, main
from benchmarks.simulation import Load, System

TEXT = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
COMMAND = "python -m benchmarks.simulate"
BLOCK = re.compile(
    r"<!-- run: simulate(?P<how>.*?) -->\n```sh\n(?P<command>.*?)\n```\n\n(?P<table>(?:\|.*\n)+)"
)
TABLES = {found["command"].removeprefix(COMMAND).strip(): found for found in BLOCK.finditer(TEXT)}
SLOW = "--scenario loads"  # takes half a minute


def lines(table: str) -> Iterator[str]:
    return (line.rstrip() for line in table.splitlines())


def test_every_scenario_and_the_prices_are_in_the_document() -> None:
    assert set(TABLES) == {"--prices", *(f"--scenario {name}" for name in SCENARIOS)}


@pytest.mark.parametrize("command", sorted(TABLES.keys() - {SLOW}))
def test_tables_are_what_the_command_prints(command: str) -> None:
    answer = CliRunner().invoke(main, shlex.split(command))
    assert answer.exit_code == 0
    assert [*lines(TABLES[command]["table"])] == answer.output.splitlines()


def test_the_large_table_begins_with_what_a_part_of_it_prints() -> None:
    small = [*loads((100,)).lines()]
    assert len(small) > 2
    shown = [*lines(TABLES[SLOW]["table"])]
    assert shown[: len(small)] == small
    assert {line.split(" | ")[0] for line in shown[2:]} == {"| 100 h", "| 1,000 h", "| 10,000 h"}


def test_each_option_says_what_it_is() -> None:
    names = [field.name for field in (*fields(Load), *fields(System))]
    assert list(HELP) == names
    answer = CliRunner().invoke(main, ["--help"])
    for name in names:
        option = "first-come-first-served" if name == "fair" else name.replace("_", "-")
        assert f"--{option}" in answer.output
