"""PostgREST behind Supabase's gateway, as far as functions and plain tables go, on a database.

``POST /rest/v1/rpc/<function>`` with named arguments runs as PostgREST runs it: a connection as
``authenticator``, the token's role and claims LOCAL, one transaction. Status codes and bodies are
those of PostgREST 14's documentation. Keys: tokens signed with HS256, and ``sb_…`` keys, for which
the gateway puts a token of its own.

Tables are read with ``select``, ``order``, ``limit`` and filters ``eq.``, and written by inserts,
perhaps with ``resolution=merge-duplicates``; tests/integration/test_docs_js.py asks for no more.

Not as there: there is no schema cache, a function has one signature, and of tables and profiles
nothing else is served.
"""

import collections
import http.server
import json
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.message import Message
from http import HTTPStatus
from typing import Any, Literal
from urllib.parse import parse_qsl
from uuid import UUID

import jwt
import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

Answer = tuple[int, Any]
# A status is a gateway's, with a page for people; "request" and "answer" say what gets lost.
Fault = int | Literal["request", "answer", "wait", "gateway"]

REST = "/rest/v1/"
RPC = f"{REST}rpc/"
# https://docs.postgrest.org/en/v14/references/errors.html, the first that fits; others are 400.
STATUSES = {
    "08": 503, "09": 500, "0L": 403, "0P": 403, "23503": 409, "23505": 409, "25006": 405,
    "25": 500, "28": 403, "2D": 500, "38": 500, "39": 500, "3B": 500, "40": 500, "53400": 500,
    "53": 503, "54": 500, "55": 500, "57": 500, "58": 500, "F0": 500, "HV": 500, "P0001": 400,
    "P0": 500, "XX": 500, "42883": 404, "42P01": 404, "42P17": 500,
}  # fmt: skip
FUNCTION = """
    select p.proargnames[:p.pronargs],
           array(select format_type(t, null) from unnest(p.proargtypes) t),
           p.pronargs - p.pronargdefaults, p.proretset
      from pg_proc p where p.pronamespace = 'public'::regnamespace and p.proname = %s
"""
PRIMARY_KEY = """
    select a.attname from pg_index i
      join pg_attribute a on a.attrelid = i.indrelid and a.attnum = any (i.indkey)
     where i.indrelid = %s::regclass and i.indisprimary
"""


