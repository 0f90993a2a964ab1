"""What the documentation names between its blocks is there: pages, files, settings, commands."""

import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path

import click
import pytest
from modal.cli.entry_point import entrypoint_cli
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Match

from jobs.cli import main
from jobs.errors import PgscribeError
from jobs.scopes import Scope
from jobs.settings import CallSettings, ClientSettings, Settings, TokenSettings
from modal_functions.config import Config
from modal_functions.errors import PreparedAudioGone, TranscriptionError
from modal_functions.transcript import TranscriptionOptions
from tests.command_lines import filled
from tests.doc_blocks import REPO, documents, prose
from tests.unit.test_docs_commands import check_make, check_python
from web.app import create_app

DOCUMENTS = documents()
CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r'\]\(([^)\s]+)\)|<img[^>]* src="([^"]+)"')
HEADING = re.compile(r"^(#{1,6}) +(.+?)\s*$", re.MULTILINE)
VARIABLE = re.compile(r"PGSCRIBE_[A-Z_]*[A-Z]\b(?!_)")
REQUEST = re.compile(r"(GET|HEAD|POST|PUT|PATCH|DELETE) (/\S*)")
FILE = re.compile(r"[\w.-]+(/[\w.-]+)+/?")
# Set in containers on Modal, and by tests.
OTHERS = {"PGSCRIBE_AUDIO_DIR", "PGSCRIBE_COMPLETE", "PGSCRIBE_WEIGHTS_DIR"}
ID = "00000000-0000-4000-8000-000000000001"


