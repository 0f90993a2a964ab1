import importlib
import inspect

import pytest

from benchmarks.__main__ import SECTIONS


@pytest.mark.parametrize("name", SECTIONS)
def test_each_section_can_be_measured(name: str) -> None:
    measure = importlib.import_module(SECTIONS[name]).measure

    assert list(inspect.signature(measure).parameters) == ["rounds", "quick"]
