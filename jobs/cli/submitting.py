"""``pgscribe transcribe``."""

import json
import sys
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from jobs.cli.common import friendly
from jobs.errors import PgscribeError

if TYPE_CHECKING:
    from jobs.client import JobClient


@click.command(short_help="Upload recordings, wait, print their text.")
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--model", help="tiny, base, small, medium, large, turbo, … [default: base]")
@click.option("--language", help="Language spoken, such as en [default: detected]")
@click.option("--translate", is_flag=True, help="Translate into English.")
@click.option("--word-timestamps", is_flag=True, help="Times for each word (in json).")
@click.option("--initial-prompt", help="Names and words to expect.")
@click.option(
    "--format",
    "output",
    type=click.Choice(["text", "timestamps", "json"]),
    default="text",
    show_default=True,
)
@friendly
def transcribe(  # noqa: PLR0913 - one argument per option
    *,
    files: tuple[Path, ...],
    model: str | None,
    language: str | None,
    translate: bool,
    word_timestamps: bool,
    initial_prompt: str | None,
    output: str,
) -> None:
    """Upload FILES to a pgscribe server, wait and print their transcripts.

    \b
    The server is the one that runs with `pgscribe dev` in this folder, or PGSCRIBE_URL with
    PGSCRIBE_TOKEN. Exit status 1 if any file failed.
      pgscribe transcribe talk.mp3
      pgscribe transcribe --format timestamps --language de *.m4a > all.txt
    """
    from jobs.client import JobClient
    from jobs.settings import ClientSettings

    options = _options(
        model=model,
        language=language,
        task="translate" if translate else None,
        word_timestamps=word_timestamps,
        initial_prompt=initial_prompt,
    )
    settings = ClientSettings.load()
    submitted: list[tuple[Path, UUID]] = []
    with JobClient(settings.url, settings.token.get_secret_value()) as client:
        try:
            for file in files:
                submitted += [(file, job_id) for job_id in _submit(client, file, options)]
            done = [_show(client, file, job_id, output) for file, job_id in submitted]
        except KeyboardInterrupt:
            click.echo(f"\nStopped waiting. {_what_goes_on(submitted)}", err=True)
            sys.exit(130)
        except (PgscribeError, click.ClickException):
            if submitted:
                click.echo(_what_goes_on(submitted), err=True)
            raise
    sys.exit(len(done) < len(files) or not all(done))


def _what_goes_on(submitted: list[tuple[Path, UUID]]) -> str:
    ids = " ".join(str(job_id) for _, job_id in submitted)
    return f"What was submitted goes on: {ids or 'nothing'}"


def _submit(client: "JobClient", file: Path, options: dict[str, Any]) -> list[UUID]:
    """Upload a file and submit it; what is wrong with this one is no reason to leave out others."""
    from jobs.errors import InvalidInput, RequestFailed

    try:
        return [client.submit(client.upload(file), options)]
    except InvalidInput as exc:
        click.echo(f"{file.name}: {exc}", err=True)
    except RequestFailed as exc:
        if exc.status == HTTPStatus.UNAUTHORIZED:
            raise click.ClickException(
                f"{exc}. PGSCRIBE_TOKEN is what was sent; `pgscribe token` makes a new one."
            ) from exc
        if exc.field is None:
            raise
        click.echo(f"{file.name}: {exc}", err=True)
    return []


def _show(client: "JobClient", file: Path, job_id: UUID, output: str) -> bool:
    """Wait for a job, print what came of it, and return whether that is a transcript."""
    from jobs.cli import terminal
    from jobs.models import Transcript

    with terminal.progress(file.name) as on_change:
        job = client.wait(job_id, on_change=on_change)
    if job.result is None:
        click.echo(f"{file.name}: {job.status}: {job.error or job.id}", err=True)
        return False
    if output == "json":
        click.echo(json.dumps({"file": file.name, **job.result}, ensure_ascii=False))
        return True
    transcript = Transcript.from_dict(job.result)
    text = terminal.lines(transcript) if output == "timestamps" else [transcript.text]
    click.echo("\n".join(text))
    return True


def _options(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, False)}
