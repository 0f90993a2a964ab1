"""The same server stack without pgscribe: what ``benchmarks.api`` compares with.

uvicorn, Starlette and the pool of connections are as in ``pgscribe web``; there are no tokens, no
row level security, no checks of what comes in, and no queue.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import click
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jobs import database
from jobs.settings import Settings

GET = "select to_jsonb(j)::text from public.processing_jobs j where id = %s"
LIST = """
select jsonb_agg(to_jsonb(j) - 'result')::text
  from (select * from public.processing_jobs where user_id = %s
         order by created_at desc limit 20) j
"""
TABLE = """
create table public.bare (
  id uuid primary key default gen_random_uuid(), body jsonb, at timestamptz default now())
"""
INSERT = "insert into public.bare (body) values (%s) returning id::text"


async def _one(request: Request, query: str, value: str) -> str:
    async with request.app.state.pool.connection() as conn:
        (found,) = await (await conn.execute(query.encode(), (value,))).fetchone()
    return str(found)


async def get_job(request: Request) -> Response:
    """Select a row by its key."""
    return Response(await _one(request, GET, request.path_params["id"]))


async def list_jobs(request: Request) -> Response:
    """Select an owner's newest rows by an index."""
    return Response(await _one(request, LIST, request.query_params["owner"]))


async def submit(request: Request) -> Response:
    """Insert a row into a table without triggers."""
    body = await request.body()
    return JSONResponse({"id": await _one(request, INSERT, body.decode())}, status_code=202)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Open the pool."""
    async with database.make_pool(Settings.load(), name="bare") as pool:
        app.state.pool = pool
        yield


@click.command()
@click.option("--port", type=int, required=True)
def main(port: int) -> None:
    """Serve until killed."""
    routes = [
        Route("/jobs/{id}", get_job),
        Route("/jobs", list_jobs),
        Route("/process", submit, methods=["POST"]),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    uvicorn.run(app, port=port, log_config=None, server_header=False)


if __name__ == "__main__":
    main()
