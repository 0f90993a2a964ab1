"""A Postgres of a benchmark's own, with fresh databases."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from uuid import UUID

import psycopg
from psycopg.conninfo import make_conninfo

from db import migrate
from db.embedded import SUPERUSER, EmbeddedPostgres

OWNERS = [UUID(int=number) for number in range(1, 33)]
NO_LIMIT = 2_000_000_000


class Postgres:
    """A running server. ``fresh`` clones what it made at its start: pgscribe, migrated."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self._server = server
        self._names = (f"benchmark_{number}" for number in count())
        self.add_template("pgscribe")
        with self.connect("pgscribe") as conn:
            migrate.migrate(self.url("pgscribe"))
            conn.execute(
                "insert into auth.users (id, email) select id, id || '@example.org'"
                " from unnest(%s::uuid[]) id",
                (OWNERS,),
            )
            conn.execute("update pgscribe.default_limits set max_queued = %s", (NO_LIMIT,))

    def add_template(self, name: str) -> None:
        """Make a database that has what a hosted Supabase has, and nothing else."""
        self._server.create_database(name)
        self._server.bootstrap(name)

    def url(self, database: str, *, superuser: bool = False) -> str:
        """Return where a database is found."""
        user = SUPERUSER if superuser else "postgres"
        url = self._server.url(user=user, database=database)
        return make_conninfo(url, sslmode="disable", gssencmode="disable")

    def connect(
        self, database: str, *, superuser: bool = False
    ) -> psycopg.Connection[tuple[object, ...]]:
        """Return a connection on which each statement is a transaction."""
        return psycopg.connect(self.url(database, superuser=superuser), autocommit=True)

    @contextmanager
    def fresh(self, template: str = "pgscribe") -> Iterator[str]:
        """Provide the name of a new database."""
        name = next(self._names)
        self._server.create_database(name, template=template)
        try:
            yield name
        finally:
            self._server.drop_database(name)


@contextmanager
def postgres(**settings: str) -> Iterator[Postgres]:
    """Run a server, fsync on, unless the settings say something else."""
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedPostgres(Path(folder) / "postgres", settings=settings)
        try:
            server.start()
            yield Postgres(server)
        finally:
            server.remove()
