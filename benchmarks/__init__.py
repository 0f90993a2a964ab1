"""What pgscribe is measured with; README.md says how to run it. Nothing in production uses it."""

from importlib.util import find_spec

if _missing := [name for name in ("matplotlib", "simpy") if find_spec(name) is None]:
    raise ImportError(
        f"The benchmarks need {' and '.join(_missing)}; run: pip install -e '.[bench]' "
        "(`make bench` does)"
    )
