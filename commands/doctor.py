"""check the set-up before going live, and find work that waits for you

Checks the configuration, the database, key and mode, the clock, Paystack's session time-out against PAYMENT_TTL_HOURS,
the age of due work, open incidents, and the settings in Paystack's dashboard. Each finding says what to do. The status
is 1 if a finding is BAD.

examples:
  python manage.py doctor
  python manage.py doctor --json
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from urllib.parse import urlsplit

import commands
import db
import paystack
import settings
from commands import Environment, Parser, complain, print_next, provider
from web import story


@dataclass(frozen=True)
class Finding:
    """`ok`, `note` or `BAD`; `todo` is what to do about it."""

    state: str
    about: str
    text: str
    todo: str = ""


OPEN_INCIDENTS = "SELECT * FROM incidents WHERE mode = %(mode)s AND closed_at IS NULL ORDER BY opened_at, id LIMIT 20"


def add_arguments(parser: Parser) -> None:
    commands.add_json(parser)


def run(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    found = []
    for finding in findings(env, url):
        found.append(vars(finding))
        if not arguments.json:
            print(commands.plain(f"{finding.state:4}  {finding.about:15}  {finding.text}"))
            if finding.todo:
                print(commands.pasteable(commands.plain(f"{'':23}→ {finding.todo}")))
    if arguments.json:
        print(json.dumps(found, ensure_ascii=False))
    if bad := sum(each["state"] == "BAD" for each in found):
        return complain(f"findings that are bad: {bad}")
    if not arguments.json:
        print_next("audit")
    return 0


def findings(env: Environment, url: str) -> Iterator[Finding]:
    mode = "live" if env.get("PAYSTACK_SECRET_KEY", "").startswith("sk_live_") else "test"
    try:
        values = settings.load({**env, "DATABASE_URL": url})
        yield from about_configuration(values)
        yield from about_provider(values)
    except settings.Invalid as error:
        yield Finding("BAD", "configuration", str(error), "set it in the environment or in .env")
    try:
        with commands.reading(url) as conn:
            yield from about_database(db.only_row(conn, HEALTH, {"mode": mode}))
            for incident in conn.execute(OPEN_INCIDENTS, {"mode": mode}):
                todo = f"then: resolve --incident {incident['id']} --reason …"
                yield Finding("BAD", f"incident {incident['id']}", story.describe(incident), todo)
    except db.DatabaseUnavailable as error:
        yield Finding("BAD", "database", str(error), "see DATABASE_URL, and whether it runs")


def about_configuration(values: settings.Settings) -> Iterator[Finding]:
    yield Finding("ok", "configuration", f"{values.mode} mode, {', '.join(values.currencies)}, {values.public_url}")
    if values.mode == "test":
        yield Finding("note", "mode", "no real money moves", "set PAYSTACK_SECRET_KEY to sk_live_… to go live")
    if settings.is_loopback(urlsplit(values.public_url).hostname or ""):
        yield Finding("note", "PUBLIC_URL", "only this machine can reach it", "set it to the https address of paygate")
    if values.api_token is None:
        todo = "set it where only your server does; else give out an Idempotency-Key that nobody can guess"
        yield Finding("note", "API_TOKEN", "anyone may start a payment to you, and take a key first", todo)
    if values.mode == "live" and values.merchant_name is None:
        yield Finding("note", "MERCHANT_NAME", "customers pay 'the merchant'", "set it to the name that they know")
    if values.mode == "live" and values.merchant_contact is None:
        yield Finding("note", "MERCHANT_CONTACT", "customers find nobody to ask", "a phone, an e-mail or an https URL")
    if values.public_url.startswith("https://") and not values.trusted_proxies:
        todo = "set it to how many proxies are in front, and let only these reach paygate (docs/deploy.md)"
        yield Finding("note", "TRUSTED_PROXIES", "0, and a proxy speaks https: all share one RATE_LIMIT", todo)
    if values.notify_url is None:
        yield Finding("note", "NOTIFY_URL", "your system is told nothing", "set it, or read GET /api/v1/payments/ID")
    hook = f"{values.public_url}/api/v1/webhooks/paystack"
    yield Finding("note", "dashboard", f"the webhook URL must be {hook}", "Settings, API Keys & Webhooks")


def about_provider(values: settings.Settings) -> Iterator[Finding]:
    try:
        timeout_seconds, clock = provider.gateway_of(values).session_timeout()
    except paystack.Misconfigured:
        yield Finding("BAD", "provider", "Paystack refuses the key", "copy it again from the dashboard")
        return
    except paystack.Unavailable as error:
        yield Finding("BAD", "provider", f"no answer ({error})", "check the network and PAYSTACK_URL, then try again")
        return
    yield Finding("ok", "provider", f"{values.paystack_url} takes the {values.mode} key")
    if clock is not None:
        yield about_clock("Paystack's", clock)
    hours = values.payment_ttl_seconds / 3600
    if not timeout_seconds or timeout_seconds > values.payment_ttl_seconds:
        lasts = f"end after {timeout_seconds / 3600:g} hours" if timeout_seconds else "never end"
        text = f"checkout pages {lasts}, a payment after {hours:g} hours: customers may pay late"
        yield Finding("note", "session", text, f"set the payment session time-out to at most {hours:g} hours")
    else:
        yield Finding("ok", "session", f"checkout pages end after {timeout_seconds / 3600:g} hours")


def about_clock(whose: str, clock: datetime) -> Finding:
    off = (datetime.now(UTC) - clock).total_seconds()
    if abs(off) < 10:
        return Finding("ok", "clock", f"as {whose}")
    return Finding("BAD", "clock", f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} {whose}", "set it by NTP")


def about_database(health: commands.Row) -> Iterator[Finding]:
    if (health["migration"] or 0) < db.NEEDED_MIGRATION:
        yield Finding("BAD", "database", f"its schema is {health['migration']}", "run: python manage.py migrate")
    else:
        yield Finding("ok", "database", f"PostgreSQL {health['version']}, schema {health['migration']}")
    yield about_clock("the database's", health["clock"])
    late = {
        "poll": ("polls", "start the worker: RUN_WORKER=1, or python manage.py worker"),
        "refund": ("polls of refunds", "start the worker: RUN_WORKER=1, or python manage.py worker"),
        "list": ("the daily look at Paystack's lists", "see the log for worker_apply_lists"),
        "event": ("an event that failed", "see the log for event_not_applied"),
        "notification": ("notifications", "see whether NOTIFY_URL answers"),
    }
    for name, (what, todo) in late.items():
        seconds = health[f"{name}_seconds"]
        if seconds is not None and seconds > 300:
            yield Finding("BAD", "work", f"{what} waiting for {seconds / 60:.0f} minutes", todo)
    if health["dead"]:
        text = f"{health['dead']} notifications were given up"
        yield Finding("BAD", "notifications", text, "mend your receiver, then: python manage.py notify --dead")
    if health["backup_days"] is None or health["backup_days"] > 3:
        days = health["backup_days"]
        text = "none was made here" if days is None else f"the last was {days:.0f} days ago"
        yield Finding("note", "backup", text, "once a day: python manage.py backup FOLDER --keep 14 (docs/deploy/)")
    if health["is_deaf"]:
        todo = "set the webhook URL in Paystack's dashboard: payments are found late without it"
        yield Finding("BAD", "webhooks", "none came for the last payments", todo)


HEALTH = """
SELECT current_setting('server_version') AS version, (SELECT max(number) FROM migrations) AS migration,
       clock_timestamp() AS clock,
       (SELECT extract(epoch FROM now() - min(poll_at))::float8 FROM payments
         WHERE mode = %(mode)s AND poll_at <= now()) AS poll_seconds,
       (SELECT extract(epoch FROM now() - min(poll_at))::float8 FROM refunds
         WHERE mode = %(mode)s AND poll_at <= now()) AS refund_seconds,
       (SELECT extract(epoch FROM now() - max(done_at) - interval '2 days')::float8 FROM jobs
         WHERE mode = %(mode)s AND name = 'apply_lists') AS list_seconds,
       (SELECT extract(epoch FROM now() - min(received_at))::float8 FROM provider_events
         WHERE mode = %(mode)s AND retry_at IS NOT NULL) AS event_seconds,
       (SELECT extract(epoch FROM now() - min(due_at))::float8 FROM notifications
         WHERE mode = %(mode)s AND due_at <= now()) AS notification_seconds,
       (SELECT count(*) FROM notifications WHERE mode = %(mode)s AND dead_at IS NOT NULL) AS dead,
       (SELECT extract(epoch FROM now() - max(done_at))::float8 / 86400 FROM jobs WHERE name = 'backup')
        AS backup_days,
       (SELECT count(*) FILTER (WHERE actor = 'webhook') = 0 AND count(*) > 0
          FROM (SELECT actor FROM payment_events WHERE mode = %(mode)s AND why IN ('charge', 'mismatch')
                 ORDER BY id DESC LIMIT 5) AS last_few
       ) AS is_deaf
"""
"""What `doctor` needs to know, in one row: versions, clock, the age of due work, what waits for a person."""
