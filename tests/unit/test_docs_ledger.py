"""No command or snippet of the documentation is without a test that runs or checks it."""

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.doc_blocks import REPO, Block, every, parse

TESTS = REPO / "tests"
TAKES = {"runs": "run", "checks": "check"}
DRAWN = ("", "text")
# A line that begins so is to be typed: such a block has to have a language, and a test.
PROGRAMS = (
    "$ ", "curl ", "docker ", "export ", "git ", "make ", "modal ", "npm ", "pip ", "pgscribe ",
    "psql ", "python ", "supabase ", "select ", "insert ", "update ", "delete ", "import ",
    "const ",
)  # fmt: skip

Kind = tuple[str, str]


def taken(modules: Iterable[Path]) -> Iterator[tuple[Kind, str]]:
    """Yield the kinds that modules take at their top level, and which module it was."""
    for path in modules:
        text = path.read_text(encoding="utf-8")
        if not any(f"{take}(" in text for take in TAKES):
            continue
        tree = ast.parse(text)
        for statement in tree.body:
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            for node in ast.walk(statement):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id in TAKES
                    and len(node.args) == 1
                    and isinstance(node.args[0], ast.Constant)
                ):
                    yield (TAKES[node.func.id], str(node.args[0].value)), path.name


def problems(blocks: Iterable[Block], takers: Iterable[tuple[Kind, str]]) -> list[str]:
    """Return what is wrong, a line for each."""
    claims = dict[Kind, str]()
    found = []
    for kind, module in takers:
        if claims.setdefault(kind, module) != module:
            found.append(f"{' '.join(kind)}: taken by {claims[kind]} and by {module}")
    there = set[Kind]()
    for block in blocks:
        kind = (block.verb, block.kind)
        if block.verb:
            there.add(kind)
            if kind not in claims:
                found.append(f"{block.name}: no test takes `{block.verb}: {block.kind}`")
        elif block.language not in DRAWN:
            found.append(f"{block.name}: no comment says how this {block.language} is run")
        elif typed := [line for line in block.code.splitlines() if line.startswith(PROGRAMS)]:
            found.append(f"{block.name}: not output, but to be typed: {typed[0]}")
    found += [
        f"{claims[kind]}: takes `{kind[0]}: {kind[1]}`, which no document has"
        for kind in claims.keys() - there
    ]
    return found


def modules() -> list[Path]:
    return sorted(TESTS.rglob("test_*.py"))


def test_each_block_is_run_or_checked_by_a_test() -> None:
    blocks = every()
    assert problems(blocks, taken(modules())) == []
    # The extraction finds them: else nothing would be in the ledger.
    verbs = Counter(block.verb for block in blocks)
    assert verbs["run"] >= 110, verbs
    assert verbs["run"] > 2 * verbs["check"], "most are run"
    assert {"README.md", "docs/rest.md", "docs/decisions/0003-calls.md"} <= {
        block.document for block in blocks
    }


def test_contributors_are_told_of_each_kind() -> None:
    text = (REPO / "docs" / "contributing.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`(?:(?:run|check): )?([a-z]+)(?:[ =][^`]*)?`", text))
    assert {kind for (_, kind), _ in taken(modules())} <= told


DOCUMENT = """
<!-- run: role=postgres rows=1 -->
```sql
select 1;
```

```sh
make new
```

1. In a list:

   <!-- check: shell -->
   ```sh
   git status
   ```

```
 a ──▶ b
```
"""
TAKERS = [(("run", "role"), "test_sql.py"), (("check", "shell"), "test_shell.py")]


@pytest.mark.parametrize(
    ("text", "takers", "problem"),
    [
        (DOCUMENT.replace("```sh\nmake new\n```\n\n1", "1"), TAKERS, None),
        (DOCUMENT, TAKERS, "new.md:7: no comment says how this sh is run"),
        (
            "<!-- run: rolle=x -->\n```sql\nselect 1\n```",
            [],
            "new.md:2: no test takes `run: rolle`",
        ),
        ("<!-- check: role=x -->\n```sql\nselect 1\n```", TAKERS, "no test takes `check: role`"),
        ("```\nmake new\n```", [], "new.md:1: not output, but to be typed: make new"),
        ("Nothing.", TAKERS[:1], "test_sql.py: takes `run: role`, which no document has"),
        (
            DOCUMENT,
            [*TAKERS, (("run", "role"), "test_other.py")],
            "run role: taken by test_sql.py and by test_other.py",
        ),
    ],
)
def test_what_is_amiss_is_found(
    text: str, takers: list[tuple[Kind, str]], problem: str | None
) -> None:
    found = problems(parse("new.md", text), takers)
    assert found == [] if problem is None else any(problem in line for line in found), found


@pytest.mark.parametrize(
    "text",
    ["<!-- run: cli -->\n\n```bash\npgscribe jobs\n```", "<!-- run: cli -->\nText.", "```\nopen"],
)
def test_comments_and_fences_that_belong_to_nothing_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"new\.md: a (comment has no block|fence is not closed)"):
        [*parse("new.md", text)]


def test_a_module_takes_what_it_takes_at_its_top_level(tmp_path: Path) -> None:
    module = tmp_path / "test_module.py"
    module.write_text('BLOCKS = [*runs("a"), *checks("b")]\ndef late() -> None:\n    runs("c")\n')
    assert [*taken([module])] == [
        (("run", "a"), "test_module.py"),
        (("check", "b"), "test_module.py"),
    ]
