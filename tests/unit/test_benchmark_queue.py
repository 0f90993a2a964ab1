from pathlib import Path

import pytest

from benchmarks.queue import Comparison
from benchmarks.queue_rounds import in_turn
from benchmarks.queue_systems import OURS, PLAIN, PeerFailed, Places, System

PEER = System("peer", ("true",))
SYSTEMS = [System(PLAIN, ("true",)), System(OURS, ("true",)), PEER]


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    comparison = Comparison(Places(tmp_path), [])
    comparison.systems = SYSTEMS
    return comparison


def test_every_system_begins_and_ends_rounds() -> None:
    orders = [[system.name for system in in_turn(SYSTEMS, number)] for number in range(6)]
    assert [order[0] for order in orders] == [PLAIN, OURS, "peer"] * 2
    assert {order[-1] for order in orders} == {PLAIN, OURS, "peer"}
    assert all(sorted(order) == sorted([PLAIN, OURS, "peer"]) for order in orders)


def test_a_peer_that_fails_is_left_out_and_says_why(comparison: Comparison) -> None:
    def drain(system: System) -> float:
        if system is PEER and comparison.figures["drain-c10"]["peer"]:
            raise PeerFailed("peer", "its process ended")
        return 100.0

    for number in range(3):
        comparison.each("drain-c10", number, drain)
    (line,) = comparison.measurements([PLAIN, OURS, "peer"])
    assert line.values == {PLAIN: [100.0] * 3, OURS: [100.0] * 3}
    assert comparison.failed == {"peer": "it failed: peer: its process ended"}


def test_what_is_measured_together_is_measured_again_without_the_peer_that_fails(
    comparison: Comparison,
) -> None:
    def pickup() -> dict[str, dict[str, float]]:
        if PEER in comparison.systems:
            raise PeerFailed("peer", "no answer")
        return {"pickup-p50": {system.name: 2.0 for system in comparison.systems}}

    comparison.together(pickup)
    (line,) = comparison.measurements([PLAIN, OURS, "peer"])
    assert line.values == {PLAIN: [2.0], OURS: [2.0]}


def test_a_failure_of_ours_fails_the_section(comparison: Comparison) -> None:
    def drain(_: System) -> float:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        comparison.each("drain-c10", 0, drain)
