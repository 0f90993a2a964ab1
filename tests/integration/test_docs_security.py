"""docs/security.md: what it says of roles is so, and each test that it names is there."""

import re
from pathlib import Path

import psycopg

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
TESTS = Path(__file__).parents[1]
RIGHTS = """
select c.relname, role, array_to_string(array[
         case when has_any_column_privilege(role, c.oid, 'select') then 'select' end,
         case when has_any_column_privilege(role, c.oid, 'insert') then 'insert' end,
         case when has_any_column_privilege(role, c.oid, 'update') then 'update' end,
         case when has_table_privilege(role, c.oid, 'delete') then 'delete' end,
         case when has_table_privilege(role, c.oid, 'truncate') then 'truncate' end], ', ')
  from pg_class c cross join unnest(array['anon', 'authenticated', 'service_role']) role
 where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p', 'v', 'm', 'f')"""
PASSES_ROW_LEVEL_SECURITY = "select rolname from pg_roles where rolbypassrls and rolname = any (%s)"


def test_roles_have_the_rights_of_the_table(conn: psycopg.Connection) -> None:
    table = DOCUMENT.read_text(encoding="utf-8").partition("<!-- rights -->\n")[2]
    told: dict[tuple[str, str], str] = {}
    for line in table.partition("\n\n")[0].splitlines()[2:]:
        name, users, services = (cell.strip() for cell in line.strip("|").split("|"))
        rights = {"anon": "", "authenticated": users, "service_role": services}
        told |= {(name.strip("`"), role): right for role, right in rights.items()}
    assert {(name, role): rights for name, role, rights in conn.execute(RIGHTS.encode())} == told
    passing = conn.execute(PASSES_ROW_LEVEL_SECURITY, (["anon", "authenticated", "service_role"],))
    assert passing.fetchall() == [("service_role",)]


def test_the_tests_that_are_named_are_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT.read_text(encoding="utf-8")))
    assert len(named) > 30
    tests = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    assert named <= set(re.findall(r"def (test_\w+)\(", tests))
