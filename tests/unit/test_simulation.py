"""benchmarks.simulate against queueing theory, the real splitting, and its own accounts."""

import json
import random
from itertools import pairwise
from math import factorial, inf
from statistics import mean
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.fair_queue import Job
from benchmarks.prices import Speed
from benchmarks.simulate import main
from benchmarks.simulation import DAY, Load, Outcome, System, percentile, simulate, spans
from modal_functions.plan import SAMPLE_RATE
from modal_functions.splitting import MAX_SECONDS, MIN_SECONDS, split

# Nothing but calls, as theory has it: always warm, one for each job, a second for a second.
BARE: dict[str, Any] = {
    "speed": 1.0,
    "overhead": 0.0,
    "cold_start": 0.0,
    "scaledown": inf,
    "prepare": 0.0,
    "decoding_speed": inf,
    "max_span": inf,
}


def erlang_c(servers: int, offered: float) -> float:
    """The part of arrivals that must wait in M/M/c."""
    busy = offered**servers / factorial(servers) * servers / (servers - offered)
    return busy / (sum(offered**n / factorial(n) for n in range(servers)) + busy)


def waits(outcome: Outcome) -> list[float]:
    return [record.started - record.job.arrival for record in outcome.records]


def served(load: Load, system: System) -> Outcome:
    return simulate(system, load.jobs(random.Random(2)))


def test_waits_are_those_of_the_m_m_c_queue() -> None:
    servers, offered = 2, 1.3
    load = Load(hours_a_day=24 * offered, days=30, minutes=1, lengths="exponential", owners=1)
    outcome = served(load, System(fair=False, slots=servers, max_containers=servers, **BARE))
    waited = [wait for wait in waits(outcome) if wait > 1e-9]
    assert len(waited) / len(outcome.records) == pytest.approx(erlang_c(servers, offered), rel=0.03)
    # Whoever waits does so for the ends of a queue that empties at the rate that is left.
    assert mean(waited) == pytest.approx(60 / (servers - offered), rel=0.03)
    assert outcome.busy / (servers * 30 * DAY) == pytest.approx(offered / servers, rel=0.02)


def test_waits_are_those_of_the_m_d_1_queue() -> None:
    busy = 0.6
    load = Load(hours_a_day=24 * busy, days=40, minutes=1, lengths="fixed", owners=1)
    outcome = served(load, System(slots=1, max_containers=1, **BARE))
    assert mean(waits(outcome)) == pytest.approx(60 * busy / (2 * (1 - busy)), rel=0.03)


def test_a_load_has_the_hours_the_owners_and_the_peak_that_were_asked_for() -> None:
    jobs = Load(hours_a_day=2000, daily=0.8, heavy_files=50).jobs(random.Random(1))
    assert [job.number for job in jobs] == list(range(len(jobs)))
    assert all(one.arrival <= other.arrival for one, other in pairwise(jobs))
    assert [job.arrival for job in jobs if job.owner == 0] == [9 * 3600.0] * 50
    light = [job for job in jobs if job.owner]
    assert {job.owner for job in light} == set(range(1, 21))
    assert sum(job.seconds for job in light) / 3600 == pytest.approx(2000, rel=0.05)
    afternoon, night = (
        sum(hour * 3600 <= job.arrival < (hour + 2) * 3600 for job in light) for hour in (13, 1)
    )
    assert afternoon / night == pytest.approx(1.8 / 0.2, rel=0.25)
    uploads = Load(hours_a_day=2000, upload=20).jobs(random.Random(1))
    together: dict[float, set[int]] = {}
    for job in uploads:
        together.setdefault(job.arrival, set()).add(job.owner)
    assert len(uploads) / len(together) == pytest.approx(20, rel=0.1)
    assert all(len(owners) == 1 for owners in together.values())


