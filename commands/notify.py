"""send a notification again, or a test

For a payment, the worker sends its last notification again, whether or not that was delivered. With --dead it sends all
that were given up after three days. Each keeps its webhook-id. A test is sent from here, at once, and its answer is
printed.

examples:
  python manage.py notify --test
  python manage.py notify PAY-0123456789ABCDEFGHJKMNPQRS
  python manage.py notify --dead
"""

import argparse
import uuid

from commands import Environment, Parser, Refused, complain, print_next, provider
from web import outbox


def add_arguments(parser: Parser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("name", nargs="?", metavar="ID|REFERENCE")
    what.add_argument("--dead", action="store_true", help="send all that were given up")
    what.add_argument("--test", action="store_true", help="send an empty one, now")


def run(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    with provider.open_service(env, url) as service:
        if service.settings.notify_url is None:
            raise Refused("no NOTIFY_URL is set: nobody is told of anything")
        if arguments.test:
            return notify_test(service.settings.notify_url, service.settings.notify_secrets)
        payment = None if arguments.dead else provider.find(service, url, arguments.name)
        count = service.database.transaction(outbox.send_again, service.gateway.mode, payment.id if payment else None)
    if payment is not None and count == 0:
        raise Refused(f"nobody was told of {payment.id} yet, or it was pruned after RETENTION_DAYS")
    print(f"{count} to be sent again" if count else "none was given up")
    print_next(f"show {payment.id}" if payment else "doctor")
    return 0


def notify_test(url: str, secrets: tuple[bytes, ...]) -> int:
    outcome, _ = outbox.Notifier(url, secrets).send(str(uuid.uuid4()), outbox.body_of_test())
    if not outcome.startswith("2"):
        return complain(f"the receiver at NOTIFY_URL did not take it: {outcome}")
    print(f"the receiver at NOTIFY_URL took it: {outcome}")
    print_next("doctor")
    return 0