class LocalSupabase:
    """A project's URL and keys. ``database`` is what it serves, ``requests`` what was asked of it,
    ``faults`` what goes wrong with the next requests.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.database = ""
        self.faults: collections.deque[Fault] = collections.deque()
        self.requests: list[Mapping[str, str]] = []
        self._jwt_secret = secrets.token_hex(32)
        self.service_role_key = self.token(role="service_role", iss="supabase")
        self.anon_key = self.token(role="anon", iss="supabase")
        self.secret_key = f"sb_secret_{secrets.token_hex(16)}"
        self.publishable_key = f"sb_publishable_{secrets.token_hex(16)}"

    def token(self, **claims: object) -> str:
        lifetime = {"exp": int(time.time()) + 3600}
        return jwt.encode(lifetime | claims, self._jwt_secret, algorithm="HS256")

    def user_token(self, user: UUID) -> str:
        return self.token(role="authenticated", sub=str(user), aud="authenticated")

    def answer(self, path: str, headers: Message, body: bytes) -> Answer:
        """Answer as gateway, then as PostgREST."""
        apikey, token = headers.get("apikey", ""), headers.get("authorization", "")
        token = token.removeprefix("Bearer ")
        own = {self.secret_key: self.service_role_key, self.publishable_key: self.anon_key}
        if apikey not in own and not self._claims(apikey):
            return HTTPStatus.UNAUTHORIZED, {
                "message": "Invalid API key",
                "hint": "Double check your Supabase `anon` or `service_role` API key.",
            }
        if apikey in own and token in {"", apikey}:
            token = own[apikey]
        anonymous: dict[str, Any] = {"role": "anon"}
        claims = self._claims(token) if token else anonymous
        if claims is None:
            return HTTPStatus.UNAUTHORIZED, _error("PGRST301", "JWT cryptographic operation failed")
        if claims.get("exp", time.time()) < time.time() - 30:
            return HTTPStatus.UNAUTHORIZED, _error("PGRST303", "JWT expired")
        if not path.startswith(RPC):
            return self._table(path.removeprefix(REST), headers, body, claims)
        try:
            arguments = json.loads(body)
        except ValueError:
            return HTTPStatus.BAD_REQUEST, _error("PGRST102", "Empty or invalid json")
        return self._call(path.removeprefix(RPC), arguments, claims)

    def _claims(self, token: str) -> dict[str, Any] | None:
        options: Any = {"verify_aud": False, "verify_exp": False}
        try:
            return jwt.decode(token, self._jwt_secret, algorithms=["HS256"], options=options)
        except jwt.InvalidTokenError:
            return None

    def _call(self, function: str, arguments: dict[str, Any], claims: dict[str, Any]) -> Answer:
        role = claims.get("role", "anon")
        try:
            with self._acting_as(claims) as conn:
                found = conn.execute(FUNCTION, (function,)).fetchone()
                names = (found[0] or []) if found else []
                if not found or not set(names[: found[2]]) <= set(arguments) <= set(names):
                    return HTTPStatus.NOT_FOUND, _not_found(function, arguments)
                types = dict(zip(names, found[1], strict=True))
                columns = [
                    sql.SQL("{} " + types[name]).format(sql.Identifier(name)) for name in arguments
                ]
                named = [sql.SQL("{0} := _.{0}").format(sql.Identifier(name)) for name in arguments]
                query = sql.SQL(
                    "select to_json(called)"
                    " from json_to_record(%s) as _({}), lateral public.{}({}) called"
                ).format(
                    sql.SQL(", ").join(columns),
                    sql.Identifier(function),
                    sql.SQL(", ").join(named),
                )
                rows = [row[0] for row in conn.execute(query, (json.dumps(arguments),))]
                return HTTPStatus.OK, rows if found[3] else rows[0]
        except psycopg.Error as exc:
            return _refused(exc, role)

    @contextmanager
    def _acting_as(self, claims: Mapping[str, Any]) -> Iterator[psycopg.Connection]:
        """Yield a transaction with the token's role and claims."""
        url = make_conninfo(self.database, user="authenticator")
        with psycopg.connect(url) as conn:
            conn.execute(
                "select set_config('role', %s, true), set_config('request.jwt.claims', %s, true)",
                (claims.get("role", "anon"), json.dumps(claims)),
            )
            yield conn

    def _table(self, path: str, headers: Message, body: bytes, claims: Mapping[str, Any]) -> Answer:
        table, _, text = path.partition("?")
        asked = dict(parse_qsl(text))
        values = (json.dumps(_rows(body)),) if body else ()
        try:
            with self._acting_as(claims) as conn:
                if body:
                    keys = [row[0] for row in conn.execute(PRIMARY_KEY, (f"public.{table}",))]
                    asked.setdefault("on_conflict", ",".join(keys))
                    query = _insert(table, asked, headers, body)
                else:
                    query = _select(table, asked)
                cursor = conn.execute(query, values)
                rows = [row[0] for row in cursor] if cursor.description else []
        except psycopg.Error as exc:
            return _refused(exc, claims.get("role", "anon"))
        if headers.get("accept") == "application/vnd.pgrst.object+json":
            if len(rows) != 1:
                message = "Cannot coerce the result to a single JSON object"
                return HTTPStatus.NOT_ACCEPTABLE, _error("PGRST116", message)
            return HTTPStatus.OK, rows[0]
        return HTTPStatus.CREATED if body else HTTPStatus.OK, rows


def _columns(asked: Mapping[str, str]) -> sql.Composed:
    names = asked.get("select", "*").split(",")
    return sql.SQL(", ").join(
        sql.SQL("*") if name == "*" else sql.Identifier(name) for name in names
    )


