"""`pgscribe setup-storage`, the policies it makes, and what a worker and the janitor do there."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
from click.testing import CliRunner
from psycopg.types.json import Jsonb
from pydantic import SecretStr

from db.embedded import SUPERUSER, EmbeddedPostgres
from jobs import database, retention
from jobs.cli import main
from jobs.errors import SettingsError, StorageRefused, StorageUnavailable
from jobs.settings import Settings
from jobs.storage import setup
from jobs.storage.setup import StorageNotReady
from jobs.storage.supabase import SupabaseStorage
from tests.conftest import MakeUser
from tests.supabase_storage.server import Bucket, Fault, StandIn, StoredObject

pytestmark = pytest.mark.anyio

# As the Storage server makes them, less what no policy looks at.
TABLES = """
    set local role supabase_storage_admin;
    create table storage.buckets (
      id text primary key, name text not null, public boolean default false,
      file_size_limit bigint, allowed_mime_types text[], created_at timestamptz default now());
    create table storage.objects (
      id uuid primary key default gen_random_uuid(), bucket_id text references storage.buckets,
      name text, owner uuid, metadata jsonb, unique (bucket_id, name));
    alter table storage.buckets enable row level security;
    alter table storage.objects enable row level security;
    create function storage.foldername(name text) returns text[] language plpgsql as $$
    declare parts text[];
    begin
      select string_to_array(name, '/') into parts;
      return parts[1:array_length(parts, 1) - 1];
    end $$;
