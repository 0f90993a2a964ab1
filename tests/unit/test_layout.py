"""Whoever looks for something finds where it is."""

import pkgutil
import re

import jobs


def test_the_map_of_the_package_has_all_modules_and_no_others() -> None:
    assert jobs.__doc__ is not None
    named = set(re.findall(r"``([a-z_]+)``", jobs.__doc__)) - {"pgscribe", "web", "db"}
    assert named == {module.name for module in pkgutil.iter_modules(jobs.__path__)}
