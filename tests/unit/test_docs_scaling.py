"""The simulated tables of docs/scaling.md are what the commands above them print."""

import shlex
from dataclasses import fields
from itertools import takewhile

import pytest
from click.testing import CliRunner

from benchmarks.simulate import HELP, SCENARIOS, loads, main
from benchmarks.simulation import Load, System
from tests.doc_blocks import DOCS, Block, runs

BLOCKS = runs("simulate")
SLOW = "--scenario loads"  # takes half a minute


def command(block: Block) -> str:
    """Return the command's options."""
    program, options = block.code.strip().split("simulate", 1)
    assert program == "python -m benchmarks."
    return options.strip()


def table(block: Block) -> list[str]:
    """Return the table below a block."""
    text = (DOCS / "scaling.md").read_text(encoding="utf-8")
    _, _, below = text.partition(f"{block.code}```\n\n")
    return [*takewhile(lambda line: line.startswith("|"), below.splitlines())]


def test_every_scenario_and_the_prices_are_in_the_document() -> None:
    shown = sorted(map(command, BLOCKS))
    assert shown == ["--prices", *sorted(f"--scenario {name}" for name in SCENARIOS)]


@pytest.mark.parametrize("block", [b for b in BLOCKS if command(b) != SLOW], ids=command)
def test_tables_are_what_the_command_prints(block: Block) -> None:
    answer = CliRunner().invoke(main, shlex.split(command(block)))
    assert answer.exit_code == 0
    assert table(block) == answer.output.splitlines()


def test_the_large_table_begins_with_what_a_part_of_it_prints() -> None:
    (block,) = (block for block in BLOCKS if command(block) == SLOW)
    small = [*loads((int(block.options["begins"]),)).lines()]
    assert len(small) > 2
    assert table(block)[: len(small)] == small
    loads_shown = {line.split(" | ")[0] for line in table(block)[2:]}
    assert loads_shown == {"| 100 h", "| 1,000 h", "| 10,000 h"}


def test_each_option_says_what_it_is() -> None:
    names = [field.name for field in (*fields(Load), *fields(System))]
    assert list(HELP) == names
    answer = CliRunner().invoke(main, ["--help"])
    for name in names:
        option = "first-come-first-served" if name == "fair" else name.replace("_", "-")
        assert f"--{option}" in answer.output