def _select(table: str, asked: Mapping[str, str]) -> sql.Composed:
    """Translate a query; what is not known here is a column, which then has to be compared."""
    conditions = [
        sql.SQL("{} = {}").format(sql.Identifier(name), value.removeprefix("eq."))
        for name, value in asked.items()
        if name not in {"select", "order", "limit"}
    ]
    query = sql.SQL("select {} from public.{} where {}").format(
        _columns(asked),
        sql.Identifier(table),
        sql.SQL(" and ").join([sql.SQL("true"), *conditions]),
    )
    if "order" in asked:
        name, _, direction = asked["order"].partition(".")
        query += sql.SQL(" order by {} " + {"desc": "desc"}.get(direction, "asc")).format(
            sql.Identifier(name)
        )
    if "limit" in asked:
        query += sql.SQL(" limit {}").format(int(asked["limit"]))
    return sql.SQL("select to_json(found) from ({}) found").format(query)


def _rows(body: bytes) -> list[dict[str, Any]]:
    said = json.loads(body)
    return said if isinstance(said, list) else [said]


def _insert(table: str, asked: Mapping[str, str], headers: Message, body: bytes) -> sql.Composed:
    prefer = headers.get("prefer", "")
    names = [sql.Identifier(name) for name in _rows(body)[0]]
    query = sql.SQL(
        "insert into public.{0} ({1}) select {1} from json_populate_recordset(null::public.{0}, %s)"
    ).format(sql.Identifier(table), sql.SQL(", ").join(names))
    if "resolution=merge-duplicates" in prefer:
        keys = asked["on_conflict"].split(",")
        query += sql.SQL(" on conflict ({}) do update set {}").format(
            sql.SQL(", ").join(map(sql.Identifier, keys)),
            sql.SQL(", ").join(sql.SQL("{0} = excluded.{0}").format(name) for name in names),
        )
    if "return=representation" in prefer:
        query += sql.SQL(" returning {}").format(_columns(asked))
        return sql.SQL("with made as ({}) select to_json(made) from made").format(query)
    return query


def _refused(exc: psycopg.Error, role: str) -> Answer:
    problem = exc.diag
    code = problem.sqlstate or "PGRST001"
    body = _error(code, problem.message_primary, problem.message_detail, problem.message_hint)
    return _status(code, anonymous=role == "anon"), body


def _error(
    code: str, message: str | None, details: str | None = None, hint: str | None = None
) -> Mapping[str, Any]:
    return {"code": code, "details": details, "hint": hint, "message": message}


def _not_found(function: str, arguments: dict[str, Any]) -> Mapping[str, Any]:
    signature = f"public.{function}({', '.join(sorted(arguments))})"
    return _error(
        "PGRST202",
        f"Could not find the function {signature} in the schema cache",
        f"Searched for the function {signature}, but no matches were found in the schema cache.",
    )


def _status(code: str, *, anonymous: bool) -> int:
    if code == "42501":
        return HTTPStatus.UNAUTHORIZED if anonymous else HTTPStatus.FORBIDDEN
    if code.startswith("PGRST0"):
        return HTTPStatus.SERVICE_UNAVAILABLE
    return next((status for prefix, status in STATUSES.items() if code.startswith(prefix)), 400)


class _Server(http.server.ThreadingHTTPServer):
    project: LocalSupabase
    stopping: threading.Event


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        project = self.server.project
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        project.requests.append(dict(self.headers))
        fault = project.faults.popleft() if project.faults else None
        if isinstance(fault, int):
            self._send(fault, "text/html", b"<h1>upstream connect error</h1>")
            return
        if fault == "gateway":  # Kong, whose errors have no code
            self._send(503, "application/json", b'{"message": "name resolution failed"}')
            return
        if fault == "wait":
            self.server.stopping.wait(60)
        if fault in {"request", "wait"}:
            self._hang_up()
            return
        status, answer = project.answer(self.path, self.headers, body)
        if fault == "answer":
            self._hang_up()
            return
        self._send(status, "application/json; charset=utf-8", json.dumps(answer).encode())

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if status in range(300, 400):
            self.send_header("Location", f"{self.server.project.url}/elsewhere")
        self.end_headers()
        self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@contextmanager
def serve() -> Iterator[LocalSupabase]:
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.project = LocalSupabase(f"http://127.0.0.1:{server.server_port}")
        server.stopping = threading.Event()
        thread = threading.Thread(target=server.serve_forever, name="postgrest")
        thread.start()
        try:
            yield server.project
        finally:
            server.stopping.set()
            server.shutdown()
            thread.join()