"""


@pytest.fixture
def superuser(postgres: EmbeddedPostgres, conn: psycopg.Connection) -> Iterator[psycopg.Connection]:
    url = postgres.url(user=SUPERUSER, database=conn.info.dbname)
    with psycopg.connect(url) as connection:
        yield connection


@pytest.fixture
def tables(superuser: psycopg.Connection, conn: psycopg.Connection) -> None:
    """The tables of the Storage server, on which `postgres` may make policies as on hosted."""
    del conn
    with superuser.transaction():
        superuser.execute(TABLES)
        superuser.execute("reset role")
        superuser.execute("grant supabase_storage_admin to postgres")


@pytest.fixture(autouse=True)
def as_before(request: pytest.FixtureRequest) -> Iterator[None]:
    """Roles belong to all databases."""
    yield
    postgres: EmbeddedPostgres = request.getfixturevalue("postgres")
    with psycopg.connect(postgres.url(user=SUPERUSER), autocommit=True) as conn:
        conn.execute("revoke supabase_storage_admin from postgres")


def set_up(conn: psycopg.Connection, bucket: str = "audio") -> tuple[bool, str | None]:
    row = conn.execute("select * from pgscribe.set_up_storage(%s)", (bucket,)).fetchone()
    assert row is not None
    return row[0], row[1]


def test_without_the_tables_nothing_happens(conn: psycopg.Connection) -> None:
    assert set_up(conn) == (False, "The database has no tables of Supabase Storage.")
    assert conn.execute("select pgscribe.storage_policies('audio')").fetchone() == ([],)


def test_whoever_may_not_is_told(conn: psycopg.Connection, superuser: psycopg.Connection) -> None:
    with superuser.transaction():
        superuser.execute(TABLES)
    made, problem = set_up(conn)
    assert (made, problem) == (False, "postgres may not make policies on storage.objects.")
    assert conn.execute("select count(*) from storage.buckets").fetchone() == (0,)


@pytest.mark.usefixtures("tables")
def test_the_bucket_is_private_and_stays_as_it_is(conn: psycopg.Connection) -> None:
    assert set_up(conn) == (True, None)
    conn.execute("update storage.buckets set file_size_limit = 7")
    assert set_up(conn) == (False, None)
    row = conn.execute(
        "select id, name, public, file_size_limit, allowed_mime_types from storage.buckets"
    ).fetchall()
    assert row == [("audio", "audio", False, 7, ["audio/*", "video/*"])]
    policies = conn.execute("select count(*) from pg_policies where schemaname = 'storage'")
    assert policies.fetchone() == (4,)


@pytest.mark.usefixtures("tables")
def test_users_reach_their_own_folder_only(conn: psycopg.Connection, make_user: MakeUser) -> None:
    set_up(conn)
    conn.execute("insert into storage.buckets (id, name) values ('other', 'other')")
    one, two = make_user(), make_user()
    for user in (one, two):
        conn.execute(
            "insert into storage.objects (bucket_id, name)"
            " values ('audio', %(n)s), ('other', %(n)s)",
            {"n": f"{user}/talk.mp3"},
        )

    def execute(user: UUID | None, query: str, *values: object) -> list[tuple[object, ...]]:
        role = "authenticated" if user else "anon"
        with conn.transaction():
            conn.execute(f"set local role {role}")
            claims = Jsonb({"sub": str(user), "role": role} if user else {"role": role})
            conn.execute("select set_config('request.jwt.claims', %s::text, true)", (claims,))
            return conn.execute(query, values).fetchall()

    seen = "select bucket_id, name from storage.objects"
    assert execute(one, seen) == [("audio", f"{one}/talk.mp3")]
    assert execute(two, seen) == [("audio", f"{two}/talk.mp3")]
    assert execute(None, seen) == []
    insert = "insert into storage.objects (bucket_id, name) values (%s, %s) returning name"
    assert execute(one, insert, "audio", f"{one}/a/b.mp3") == [(f"{one}/a/b.mp3",)]
    for who, bucket, name in (
        (one, "audio", f"{two}/x.mp3"),
        (one, "audio", f"a/{one}/x.mp3"),
        (one, "audio", f"{one}"),
        (one, "audio", f"/{one}/x.mp3"),
        (one, "audio", f"{one}x/x.mp3"),
        (one, "audio", f"{str(one).upper()}/x.mp3"),
        (one, "other", f"{one}/x.mp3"),
        (None, "audio", f"{one}/x.mp3"),
        (None, "audio", "None/x.mp3"),
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            execute(who, insert, bucket, name)
    rename = "update storage.objects set name = %s where name = %s returning name"
    assert execute(one, rename, f"{one}/new.mp3", f"{one}/a/b.mp3") == [(f"{one}/new.mp3",)]
    assert execute(one, rename, f"{one}/stolen.mp3", f"{two}/talk.mp3") == []
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        execute(one, rename, f"{two}/planted.mp3", f"{one}/new.mp3")
    delete = "delete from storage.objects where name = %s returning name"
    assert execute(one, delete, f"{two}/talk.mp3") == []
    assert execute(one, delete, f"{one}/new.mp3") == [(f"{one}/new.mp3",)]


@pytest.mark.usefixtures("tables")
def test_a_bucket_of_any_name(conn: psycopg.Connection) -> None:
    set_up(conn, "it's")
    definition = conn.execute(
        "select qual from pg_policies where cmd = 'SELECT' and schemaname = 'storage'"
    ).fetchone()
    assert definition is not None
    assert "'it''s'" in definition[0]
    assert conn.execute("select pgscribe.storage_policies('it''s')").fetchone() == (setup.COMMANDS,)
    assert conn.execute("select pgscribe.storage_policies('audio')").fetchone() == ([],)


@pytest.mark.parametrize("function", ["set_up_storage", "storage_policies"])
@pytest.mark.parametrize("role", ["anon", "authenticated", "service_role"])
def test_only_operators_set_up(function: str, role: str, conn: psycopg.Connection) -> None:
    row = conn.execute(
        "select has_function_privilege(%s, %s, 'execute')", (role, f"pgscribe.{function}(text)")
    ).fetchone()
    assert row == (False,)


# The command


@pytest.fixture
def supabase(server: StandIn, settings: Settings) -> Settings:
    return settings.model_copy(
        update={
            "storage": "supabase",
            "supabase_url": server.url,
            "supabase_secret_key": SecretStr(server.secret_key),
            "max_upload_bytes": 40_000_000,
        }
    )


async def run(settings: Settings, *, check: bool = False) -> list[str]:
    said: list[str] = []
    await setup.run(settings, said.append, check=check)
    return said


@pytest.mark.usefixtures("tables")
async def test_all_is_made_and_tried(server: StandIn, supabase: Settings) -> None:
    server.buckets.clear()
    with pytest.raises(StorageNotReady, match="no bucket audio"):
        await run(supabase, check=True)
    said = await run(supabase)
    assert [line.split()[0] for line in said] == [
        "bucket", "policies", "upload", "download", "delete",
    ]  # fmt: skip
    bucket = server.buckets["audio"]
    assert (bucket.public, bucket.file_size_limit) == (False, 40_000_000)
    assert bucket.allowed_mime_types == ["audio/*", "video/*"]
    assert bucket.objects == {}, "the probe is gone"
    assert len(await run(supabase, check=True)) == 5
    assert "is private" in (await run(supabase))[0]


@pytest.mark.usefixtures("tables")
async def test_a_bucket_that_is_otherwise_is_changed(server: StandIn, supabase: Settings) -> None:
    server.buckets["audio"] = Bucket(public=True)
    with pytest.raises(StorageNotReady, match="another public, file_size_limit"):
        await run(supabase, check=True)
    assert server.buckets["audio"].public is True
    assert (await run(supabase))[0] == "bucket     audio updated"
    assert server.buckets["audio"].public is False


async def test_what_is_missing_is_named(
    server: StandIn, supabase: Settings, settings: Settings
) -> None:
    with pytest.raises(StorageNotReady, match="no tables of Supabase Storage"):
        await run(supabase)
    with pytest.raises(StorageNotReady, match=r"Policies on storage\.objects are missing"):
        await run(supabase, check=True)
    with pytest.raises(SettingsError, match="PGSCRIBE_SUPABASE_URL"):
        await run(settings)
    elsewhere = supabase.model_copy(update={"supabase_url": f"{server.url}/elsewhere"})
    with pytest.raises(StorageNotReady, match="no Storage API answers"):
        await run(elsewhere)
    wrong = SecretStr("wrong")
    with pytest.raises(StorageRefused, match="SECRET_KEY"):
        await run(supabase.model_copy(update={"supabase_secret_key": wrong}))
    with pytest.raises(StorageNotReady, match="PGSCRIBE_MAX_UPLOAD_BYTES"):
        await run(supabase.model_copy(update={"max_upload_bytes": 2**40}))


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("method", ["PUT", "GET"])
async def test_links_that_do_not_work_are_noticed(
    method: str, server: StandIn, supabase: Settings
) -> None:
    server.faults.append(Fault(method, "/sign/audio/", "503"))
    with pytest.raises(StorageNotReady, match="HTTP 503"):
        await run(supabase)
    assert server.buckets["audio"].objects == {}


@pytest.mark.usefixtures("tables")
def test_the_command(
    supabase: Settings, server: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "DATABASE_URL": supabase.database_url.get_secret_value(),
        "SUPABASE_URL": server.url,
        "SUPABASE_SECRET_KEY": server.secret_key,
        "MAX_UPLOAD_BYTES": "40000000",
    }.items():
        monkeypatch.setenv(f"PGSCRIBE_{name}", value)
    failed = CliRunner().invoke(main, ["setup-storage", "--check"])
    assert (failed.exit_code, "are missing" in failed.output) == (1, True)
    done = CliRunner().invoke(main, ["setup-storage"])
    assert (done.exit_code, done.output.count("\n")) == (0, 6), done.output
    assert CliRunner().invoke(main, ["setup-storage", "--check"]).exit_code == 0


# Retention


@pytest.fixture
async def pool(settings: Settings) -> AsyncIterator[database.Pool]:
    async with database.make_pool(settings, name="test") as pool:
        yield pool


async def test_old_audio_goes_and_nothing_is_forgotten_while_storage_is_away(
    conn: psycopg.Connection,
    user: UUID,
    pool: database.Pool,
    server: StandIn,
    storage: SupabaseStorage,
    settings: Settings,
) -> None:
    path = f"{user}/{uuid4()}.mp3"
    server.buckets["audio"].objects[path] = StoredObject(b"sound", "audio/mpeg")
    row = conn.execute(
        "insert into processing_jobs (user_id, file_path) values (%s, %s) returning job_id",
        (user, path),
    ).fetchone()
    assert row is not None
    conn.execute(
        "update procrastinate.procrastinate_jobs set status = 'cancelled' where id = %s", row
    )
    conn.execute("update processing_jobs set completed_at = now() - interval '9 days'")
    keep = settings.model_copy(update={"keep_audio_days": 5, "keep_cancelled_days": 5})
    server.faults += [Fault("DELETE", "/object/audio", "503") for _ in range(3)]
    with pytest.raises(StorageUnavailable):
        await retention.prune(pool, storage, keep)
    assert conn.execute("select count(*) from processing_jobs").fetchone() == (1,)
    pruned = await retention.prune(pool, storage, keep)
    assert (pruned["audio"], pruned["cancelled"]) == (1, 1)
    assert server.buckets["audio"].objects == {}


def test_the_migration_makes_them_where_the_tables_are(
    conn: psycopg.Connection, tables: None
) -> None:
    """As `migrate` runs it on a project: the file's last statement again."""
    del tables
    last = Path("db/migrations/20261124210000_storage.sql").read_text(encoding="utf-8")
    conn.execute(last.rpartition("\n\n")[2].encode())
    assert conn.execute("select pgscribe.storage_policies('audio')").fetchone() == (setup.COMMANDS,)
