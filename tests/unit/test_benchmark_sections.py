import importlib
import inspect
import os
import subprocess
import sys

import pytest

from benchmarks.__main__ import SECTIONS
from benchmarks.memory import resident_of_tree

GROWN = "x = bytearray(60_000_000); print(flush=True); input()"


@pytest.mark.parametrize("name", SECTIONS)
def test_each_section_can_be_measured(name: str) -> None:
    measure = importlib.import_module(SECTIONS[name]).measure

    assert list(inspect.signature(measure).parameters) == ["rounds", "quick"]


def test_memory_is_that_of_all_processes_below() -> None:
    before = resident_of_tree(os.getpid())
    below = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {GROWN!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", below], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()

        assert resident_of_tree(os.getpid()) > before + 60
        child.communicate(b"\n")


def test_without_its_packages_it_says_how_to_install_them() -> None:
    absent = "import sys; sys.modules['simpy'] = None; import benchmarks.simulate"
    done = subprocess.run(
        [sys.executable, "-c", absent], capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert "ImportError: The benchmarks need simpy; run: pip install -e '.[bench]'" in done.stderr
