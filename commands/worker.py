"""look after payments in the background: lost webhooks, late money, refunds, notifications

`runserver` and gunicorn do so themselves unless RUN_WORKER=0. With --once, for a scheduler, it does all due work and
ends. At the end it says what failed, and the status is 1 then.

examples:
  python manage.py worker
  python manage.py worker --once
"""

import argparse
import time
from contextlib import suppress

import commands
import worker
from commands import Environment, Parser, provider
from web import log


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--once", action="store_true", help="do all due work, and end")


def run(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    with provider.open_service(env, url) as service:
        log.configure(service.settings.log_level)
        background = worker.Worker(service.settings, service.database, service.gateway)
        if arguments.once:
            failed = [commands.complain(line) for line in background.run_once()]
            return 1 if failed else 0
        background.start()
        with suppress(KeyboardInterrupt):
            print("looking after payments; Ctrl-C ends it", flush=True)
            while True:  # a wait without an end would sleep through a signal that came a moment before it
                time.sleep(1)
        background.stop()
    return 0
