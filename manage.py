"""paygate's command line.

On this machine:
  python manage.py runserver               run all of it, with a database and a stand-in for Paystack
  python manage.py migrate                 bring the schema of DATABASE_URL to this version
  python manage.py test                    run the tests

From day to day:
  python manage.py doctor                  find what is wrong, and what to do about it
  python manage.py list --status review    list payments that wait for a decision
  python manage.py show PAY-…              tell the whole story of one payment
  python manage.py refund PAY-…            give money back

At the end of the month:
  python manage.py reconcile               compare our books with Paystack's lists
  python manage.py report --format html    add up gross, fees, refunds, net
  python manage.py audit                   prove that the books are whole

Without DATABASE_URL a command uses the embedded database and the sandbox of a running `runserver`. The exit status is 0
for success, 1 if paygate refused it or found something wrong, 2 for wrong usage. More about each command:
python manage.py COMMAND --help
"""

import difflib
import importlib
import importlib.util
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import commands
    import db
    import settings
except ModuleNotFoundError as missing:
    sys.exit(f"manage.py: {missing.name} is not installed: pip install -r requirements.txt, or call .venv/bin/python")

FOLDER = Path(__file__).resolve().parent
LOCAL = ("runserver", "test") if importlib.util.find_spec("local") else ()
"""The commands of one's own machine; the image goes without the folder `local`."""
COMMANDS = (
    *LOCAL,
    *("migrate", "worker", "doctor", "list", "show", "link", "refund", "sync", "resolve", "notify", "reconcile"),
    *("audit", "report", "erase", "backup", "restore"),
)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = commands.Parser(prog="manage.py", description=__doc__)
    parser.add_argument("--version", action="version", version=f"paygate {settings.VERSION}")
    to = parser.add_subparsers(metavar="COMMAND", title="commands", required=True)
    refuse_unknown(words[:1])
    for name in words[:1] if words[:1] and words[0] in COMMANDS else COMMANDS:
        add_command(to, name)
    arguments, rest = parser.parse_known_args(words)
    if rest and words[0] != "test":
        to.choices[words[0]].error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no reason to stop
    try:
        if words[0] in LOCAL:
            return int(arguments.run(arguments))
        # What a command has to say it prints: only `worker` logs, and sets this up anew.
        logging.getLogger().addHandler(logging.NullHandler())
        with database() as (env, url):
            commands.place(arguments, settings.zone(env))
            status = int(arguments.run(arguments, env, url))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as interruption:
        return commands.complain(f"interrupted{': ' if interruption.args else ''}{interruption}", 130)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return commands.complain(f"{error.filename or 'the system'}: {error.strerror or error}")
    except db.DatabaseUnavailable as error:
        return commands.complain(f"the database cannot be used (see DATABASE_URL): {error}")
    except (settings.Invalid, db.Impossible, commands.Refused) as error:
        return commands.complain(str(error))


def refuse_unknown(words: list[str]) -> None:
    for word in words:
        if word not in COMMANDS and not word.startswith("-"):
            nearest = difflib.get_close_matches(word, COMMANDS, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(COMMANDS)}"
            sys.exit(commands.complain(f"there is no command {word}: {hint}", 2))


def add_command(to: Any, name: str) -> None:
    """Import the one command that was called: a list does not wait for what a refund needs."""
    module = importlib.import_module(f"{'local' if name in LOCAL else 'commands'}.{name}")
    page = (module.__doc__ or "").strip()
    parser = to.add_parser(name, help=page.partition("\n")[0], description=page)
    parser.set_defaults(run=module.run)
    if hasattr(module, "add_arguments"):
        module.add_arguments(parser)


@contextmanager
def database() -> Iterator[tuple[dict[str, str], str]]:
    """The environment and the database's URL; on a machine of one's own, the embedded one's where none is set."""
    if not LOCAL:
        env = settings.environment(FOLDER / ".env")
        yield env, settings.database_url(env)
        return
    machine = importlib.import_module("local.machine")
    env = machine.environment()
    with machine.database(env) as (url, _):
        yield env, url


if __name__ == "__main__":
    sys.exit(main())
