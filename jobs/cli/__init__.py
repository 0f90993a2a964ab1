"""The ``pgscribe`` command. Nothing heavy is imported before a command runs that needs it."""

import click

from jobs import __version__
from jobs.cli.access import keys, operators, token
from jobs.cli.doctor import doctor
from jobs.cli.operating import cancel, limit, pause, resume, retry, show_jobs
from jobs.cli.serving import dev, web, worker
from jobs.cli.setting_up import deploy, make_keys, migrate, setup_storage
from jobs.cli.submitting import transcribe
from jobs.cli.webhooks import webhooks

__all__ = ["SECTIONS", "main"]

# As the help shows them: what somebody new needs comes first.
SECTIONS = {
    "Start here": (dev, transcribe),
    "Run it": (
        make_keys,
        migrate,
        setup_storage,
        deploy,
        web,
        worker,
        doctor,
    ),
    "Jobs and the queue, of all owners": (show_jobs, cancel, retry, pause, resume, limit),
    "Access": (token, keys, operators),
    "Webhooks": (webhooks,),
}


class _Sections(click.Group):
    """Lists the commands under headings, in the order in which one needs them."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        width = max(map(len, self.commands))  # one column for all sections
        for heading, commands in SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl(
                    [(f"{one.name:<{width}}", one.get_short_help_str(80)) for one in commands]
                )


@click.group(
    cls=_Sections,
    commands=[command for section in SECTIONS.values() for command in section],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="pgscribe")
def main() -> None:
    """Transcription jobs in the Postgres you already have.

    \b
    Try it, with nothing but this machine:
      pgscribe dev                     everything embedded; prints a URL and a token
      pgscribe transcribe talk.mp3     in another terminal: upload, wait, print the text

    \b
    Run it for real (settings: PGSCRIBE_DATABASE_URL, PGSCRIBE_JWT_SECRET, … or a .env file):
      pgscribe migrate && pgscribe web
      pgscribe worker                  as many as you like
      pgscribe doctor                  what is wrong with all of it, and how to mend it

    \b
    Completion, in ~/.bashrc; in ~/.zshrc with zsh_source:
      eval "$(_PGSCRIBE_COMPLETE=bash_source pgscribe)"
      _PGSCRIBE_COMPLETE=fish_source pgscribe | source      # for fish
    """