def relative(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def inline(path: Path) -> Iterator[str]:
    """Yield the code within a document's text."""
    for found in CODE.finditer(prose(path)):
        yield " ".join(found[1].split())


# Links -------------------------------------------------------------------------------------------


@cache
def anchors(path: Path) -> frozenset[str]:
    """Return what GitHub makes of a document's headings, and the anchors that it sets itself."""
    seen = Counter[str]()
    found = set(re.findall(r'<a (?:id|name)="([^"]+)"', prose(path)))
    for _, title in HEADING.findall(prose(path)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return frozenset(found)


def broken(path: Path, target: str) -> str | None:
    """Say what is wrong with a link, if anything is."""
    if re.match(r"[a-z]+:", target):
        return None
    file, _, anchor = target.partition("#")
    there = (path.parent / file).resolve() if file else path
    if not there.exists():
        return f"{target}: there is no such file"
    if not anchor or there.suffix != ".md":
        return None
    if line := re.fullmatch(r"L(\d+)", anchor):
        lines = len(there.read_text(encoding="utf-8").splitlines())
        return None if int(line[1]) <= lines else f"{target}: the file ends before"
    return None if anchor in anchors(there) else f"{target}: there is no such heading"


def links(path: Path) -> Iterator[str]:
    for found in LINK.finditer(prose(path)):
        yield found[1] or found[2]


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(path: Path) -> None:
    assert [problem for target in links(path) if (problem := broken(path, target))] == []


def test_links_that_lead_nowhere_are_found() -> None:
    readme = REPO / "README.md"
    assert sum(1 for _ in links(readme)) > 30
    assert broken(readme, "docs/states.md") is None
    assert broken(readme, "docs/rest.md#once-and-only-once") is None
    assert broken(readme, "docs/stats.md") is not None
    assert broken(readme, "docs/rest.md#twice") is not None
    assert broken(readme, "CHANGELOG.md#L99999") is not None


# Names -------------------------------------------------------------------------------------------


def known_variables() -> set[str]:
    ours = {
        f"PGSCRIBE_{name.upper()}"
        for settings in (TokenSettings, ClientSettings, CallSettings, Settings)
        for name in settings.model_fields
    }
    modal = {f"PGSCRIBE_MODAL_{field.name.upper()}" for field in fields(Config)}
    compose = (REPO / "docker-compose.yml").read_text(encoding="utf-8")
    return ours | modal | OTHERS | set(VARIABLE.findall(compose))


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_settings_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    known = known_variables()
    assert set(VARIABLE.findall(text)) <= known
    for short in re.findall(r"…(_[A-Z][A-Z_]+)", text):
        assert any(name.endswith(short) for name in known), short


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_files_are_there(path: Path) -> None:
    folders = {entry.name for entry in REPO.iterdir() if entry.is_dir()}
    named = {code for code in inline(path) if FILE.fullmatch(code)}
    ours = {code for code in named if code.split("/")[0] in folders - {".pgscribe", ".venv"}}
    assert [code for code in ours if not (REPO / code).exists()] == []


# Commands ----------------------------------------------------------------------------------------


def check_named(program: click.Command, words: Sequence[str]) -> None:
    """Check that a command, perhaps named without its arguments, is there and has the options."""
    left = [*words]
    while isinstance(program, click.Group) and left and not left[0].startswith("-"):
        found = program.get_command(click.Context(program), left[0])
        assert found is not None, f"{words}: there is no command {left[0]}"
        program, left = found, left[1:]
    known = {"-h", "--help"}
    for parameter in program.params:
        known |= {*parameter.opts, *parameter.secondary_opts}
    options = {word.partition("=")[0] for word in left if word.startswith("-")}
    assert options <= known, f"{words}: no such option: {options - known}"


def named(code: str) -> list[str]:
    """Return the words of a command that text speaks of."""
    words = shlex.split(re.sub(r"\[.*?\]", "", filled(code)))
    return [word for word in words if word != "…"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_commands_are_there(path: Path) -> None:
    for code in inline(path):
        match named(code) if re.match(r"(pgscribe|modal|make|python) ", code) else []:
            case ["pgscribe", command, *rest] if not command.endswith(":"):  # no error message
                check_named(main, [command, *rest])
            case ["modal", *words]:
                check_named(entrypoint_cli, words)
            case ["make", *words]:
                check_make(words)
            case ["python", "-m", *words]:
                check_python(["-m", *words])


@pytest.mark.parametrize(
    "code", ["pgscribe wrker", "pgscribe keys mak", "pgscribe deploy --chek", "pgscribe keys --x"]
)
def test_commands_that_are_not_there_are_found(code: str) -> None:
    with pytest.raises(AssertionError, match=r"no such option|no command"):
        check_named(main, named(code)[1:])


# Requests ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def app() -> Starlette:
    settings = Settings(database_url="postgresql://nowhere", jwt_secret="s" * 32, _env_file=None)  # type: ignore[arg-type, call-arg]
    return create_app(settings)


def routed(routes: Sequence[BaseRoute], method: str, path: str) -> bool:
    scope = {"type": "http", "method": method, "path": path, "headers": [], "root_path": ""}
    return any(route.matches(scope)[0] is Match.FULL for route in routes)


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_requests_have_a_route(path: Path, app: Starlette) -> None:
    for code in inline(path):
        if asked := REQUEST.fullmatch(code):
            where = re.sub(r"\{\w+\}", ID, asked[2].partition("?")[0])
            assert routed(app.routes, asked[1], where), code


def test_requests_without_a_route_are_found(app: Starlette) -> None:
    assert routed(app.routes, "GET", f"/jobs/{ID}")
    assert not routed(app.routes, "GET", f"/job/{ID}")
    assert not routed(app.routes, "PUT", f"/jobs/{ID}")


# Lists ------------------------------------------------------------------------------


def test_error_codes_are_there() -> None:
    """Each code of a failed job is one that something gives, and is tried again as it says."""
    listed = table("| `error_code` | what happened |")
    sources = [*REPO.glob("jobs/**/*.py"), *REPO.glob("modal_functions/*.py"),
               *REPO.glob("db/migrations/*.sql")]  # fmt: skip
    given = {
        code
        for source in sources
        for code in re.findall(r"""["']([a-z]+(?:_[a-z]+)*)["']""", source.read_text("utf-8"))
    }
    assert len(listed) > 20
    assert set(listed) <= given
    of_recordings = {error.code for error in TranscriptionError.__subclasses__()}
    assert of_recordings - {PreparedAudioGone.code} <= set(listed), "that is prepared again"
    errors = [(error.code, error.retryable) for error in every_error(PgscribeError)]
    errors += [(error.code, error.retryable) for error in TranscriptionError.__subclasses__()]
    for code, retryable in errors:
        _, again, *_ = listed.get(code, ["", "if that may pass"])
        assert again in {"yes" if retryable else "no", "if that may pass"}, code


def behind(words: str) -> str:
    """Return what the only document with these words has behind them."""
    (text,) = (found for path in DOCUMENTS if words in (found := path.read_text(encoding="utf-8")))
    return text.partition(words)[2]


def table(heading: str) -> dict[str, list[str]]:
    """Return the rows of the table that begins so: what is in the first column, and the others."""
    rows = behind(f"\n{heading}").partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("|"))] for row in rows]
    assert cells, heading
    return {first.strip("`"): rest for first, *rest in cells}


def test_the_options_are_all_there_are() -> None:
    options = {field.name for field in fields(TranscriptionOptions)}
    assert set(table("| option | values |")) == options
    told = behind("\n| `options` | `model`, ").partition(" |")[0].partition(":")[0]
    assert {"model", *CODE.findall(told)} == options


def test_the_scopes_are_all_there_are() -> None:
    told = behind("\nScopes: ").partition(". ")[0]
    assert CODE.findall(told) == [scope.value for scope in Scope]


def test_what_is_deployed_has_the_defaults_that_are_documented() -> None:
    told = table("| variable | default | allowed |")
    known = {f"PGSCRIBE_MODAL_{field.name.upper()}": str(field.default) for field in fields(Config)}
    assert {name: default.strip("` ") for name, (default, *_) in told.items()} == known


def test_error_codes_of_requests_are_there() -> None:
    text = (REPO / "docs" / "rest.md").read_text(encoding="utf-8")
    codes = {
        code
        for row in re.findall(r"(?m)^\| \d{3} \| ([^|]+) \|", text)
        for code in CODE.findall(row)
    }
    known = {error.code for error in every_error(PgscribeError)}
    assert len(codes) > 25
    assert codes <= known, codes - known


def every_error(root: type[PgscribeError]) -> Iterator[type[PgscribeError]]:
    yield root
    for error in root.__subclasses__():
        yield from every_error(error)
