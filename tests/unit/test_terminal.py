import pytest

from jobs.cli import terminal


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00.0"),
        (7.24, "0:07.2"),
        (59.96, "1:00.0"),
        (61.5, "1:01.5"),
        (3599.99, "1:00:00.0"),
        (36000.1, "10:00:00.1"),
    ],
)
def test_timestamp(seconds: float, text: str) -> None:
    assert terminal.timestamp(seconds) == text
