"""The section ``promises``: what README.md promises, while everything is done against it.

Each promise has a module: door.py, by_hand.py, isolation.py, paid.py, crashes.py.
"""

import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

from benchmarks import by_hand, crashes, door, isolation, owners, paid
from benchmarks.door_client import UNDONE
from benchmarks.figures import Measurement, Section
from benchmarks.paid_app import WORK
from benchmarks.postgres import OWNERS, Postgres, postgres
from benchmarks.web_process import web_process

METHOD = """\
What the README promises, and what was done against it, once; only the cost of the policies has a
figure of each round. A violation is counted, and does not end the run. Each part has a database of
its own.

"""


def tables(
    server: Postgres,
    folder: Path,
    agreement: by_hand.Agreement,
    sizes: isolation.Sizes,
    rounds: int,
) -> tuple[list[Measurement], list[Measurement]]:
    """Return the lines about writing by hand, and about what owners see of each other."""
    with ExitStack() as stack:
        name = stack.enter_context(server.fresh())
        conn = stack.enter_context(server.connect(name))
        web = stack.enter_context(web_process(server.url(name), folder))
        made = [owners.make(conn, folder / "storage", number) for number in range(sizes.owners)]
        truth = list(by_hand.measure(conn, made[0]))
        seen = list(isolation.measure(conn, web, made, sizes, rounds))
        agreement.look(conn)
    return truth, seen


def measure(rounds: int, quick: bool) -> Section:  # noqa: FBT001 - the contract
    """Try to break each promise."""
    of_door = door.QUICK if quick else door.Sizes()
    of_tables = isolation.QUICK if quick else isolation.Sizes()
    of_calls = paid.QUICK if quick else paid.Sizes()
    of_engines = crashes.QUICK if quick else crashes.Sizes()
    agreement = by_hand.Agreement()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(postgres(track_commit_timestamp="on"))
        server.add_template(paid.BARE)
        entered = list(door.measure(server, folder, agreement, of_door))
        truth, seen = tables(server, folder, agreement, of_tables, rounds)
        calls = list(paid.measure(server, folder, agreement, of_calls))
        crashed = list(crashes.measure(server, folder, agreement, of_engines))
    methods = (
        door.METHOD.format(undone=UNDONE, **vars(of_door)),
        by_hand.METHOD,
        isolation.METHOD.format(all_owners=len(OWNERS), **vars(of_tables)),
        paid.METHOD.format(stall=paid.STALL_TIMEOUT, work=WORK, **vars(of_calls)),
        crashes.METHOD.format(**vars(of_engines)),
    )
    return Section(
        "promises",
        "Promises",
        METHOD + "\n\n".join(methods),
        [*entered, *truth, *agreement.measurements(), *seen, *calls, *crashed],
        versions={name: version(name) for name in ("procrastinate", "modal")},
    )
