"""``pgscribe transcribe``."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from jobs.cli.common import friendly


@click.command()
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
    from jobs.cli import terminal
    from jobs.client import JobClient
    from jobs.models import Transcript
    from jobs.settings import ClientSettings

    options = _options(
        model=model,
        language=language,
        task="translate" if translate else None,
        word_timestamps=word_timestamps,
        initial_prompt=initial_prompt,
    )
    settings = ClientSettings.load()
    failed = False
    with JobClient(settings.url, settings.token.get_secret_value()) as client:
        submitted = [(file, client.submit(client.upload(file), options)) for file in files]
        for file, job_id in submitted:
            with terminal.progress(file.name) as on_change:
                job = client.wait(job_id, on_change=on_change)
            if job.result is None:
                failed = True
                click.echo(f"{file.name}: {job.status}: {job.error}", err=True)
            elif output == "json":
                click.echo(json.dumps({"file": file.name, **job.result}, ensure_ascii=False))
            else:
                transcript = Transcript.from_dict(job.result)
                text = terminal.lines(transcript) if output == "timestamps" else [transcript.text]
                click.echo("\n".join(text))
    sys.exit(failed)


def _options(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, False)}
