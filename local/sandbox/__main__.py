"""A local stand-in for Paystack: its API, its checkout page and its webhooks, with faults on demand.

For the demo, the tests and the benchmark; paygate itself never imports it. It answers what the published description
says, keeps a ledger, and listens and sends on loopback only. In a shell:

    python -m local.sandbox --secret-key sk_test_x --port 8010 --data DIR --webhook-url http://127.0.0.1:8000/api/v1/webhooks/paystack

or in a test, where every control is a method (seconds are floats, amounts are subunits):

    with Sandbox(secret_key="sk_test_x", webhook_url=url) as sandbox:
        sandbox.fault("initialize", "lost-answer", times=2)
        sandbox.pay(reference)
        assert sandbox.calls("initialize", reference) == 3

Customers
    The part of the e-mail before the @ (up to a +) chooses what happens to that customer's payments:

    decline                  the first card is declined ("Insufficient Funds"), the next one works
    declines                 every card is declined
    underpaid, overpaid      one naira, cedi, rand … less, or more, than asked for is paid
    other-currency           the same number is paid in another currency
    pays-fees                the customer bears the fees: more is paid than asked for
    paid-at-once             paid before initialize has answered
    webhook-first            the same, and the webhook is delivered before initialize answers
    live-domain              answers and events say "live" (with a live key: "test")
    no-requested-amount      answers and events lack requested_amount
    null-fees                the event says "fees": null; verify and lists know them
    wide-id                  the ids of its transactions, refunds and disputes need more than 63 bits
    wide-metadata            metadata comes back with an integer of 23 digits
    metadata-string, metadata-empty, metadata-zero, metadata-null
                             metadata comes back as a JSON string, as "", 0 or null
    lost-webhook, late-webhook, double-webhook, reordered-webhook, forged-webhook
                             what becomes of each of its events
    refund-fails             its refunds end failed
    refund-fails-late        processed, and failed after all
    refund-stuck             stay pending
    refund-needs-attention   wait for the customer's bank details
    FAULT, verify-FAULT, refund-FAULT
                             one of the faults below meets the first initialize, verify or refund of each reference;
                             FAULT-always meets each call

Faults of the API
    lost-request             the connection is closed, nothing has happened
    lost-answer              it has happened, the connection is closed
    slow                     `seconds` (3) go by, then it happens and is answered
    time-out                 it happens, the answer comes after `seconds` (30)
    time-out-before          the connection is closed after `seconds` (30), nothing has happened
    429, 429-retry-after     too many requests, without and with Retry-After (`retry_after`, 1)
    500, 502, 503            an error as JSON, as a gateway's HTML, as nothing at all
    invalid-key              401
    garbage                  200 with bytes that are not JSON
    truncated                the body ends before its Content-Length
    huge                     a body of `size` (64 MiB)
    drip, drip-body          one byte a second (`seconds`), headers and body or the body alone
    redirect                 302 to `url` (another host name of this sandbox; calls("elsewhere") counts who follows)
    status-string            "status": "false"
    status-missing           no "status"
    no-data                  "data": null
    foreign-url, http-url, no-url
                             initialize gives a checkout at another host (`url`), without TLS, none
    other-reference          the answer bears another reference
    not-found                verify and fetch: unknown (for a while, with `times` or `lasts`)
    stale                    verify and lists: as before anyone paid
    empty-list               lists: nothing yet
    lagging-list             lists: without what is younger than `seconds` (3)
    answer                   exactly this `status`, `headers` and `body`

    sandbox.fault(endpoint, name, times=1, lasts=None, probability=1.0, seed=0, prefix="", effect=None, **options):
    `times` None means always, `lasts` ends it after so many seconds, `prefix` limits it to references that begin so,
    `effect` True or False says whether the thing happens although the answer is this one. In an e-mail, FAULT-after is
    the same as effect=True: 500-after@example.com. Endpoints: initialize, verify, list-transactions, fetch-transaction,
    refund, list-refunds, fetch-refund, list-disputes, fetch-dispute, transaction-disputes, session-timeout, or *.

Faults of webhooks
    lost                     never sent
    late                     sent after `seconds` (3)
    double                   sent twice at once
    reordered                sent after the next event, at the latest after `seconds` (3)
    forged                   sent with a wrong signature

    sandbox.fault("webhook", "late", seconds=1)

Controls
    Each method below is also POST /_sandbox/METHOD with its arguments as a JSON object (Content-Type:
    application/json), from this machine and not from a web page; the answer is {"result": …}. The last line's are read
    by GET too. `python -m local.sandbox --help` prints this text.

    pay, decline, charge_elsewhere, alter, backdate      what customers and other shops do to transactions
    reverse                                              a chargeback: reversed, without a refund or an event
    move_refund, dashboard_refund                        what becomes of refunds
    foreign_refund, alter_refund                         another shop's refund; what answers show of a refund
    dispute, remind_dispute, resolve_dispute             one charge may be disputed more than once
    send_event, forge_event, hold_webhooks, release_webhooks
    fault, clear_faults, configure
    transactions, refunds, disputes, deliveries, webhooks_due, calls, faults_met, requests
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys

from local.sandbox import Sandbox, SandboxError


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m local.sandbox",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="a loopback address (127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one")
    parser.add_argument("--secret-key", default=os.environ.get("PAYSTACK_SECRET_KEY"), help="or $PAYSTACK_SECRET_KEY")
    parser.add_argument("--webhook-url", help="where events go, on loopback; without it none are sent")
    parser.add_argument("--public-url", help="the origin of checkout pages, where it is not this address")
    parser.add_argument("--data", metavar="DIR", help="keep the ledger here; without it in memory")
    parser.add_argument("--merchant", default="Example Shop", help="the name on the checkout page")
    parser.add_argument("--latency-seconds", type=float, default=0.0, help="how long each answer of the API takes")
    parser.add_argument("--page-cap", type=int, default=100, metavar="ROWS", help="on a page of a list, at most (100)")
    parser.add_argument("--refund-seconds", type=float, default=2.0, help="how long a refund stays in each state (2)")
    parser.add_argument(
        "--retry-seconds", type=float, nargs="+", metavar="S", help="when unanswered events are sent again"
    )
    options = parser.parse_args()
    if not options.secret_key:
        parser.error("--secret-key is missing")
    try:
        sandbox = Sandbox(
            options.secret_key,
            options.webhook_url,
            options.data,
            host=options.host,
            port=options.port,
            public_url=options.public_url,
            merchant=options.merchant,
            retry_seconds=options.retry_seconds,
            refund_seconds=options.refund_seconds,
        )
        sandbox.configure(latency_seconds=options.latency_seconds, page_cap=options.page_cap)
        asyncio.run(serve_until_told(sandbox))
    except (OSError, SandboxError) as error:
        sys.exit(f"sandbox: {error}")


async def serve_until_told(sandbox: Sandbox) -> None:
    loop, here = asyncio.get_running_loop(), asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, here.cancel if here else sandbox.stop)

    def say() -> None:
        sys.stdout.write(f"sandbox ready on {sandbox.url}\n")
        sys.stdout.flush()

    with contextlib.suppress(asyncio.CancelledError):
        await sandbox.serve(say)


if __name__ == "__main__":
    main()
