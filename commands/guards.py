"""Whether the guards of the database are those that schema.sql makes, object by object.

schema.sql makes the expected guards on the same server, in a schema of its own that is rolled back. So the same
PostgreSQL prints both, and nobody who can change the database can change the expected ones.
"""

import secrets
from collections.abc import Iterator

import psycopg
from psycopg import sql

import commands
import db
from commands.migrate import migrations

Guard = tuple[str, str, str]
"""Kind, the table or function that it belongs to, and its own name."""


def broken(conn: db.BoundedConnection) -> Iterator[str]:
    """A line for each guard that is missing, changed or put in, and for each setting that goes round them.

    From here on the connection looks names up in its schema alone, temporary tables last.
    """
    conn.execute(SEARCH_PATH)
    found = _guards(conn)
    try:
        expected = _expected(conn)
    except psycopg.errors.InsufficientPrivilege:
        yield "the guards cannot be compared: this role may not create a schema; audit as the owner of the database"
        return
    owners = {owner for _, owner, _ in expected}
    for guard in sorted(expected.keys() | found.keys()):
        kind, owner, name = guard
        if guard not in found:
            yield f"{kind} {owner}.{name}: a guard of the database is missing"
        elif guard not in expected:
            if owner in owners and kind != "index":
                yield f"{kind} {owner}.{name}: it is none of schema.sql"
        elif found[guard] != expected[guard]:
            yield f"{kind} {owner}.{name}: a guard of the database is switched off or changed"
    ran = {row["number"] for row in conn.execute("SELECT number FROM migrations")}
    for number in sorted(ran ^ {number for number, _ in migrations()}):
        yield f"migration {number}: {'it is none of schema.sql' if number in ran else 'the database says it never ran'}"
    for row in conn.execute(SETTINGS):
        yield f"setting {commands.plain(row['setting'])} of {row['whose']}: it goes round the guards"


def _expected(conn: db.BoundedConnection) -> dict[Guard, str]:
    with conn.transaction(force_rollback=True):
        name = sql.Identifier(f"paygate_expected_{secrets.token_hex(4)}")
        conn.execute(sql.SQL("CREATE SCHEMA {}").format(name))
        conn.execute(sql.SQL("SET LOCAL search_path = {}, pg_temp").format(name))
        for _, block in migrations():
            conn.execute(block.encode())
        return _guards(conn)


def _guards(conn: db.BoundedConnection) -> dict[Guard, str]:
    return {(row["kind"], row["owner"], row["name"]): row["definition"] for row in conn.execute(GUARDS)}


# Every name with its schema: whoever has put operators and functions of his own before PostgreSQL's is seen through.
SEARCH_PATH = r"""
    SELECT pg_catalog.set_config('search_path', pg_catalog.concat(pg_catalog.quote_ident(name), ', pg_temp'), false)
      FROM pg_catalog.unnest(pg_catalog.current_schemas(false)) AS name
     WHERE name OPERATOR(pg_catalog.!~~) 'pg\_%' LIMIT 1
"""

# A function's search_path names its schema, which is another one where it is expected.
GUARDS = """
WITH tables AS (
    SELECT * FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p', 'v', 'm', 'f')
)
SELECT 'table' AS kind, relname::text AS owner, 'itself' AS name,
       concat_ws(' ', relkind, relpersistence, relrowsecurity, relforcerowsecurity) AS definition
  FROM tables
UNION ALL
SELECT 'column', relname, attname, concat_ws(' ', format_type(atttypid, atttypmod), attnotnull, attidentity,
                                             attgenerated, pg_get_expr(adbin, adrelid))
  FROM tables t JOIN pg_attribute a ON attrelid = t.oid AND attnum > 0 AND NOT attisdropped
  LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
UNION ALL
-- NOT NULL is a constraint from 18 on, and with the columns above.
SELECT 'constraint', relname, conname, concat_ws(' ', pg_get_constraintdef(c.oid, true), convalidated)
  FROM tables t JOIN pg_constraint c ON conrelid = t.oid AND contype <> 'n'
UNION ALL
SELECT 'index', relname, indexrelid::regclass::text,
       concat_ws(' ', pg_get_indexdef(indexrelid, 0, true), indisvalid, indisready, indislive)
  FROM tables t JOIN pg_index ON indrelid = t.oid
UNION ALL
SELECT 'trigger', relname, CASE WHEN tgisinternal THEN conname || ' ' || tgfoid::regproc ELSE tgname END,
       concat_ws(' ', tgenabled, tgtype, CASE WHEN NOT tgisinternal THEN pg_get_triggerdef(g.oid, true) END)
  FROM tables t JOIN pg_trigger g ON tgrelid = t.oid LEFT JOIN pg_constraint c ON c.oid = tgconstraint
UNION ALL
SELECT 'rule', relname, rulename, concat_ws(' ', ev_enabled, pg_get_ruledef(r.oid, true))
  FROM tables t JOIN pg_rewrite r ON ev_class = t.oid
UNION ALL
SELECT 'policy', relname, polname, '' FROM tables t JOIN pg_policy ON polrelid = t.oid
UNION ALL
SELECT 'child', relname, inhrelid::regclass::text, '' FROM tables t JOIN pg_inherits ON inhparent = t.oid
UNION ALL
SELECT 'function', proname, pg_get_function_identity_arguments(p.oid),
       concat_ws(' ', format_type(prorettype, NULL), lanname, prokind, provolatile, proisstrict, prosecdef,
                 proleakproof, prosrc, pg_get_function_sqlbody(p.oid),
                 replace(proconfig::text, concat('search_path=', quote_ident(current_schema()), ', '), 'search_path='))
  FROM pg_proc p JOIN pg_language l ON l.oid = prolang WHERE pronamespace = current_schema()::regnamespace
"""

# Those by which triggers do not fire, ours are replaced by other names, or another one is named in the trail.
SETTINGS = """
SELECT setting, concat_ws(', ', CASE WHEN setrole <> 0 THEN 'role ' || pg_get_userbyid(setrole) END,
                          CASE WHEN setdatabase <> 0 THEN 'database ' || current_database() END) AS whose
  FROM pg_db_role_setting CROSS JOIN unnest(setconfig) AS setting
 WHERE setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
   AND (setting ~* '^(session_replication_role|paygate[.])' OR setting ~* '^search_path=.*pg_(catalog|temp)')
UNION ALL
SELECT 'session_replication_role', 'the server' FROM pg_settings
 WHERE name = 'session_replication_role' AND reset_val <> 'origin'
"""
