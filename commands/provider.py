"""What the commands that ask Paystack share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import commands
import db
import paystack
import settings
from commands import Environment, Refused


@dataclass(frozen=True)
class Service:
    """What such a command works with."""

    settings: settings.Settings
    database: db.Database
    gateway: paystack.Gateway


@contextmanager
def open_service(env: Environment, url: str) -> Iterator[Service]:
    """Raises Refused, also when the provider gives no answer while it is used."""
    if "PAYSTACK_SECRET_KEY" not in env:
        raise Refused("no PAYSTACK_SECRET_KEY is set and no sandbox runs here: start python manage.py runserver first")
    values = settings.load({**env, "DATABASE_URL": url})
    try:
        with db.Database(url, values.db_pool, notifies=values.notify_url is not None) as database:
            yield Service(values, database, gateway_of(values))
    except paystack.Misconfigured:
        raise Refused("Paystack refuses our key or set-up: see python manage.py doctor") from None
    except paystack.Unavailable as error:
        raise Refused(f"Paystack gave no answer ({error}): try again later") from error


def gateway_of(values: settings.Settings) -> paystack.Gateway:
    keys, timeout_seconds = values.paystack_secret_keys, values.paystack_timeout_seconds
    return paystack.Gateway(keys, values.paystack_url, timeout_seconds, values.mode)


def find(service: Service, url: str, name: str) -> db.Payment:
    with commands.reading(url) as conn:
        payment = commands.named(conn, name)
    if payment.mode != service.gateway.mode:
        raise Refused(f"{payment.id} is a {payment.mode} payment, and the key is a {service.gateway.mode} key")
    return payment
