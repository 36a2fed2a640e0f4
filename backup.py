"""Backups: the whole database in one file, and beside it the checkpoint that proves later what came back."""

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from tqdm import tqdm

import books
import db
import embedded
from books import Refused

TABLES = """
    SELECT count(*) AS count FROM pg_class
     WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p', 'f')
"""


def checkpoint_of(file: Path) -> Path:
    return file.with_name(file.name + ".checkpoint")


def write(url: str, file: Path, checkpoint: str) -> None:
    """Dump the schema in use to `file`, and keep `checkpoint`, which was taken before, beside it. Raises Refused.

    Both hold all there is to know, the customers' data and the secret that ids are made of: nobody else may read them.
    Neither bears its name before it is complete.
    """
    for path in (file, checkpoint_of(file)):
        if path.exists():
            raise Refused(f"{path} is there already: a backup is never overwritten")
    with db.reading(url) as conn:
        schema = books.only(conn, "SELECT current_schema() AS name")["name"]
    with _new(checkpoint_of(file)) as part:
        part.write_text(f"{checkpoint}\n")
    try:
        with _new(file) as part:
            _run(url, "pg_dump", part, "--format=custom", "--no-owner", "--no-acl", f"--schema={_quoted(schema)}")
    except BaseException:
        checkpoint_of(file).unlink()
        raise


def read(url: str, file: Path) -> tuple[int, str]:
    """Restore `file` into the empty database at `url`, and return the checkpoint that was kept beside it. Raises
    Refused.

    What is done once a day is due at once then: it finds what the provider has done since.
    """
    number, _, digest = checkpoint_of(file).read_text().strip().partition(":")
    if not file.is_file() or not re.fullmatch(r"[0-9]+:[0-9a-f]{64}", f"{number}:{digest}"):
        raise Refused(f"{file} and {checkpoint_of(file).name} are not both a backup of ours")
    with db.reading(url) as conn:
        if books.only(conn, TABLES)["count"]:
            raise Refused("the database is not empty: restore into one that has no tables")
    with tempfile.TemporaryDirectory() as folder:
        contents = Path(folder, "contents")
        _run(url, "pg_restore", contents, "--list", str(file), connects=False)
        # The schema is there already, as `public` is in every database.
        lines = [line for line in contents.read_text().splitlines() if not re.search(r" SCHEMA - ", line)]
        contents.write_text("\n".join(lines))
        _run(
            url,
            "pg_restore",
            None,
            *("--single-transaction", "--exit-on-error", "--no-owner", "--no-acl"),
            *(f"--use-list={contents}", str(file)),
        )
    with db.reading(url) as conn:
        if books.only(conn, "SELECT to_regclass('payment_events') AS name")["name"] is None:
            raise Refused("the backup is of another schema: restore it with the search_path that it was made with")
        conn.execute("UPDATE jobs SET due_at = now()")
    return int(number), digest


@contextmanager
def _new(file: Path) -> Iterator[Path]:
    """A file that only we may read, which gets its name once it is on disk."""
    part = file.with_name(file.name + ".part")
    part.unlink(missing_ok=True)
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o600))
    try:
        yield part
        with part.open("rb+") as whole:
            os.fsync(whole.fileno())
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _run(url: str, program: str, output: Path | None, *arguments: str, connects: bool = True) -> None:
    """Run one of PostgreSQL's programs on the database at `url`, with a bar that shows how much it has written.

    The password goes by the environment: what stands on the command line can be read by all users of the machine.
    """
    target = conninfo_to_dict(url)
    password = target.pop("password", None)
    env = {**os.environ, **({"PGPASSWORD": str(password)} if password else {})}
    options = [f"--dbname={make_conninfo('', **target)}"] if connects else []
    options += [f"--file={output}"] if output else []
    with tempfile.TemporaryFile("w+", errors="replace") as complaint:
        command = [_program(program), *options, *arguments]
        with subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stderr=complaint) as process:
            try:
                _wait(process, output)
            except BaseException:
                process.kill()
                raise
        complaint.seek(0)
        if process.returncode:
            lines = complaint.read().strip().splitlines() or [f"status {process.returncode}"]
            raise Refused(f"{program}: {lines[0].removeprefix(f'{program}: ')}")


def _wait(process: subprocess.Popen[bytes], output: Path | None) -> None:
    with tqdm(unit="B", unit_scale=True, disable=None, delay=1, leave=False) as bar:
        while process.poll() is None:
            time.sleep(0.05)
            if output is not None and output.exists():
                bar.update(output.stat().st_size - bar.n)


def _program(name: str) -> str:
    """The wheel's, which is of the newest PostgreSQL; else PATH's. pg_dump refuses a server newer than itself."""
    with suppress(embedded.EmbeddedError):
        return str(embedded.program(name))
    found = shutil.which(name)
    if found is None:
        raise Refused(f"{name} is not installed: it comes with postgresql-client")
    return found


def _quoted(schema: str) -> str:
    """As pg_dump's pattern that means exactly this schema."""
    return sql.Identifier(schema).as_string(None)
