import pytest

from jobs.errors import RateLimited
from web.throttle import Throttle


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_all_at_once_then_evenly(clock: Clock) -> None:
    throttle = Throttle(6, "requests", clock=clock)
    left = [throttle.take("a") for _ in range(6)]
    assert [allowance.remaining for allowance in left if allowance] == [5, 4, 3, 2, 1, 0]
    with pytest.raises(RateLimited, match="More than 6 requests a minute; wait 10 s") as caught:
        throttle.take("a")
    assert caught.value.limit == 6
    assert caught.value.retry_after == pytest.approx(10)
    clock.now += 10
    throttle.take("a")
    with pytest.raises(RateLimited):
        throttle.take("a")
    clock.now += 3600
    for _ in range(6):
        throttle.take("a")
    with pytest.raises(RateLimited):
        throttle.take("a")


def test_refusals_cost_nothing_and_names_are_apart(clock: Clock) -> None:
    throttle = Throttle(1, "requests", clock=clock)
    throttle.take("a")
    for _ in range(100):
        with pytest.raises(RateLimited):
            throttle.take("a")
    throttle.take("b")
    clock.now += 60
    throttle.take("a")


def test_checking_counts_nothing(clock: Clock) -> None:
    throttle = Throttle(2, "requests", clock=clock)
    for _ in range(5):
        throttle.check("a")
    throttle.take("a")
    throttle.check("a")
    throttle.take("a")
    with pytest.raises(RateLimited) as caught:
        throttle.check("a")
    assert caught.value.retry_after == pytest.approx(30)
    clock.now += 30
    throttle.check("a")


def test_a_limit_of_its_own_and_none(clock: Clock) -> None:
    throttle = Throttle(1, "requests", clock=clock)
    for _ in range(3):
        throttle.take("a", 3)
    with pytest.raises(RateLimited):
        throttle.take("a", 3)
    unlimited = Throttle(0, "requests", clock=clock)
    unlimited.check("a")
    assert unlimited.take("a") is None
    assert unlimited.take("a", 5) is not None


def test_headers(clock: Clock) -> None:
    allowance = Throttle(600, "requests", clock=clock).take("a")
    assert allowance is not None
    assert allowance.headers == {
        "RateLimit-Policy": '"default";q=600;w=60',
        "RateLimit": '"default";r=599;t=1',
    }


def test_memory_is_bounded_and_the_quiet_are_forgotten_first(clock: Clock) -> None:
    throttle = Throttle(2, "requests", max_names=3, clock=clock)
    for name in ("a", "a", "b", "c"):
        throttle.take(name)
    with pytest.raises(RateLimited):
        throttle.take("a")
    throttle.take("b")
    throttle.take("d")  # in the place of a, which was taken longest ago
    throttle.take("a")
    with pytest.raises(RateLimited):
        throttle.take("b", 1)