def test_spans_are_as_long_as_the_real_ones() -> None:
    rng = random.Random(1)
    seconds = 40 * 60
    samples = np.tile(np.array([6000, -6000], np.int16), seconds * SAMPLE_RATE // 2)
    at = 0.0
    while (at := at + rng.expovariate(1 / 5)) < seconds:
        pause = int(at * SAMPLE_RATE)
        samples[pause : pause + int(rng.uniform(0.4, 1.2) * SAMPLE_RATE)] = 0
    real = [span.seconds for span in split(samples)]
    simulated = [
        spans(float(seconds), MIN_SECONDS, MAX_SECONDS, random.Random(seed)) for seed in range(50)
    ]
    assert mean(map(len, simulated)) == pytest.approx(len(real), rel=0.1)
    for lengths in simulated:
        assert sum(lengths) == pytest.approx(seconds)
        assert min(lengths) >= MIN_SECONDS
        assert max(lengths) <= MAX_SECONDS
    assert spans(42.0, MIN_SECONDS, MAX_SECONDS, rng) == [42.0]


def test_a_container_is_paid_for_from_its_start_to_its_end() -> None:
    job = Job(0, 5.0, 1, 60.0)
    system = System(speed=10, overhead=1, cold_start=20, scaledown=30, prepare=2, decoding_speed=60)
    outcome = simulate(system, [job])
    record = outcome.records[0]
    assert (record.claimed, record.started, record.ended) == (5.0, 28.0, 35.0)
    assert (outcome.paid, outcome.busy, outcome.cold) == (20.0 + 7.0 + 30.0, 7.0, 20.0)
    # The next one finds it warm, or it is gone.
    warm, late = (simulate(system, [job, Job(1, at, 1, 60.0)]) for at in (50.0, 70.0))
    assert (warm.containers_started, warm.records[1].started) == (1, 53.0)
    assert (late.containers_started, late.records[1].started) == (2, 93.0)


def test_calls_of_a_preempted_container_run_again() -> None:
    jobs = [Job(number, 0.0, 1, 6000.0) for number in range(5)]
    options: dict[str, Any] = {"speed": 10, "max_containers": 3}
    calm = simulate(System(**options), jobs)
    rough = simulate(System(preempted=60, **options), jobs)
    assert rough.preemptions > 10
    assert rough.busy > 0.9 * calm.busy  # all audio was transcribed to its end
    assert rough.paid > calm.paid
    assert rough.most_containers == calm.most_containers == 3
    assert all(record.ended < inf for record in rough.records)


def test_two_calls_in_a_container_need_half_the_containers() -> None:
    jobs = [Job(0, 0.0, 1, 3600.0)]
    one, two = (
        simulate(System(calls_per_job=8, max_containers=8, inputs=inputs), jobs)
        for inputs in (1, 2)
    )
    assert (one.most_containers, two.most_containers) == (8, 4)
    assert two.records[0].ended == one.records[0].ended


def test_fair_share_spares_the_others_a_heavy_owners_queue() -> None:
    load = Load(hours_a_day=50, days=0.3, heavy_files=150, heavy_hour=1)
    fair, unfair = (
        served(load, System(fair=fair, slots=3, max_containers=3)) for fair in (True, False)
    )
    light = [
        percentile([r.started - r.job.arrival for r in outcome.of(bool)], 95)
        for outcome in (fair, unfair)
    ]
    assert light[0] * 10 < light[1]
    assert len(fair.records) == len(unfair.records) > 150


def test_the_same_seed_gives_the_same_figures_and_another_one_others() -> None:
    def figures(*options: str) -> Any:
        return json.loads(CliRunner().invoke(main, ["--json", *options]).output)

    first, again, other = (figures(), figures(), figures("--seed", "2"))
    assert first == again
    assert first["wait_p95_s"] != other["wait_p95_s"]
    assert first["cost_per_audio_hour"] == pytest.approx(
        first["gpu_seconds_paid"] * first["price"] / first["audio_hours"]
    )


def test_prices_and_speeds_of_ones_own() -> None:
    options = ["--prices", "--gpu", "Mine:0.001:50", "--busy", "0.5"]
    answer = CliRunner().invoke(main, options)
    assert "| Mine | $0.001000 | yours | 50.0 | yours | $0.149 |" in answer.output
    assert Speed("L4", "", 20.0, "").cost() == pytest.approx(3600 / 20 * (0.000222 + 0.0000351))
    wrong = CliRunner().invoke(main, ["--prices", "--gpu", "Mine:cheap"])
    assert wrong.exit_code == 2
    assert "'Mine:cheap' must be NAME:DOLLARS_A_SECOND:SPEED" in wrong.output


def test_percentiles_are_values_that_were_there() -> None:
    assert [percentile([3, 1, 2, 4], percent) for percent in (50, 75, 95)] == [2, 3, 4]
    assert percentile([], 50) == 0
