import pickle

import pytest

from jobs.errors import LimitReached, PgscribeError, RequestFailed, ScopeMissing, SettingsError


@pytest.mark.parametrize(
    "exc",
    [
        SettingsError(),
        RequestFailed("jobs[1]: no", status=422, code="invalid_input", field="jobs[1]"),
        LimitReached("max_queued: no", limit="max_queued", retry_after=60),
        ScopeMissing("jobs:write"),
    ],
)
def test_errors_come_whole_out_of_a_pool_of_processes(exc: PgscribeError) -> None:
    passed_on = pickle.loads(pickle.dumps(exc))
    assert type(passed_on) is type(exc)
    assert (str(passed_on), vars(passed_on)) == (str(exc), vars(exc))
