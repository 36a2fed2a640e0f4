"""After quiet: what must be true, checked from outside, by HTTP, in the provider's ledger and in the database."""

import base64
import hmac
import random
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from local.receiver import Received
from local.serving import ROOT, children_of
from proofs.torture.people import RANKS, Findings, KeyedRefund, People, Sale
from proofs.torture.stage import NOTIFY_SECRET, OK, THREADS, Json, Stage

FREE_AGAIN = ("refused", "failed", "not_made")
OPEN_REFUNDS = ("unanswered", "pending", "processing", "needs-attention")
COMES_TO_REST_SECONDS = 300


# Coming to rest


def come_to_rest(stage: Stage, people: People, findings: Findings) -> float:
    """Every client comes back for its answer, and time passes until nothing is due any more; how long that took."""
    begun = time.monotonic()
    people.later.sort()
    dice = random.Random(people.seed)
    unanswered = [sale for sale in people.sales if not sale.is_answered]
    people.stopping.clear()
    with ThreadPoolExecutor(8) as threads:
        try:
            list(threads.map(lambda sale: people.create(sale, dice, 60), unanswered))
            list(threads.map(lambda refund: people.ask_refund(refund, dice, 60), people.keyed))
        finally:
            people.stopping.set()
    for sale in unanswered:
        if not sale.is_answered:
            findings.add("stuck", f"{sale.key} gets no answer any more")
    for dispute in stage.control("disputes"):  # the event of its opening may be lost; the provider reminds of it
        stage.control("remind_dispute", dispute=dispute["id"])
    deadline = time.monotonic() + COMES_TO_REST_SECONDS
    while time.monotonic() < deadline:
        let_time_pass(stage.sql)
        run_worker_once(stage)
        if not any(what_is_due(stage).values()) and not stage.control("webhooks_due"):
            break
        time.sleep(0.5)
    for refund in people.keyed:  # what was answered 202 has been looked for
        if not refund.is_answered:
            people.ask_refund(refund, dice, 1)
    return time.monotonic() - begun


def let_time_pass(sql: Callable[[str], object]) -> None:
    """Whatever is due some day is due now, and what was sent and never answered was sent an hour ago.

    No audit row is written, so nothing may change that the last one proves: `audit` would rightly find it.
    """
    sql("UPDATE payments SET poll_at = now(), expires_at = least(expires_at, now()) WHERE poll_at > now()")
    sql("UPDATE notifications SET due_at = now() WHERE due_at > now()")
    sql("UPDATE provider_events SET retry_at = now() WHERE retry_at > now()")
    sql("UPDATE jobs SET due_at = now() WHERE due_at > now()")
    sql(
        """
        DO $$ BEGIN
            SET LOCAL session_replication_role = replica;
            UPDATE refunds SET poll_at = now(),
                               sent_at = least(sent_at, now() - interval '1 hour'),
                               send_ended_at = least(send_ended_at, now() - interval '1 hour')
             WHERE poll_at > now();
            UPDATE payments SET refunds_awaited_since = now() - interval '1 hour', poll_at = now()
             WHERE refunds_awaited_since IS NOT NULL;
        END $$
        """
    )


def run_worker_once(stage: Stage) -> None:
    """All that a year would bring, and so without the worker's pace: the sandbox may be flooded."""
    program = "import worker; worker.POLLS_PER_SECOND = 10_000; import manage; manage.main(['worker', '--once'])"
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=stage.folder,
        env={**stage.command_env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=600,
        check=False,
    )


def what_is_due(stage: Stage) -> Json:
    """How much is not at its end; nothing when all is at rest. A refund that the provider never ends is none of it."""
    return stage.sql(
        """
        SELECT (SELECT count(*) FROM payments WHERE status = 'pending') AS pending,
               (SELECT count(*) FROM payments WHERE refunds_awaited_since IS NOT NULL) AS awaiting,
               (SELECT count(*) FROM refunds WHERE status IN ('unanswered', 'processing')) AS refunds,
               (SELECT count(*) FROM notifications WHERE delivered_at IS NULL AND dead_at IS NULL) AS notifications,
               (SELECT count(*) FROM provider_events WHERE outcome = 'received') AS events
        """
    )[0]


# The truth


class Truth:
    """What the provider knows and what paygate knows, each as rows by what names them."""

    def __init__(self, stage: Stage) -> None:
        self.transactions = {row["reference"]: row for row in stage.control("transactions")}
        self.provider_refunds: list[Json] = stage.control("refunds")
        self.payments = {row["id"]: row for row in stage.sql("SELECT * FROM payments")}
        self.by_reference = {row["reference"]: row for row in self.payments.values()}
        self.charges = {row["reference"]: row for row in stage.sql("SELECT * FROM charges")}
        self.refunds = stage.sql("SELECT * FROM refunds")
        self.disputes: list[Json] = stage.control("disputes")
        incidents = stage.sql("SELECT kind, subject, cause FROM incidents")
        self.incidents = {(row["kind"], row["subject"]) for row in incidents}
        self.disputes_told = {(row["subject"], row["cause"]) for row in incidents if row["kind"] == "dispute"}
        self.keys = {row["payment_id"]: row for row in stage.sql("SELECT * FROM idempotency_keys")}
        self.notifications = stage.sql("SELECT * FROM notifications ORDER BY payment_id, sequence")
        self.events = stage.sql("SELECT * FROM payment_events ORDER BY payment_id, n")


def judge(stage: Stage, people: People, findings: Findings) -> None:
    truth = Truth(stage)
    for sale in people.sales:
        for kind, what in judge_sale(sale, truth):
            findings.add(kind, what)
    ids = {row["id"] for row in truth.refunds}
    for told in people.refunds:
        if told["id"] not in ids:
            findings.add("lost", f"refund {told['id']}, told of, is not in the database")
    for refund in truth.provider_refunds:
        if refund["merchant_note"] in people.given_up:
            findings.add(
                "doubled", f"refund {refund['merchant_note']} was given up, and its command sent it after that"
            )
    for keyed in people.keyed:
        for kind, what in judge_keyed_refund(keyed, truth):
            findings.add(kind, what)
    for check in (judge_money, judge_cancels, judge_banks, judge_refunds, judge_trails, judge_notifications):
        for kind, what in check(truth, stage):
            findings.add(kind, what)
    for name, count in what_is_due(stage).items():
        if count:
            findings.add("stuck", f"{count} {name} after {COMES_TO_REST_SECONDS} s of quiet")
    for line in run_command(stage, "audit")[-20:]:
        findings.add("broken", f"audit: {line}")
    for line in unexpected_differences(run_command(stage, "reconcile"), charged_back(truth))[-20:]:
        findings.add("broken", f"reconcile: {line}")
    for process in (*stage.instances, stage.sandbox):
        for line in unexpected_lines(process.log):
            findings.add("wrong", f"log of {process.folder.name}: {line}")


Found = Iterator[tuple[str, str]]


def judge_sale(sale: Sale, truth: Truth) -> Found:
    if len(sale.ids) > 1 or len(sale.urls) > 1:
        yield "doubled", f"{sale.key} was given {sale.ids} and {sale.urls}"
    if len(sale.told) > 1:
        yield "doubled", f"{sale.key} was answered in {len(sale.told)} ways: {sale.told}"
    if sale.id is None:
        return
    payment = truth.payments.get(sale.id)
    if payment is None:
        yield "lost", f"{sale.id}, acknowledged for {sale.key}, is not in the database"
        return
    if f"{payment['amount_minor'] / 100:.2f}" != sale.order["amount"]:
        yield "wrong", f"{sale.id} is of {payment['amount_minor']}, asked for {sale.order['amount']}"
    if RANKS[payment["status"]] < sale.rank:
        yield "lost", f"{sale.id} is {payment['status']}, and somebody has seen {sale.status}"
    if sale.cancel_status == 200 and payment["cancelled_at"] is None:
        yield "lost", f"{sale.id} was told to be cancelled, and is not"
    if sale.cancel_status == 422 and payment["charge_reference"] is None:
        yield "wrong", f"{sale.id} could not be cancelled, and no money had come"
    if sale.urls and payment["checkout_url"] not in sale.urls:
        yield "doubled", f"{sale.id} gave out {sale.urls} and has {payment['checkout_url']}"


def judge_money(truth: Truth, _: Stage) -> Found:
    """Every success at the provider is a charge here, of the same amount; and no charge here is unknown there."""
    for reference, transaction in truth.transactions.items():
        payment = truth.by_reference.get(reference[:29])
        if transaction["status"] != "success" and not transaction["status"].startswith("revers"):
            continue
        if payment is None:
            if reference.startswith("PG-"):
                yield "lost", f"{reference} is paid at the provider, and no payment bears it"
            continue
        charge = truth.charges.get(reference)
        if charge is None:
            yield "lost", f"{reference} of {payment['id']} ({payment['status']}) is paid at the provider"
        elif (charge["amount_minor"], charge["currency"]) != (transaction["paid"], transaction["currency"]):
            yield "wrong", f"{reference}: {charge['amount_minor']} here, {transaction['paid']} at the provider"
        elif charge["fees_minor"] != transaction["fees"]:
            yield "wrong", f"{reference}: fees {charge['fees_minor']} here, {transaction['fees']} at the provider"
        is_second = charge is not None and payment["charge_reference"] != reference
        if is_second and ("second_charge", reference) not in truth.incidents:
            yield "lost", f"{reference} is a second charge, and no incident says so"
    for reference in truth.charges:
        transaction = truth.transactions.get(reference, {"status": "unknown"})
        if transaction["status"] != "success" and not transaction["status"].startswith("revers"):
            yield "wrong", f"{reference} counts as paid, and is {transaction['status']} at the provider"
    refunded: Counter[str] = Counter()
    for refund in truth.provider_refunds:
        if refund["status"] == "processed":
            refunded[refund["reference"]] += refund["amount"]
    for payment in truth.payments.values():
        charge = truth.charges.get(payment["charge_reference"] or "")
        allowed = states_of(payment, charge, refunded[payment["charge_reference"]])
        if payment["status"] not in allowed:
            yield "wrong", f"{payment['id']} is {payment['status']}, not {' or '.join(allowed)}"
        if payment["refunded_minor"] != refunded[payment["charge_reference"]]:
            there = refunded[payment["charge_reference"]]
            yield "wrong", f"{payment['id']}: {payment['refunded_minor']} given back here, {there} at the provider"


def judge_cancels(truth: Truth, _: Stage) -> Found:
    """An order that was given up ended with that. Money that came for it all the same is put before a person."""
    for payment in truth.payments.values():
        reference, cancelled_at = payment["charge_reference"], payment["cancelled_at"]
        if cancelled_at is None:
            continue
        if reference and ("paid_after_cancel", reference) not in truth.incidents:
            yield "lost", f"{payment['id']} was cancelled and paid, and no incident says so"
        if payment["status"] == "pending" or payment["expires_at"] > cancelled_at:
            yield "stuck", f"{payment['id']} was cancelled, and went on until {payment['expires_at']}"


def judge_keyed_refund(refund: KeyedRefund, truth: Truth) -> Found:
    """One key is one refund, here and at the provider; and what was answered 201 is with the provider."""
    rows = {row["id"]: row for row in truth.refunds if row["reason"] == refund.key}
    made = [row for row in truth.provider_refunds if row["merchant_note"] in rows]
    if len(rows) > 1 or len(made) > 1:
        yield "doubled", f"{refund.key} is {len(rows)} refunds here, {len(made)} at the provider"
    if not refund.ids <= rows.keys():
        yield "lost", f"{refund.key} was told of {refund.ids}, and is {set(rows)}"
    if 201 in refund.statuses and not made:
        yield "lost", f"{refund.key} was answered 201, and the provider knows nothing of it"
    if any(refund.amount and f"{row['amount_minor'] / 100:.2f}" != refund.amount for row in rows.values()):
        yield "wrong", f"{refund.key} asked for {refund.amount}: {rows}"
    if not refund.is_answered:
        yield "stuck", f"{refund.key} is neither made nor refused"


def judge_banks(truth: Truth, _: Stage) -> Found:
    """What the customers' banks did is put before a person: each dispute, and each chargeback of a payment's own."""
    for dispute in truth.disputes:
        is_heard = not truth.transactions[dispute["reference"]]["email"].startswith("lost-webhook")
        if is_heard and (dispute["reference"], str(dispute["id"])) not in truth.disputes_told:
            yield "lost", f"dispute {dispute['id']} of {dispute['reference']} opened no incident"
    # A refund that failed in the end may have added up to the charge while it was imported.
    for reference in charged_back(truth, free=()):
        is_own = truth.by_reference[reference[:29]]["charge_reference"] == reference
        if is_own and ("chargeback", reference) not in truth.incidents:
            yield "lost", f"{reference} went back to its bank, and no incident says so"


def charged_back(truth: Truth, free: tuple[str, ...] = FREE_AGAIN) -> set[str]:
    """The charges that a bank has taken back, and whose refunds, but for the `free` ones, do not add up to them."""
    refunded: Counter[str] = Counter()
    for refund in truth.refunds:
        refunded[refund["charge_reference"]] += refund["amount_minor"] if refund["status"] not in free else 0
    taken = {reference for reference, row in truth.transactions.items() if row["is_charged_back"]}
    return {each for each in taken & truth.charges.keys() if refunded[each] < truth.charges[each]["amount_minor"]}


def unexpected_differences(lines: list[str], charged_back: set[str]) -> list[str]:
    """What `reconcile` must not say, and what it must and does not: what went back to a bank is a difference."""
    told = {line: found[1] for line in lines if (found := REVERSED.search(line)) and found[1] in charged_back}
    missing = charged_back - set(told.values())
    rest = [line for line in lines if line not in told]
    is_all = bool(told) and all(line.startswith("next: ") or line.endswith(f": {len(told):,}") for line in rest)
    return [*(f"nothing about {each}, which went back to its bank" for each in missing), *([] if is_all else rest)]


REVERSED = re.compile(r"(PG-\S+): reversed there, more than its refunds")


def states_of(payment: Json, charge: Json | None, refunded: int) -> tuple[str, ...]:
    """The states that a payment may be in once all is at rest."""
    if charge is None:
        return "failed", "expired"
    asked = payment["amount_minor"] if charge["requested_minor"] is None else charge["requested_minor"]
    pays = (asked, charge["currency"]) == (payment["amount_minor"], payment["currency"])
    pays = payment["accepted_by"] is not None or (pays and charge["amount_minor"] >= payment["amount_minor"])
    if not pays:
        return ("refunded",) if refunded >= charge["amount_minor"] else ("review", "refunded")
    if refunded >= min(payment["amount_minor"], charge["amount_minor"]):
        return ("refunded",)
    # A refund that failed after all lowers the sum, never the status.
    return ("partially_refunded", "refunded") if refunded else ("completed", "partially_refunded", "refunded")


def judge_refunds(truth: Truth, _: Stage) -> Found:
    there: dict[int, Json] = {row["id"]: row for row in truth.provider_refunds}
    notes = Counter(row["merchant_note"] for row in truth.provider_refunds)
    known = {row["provider_id"]: row for row in truth.refunds}
    spent: Counter[str] = Counter()
    for row in truth.provider_refunds:
        if row["id"] not in known:
            yield "lost", f"refund {row['id']} of {row['reference']} at the provider is not recorded"
        if row["status"] != "failed" and row["refunded_by"].startswith("api"):
            spent[row["reference"]] += row["amount"]
    for refund in truth.refunds:
        if notes[refund["id"]] > 1:
            yield "doubled", f"refund {refund['id']} was made {notes[refund['id']]} times"
        if refund["status"] in ("refused", "not_made"):
            if notes[refund["id"]]:
                yield "wrong", f"refund {refund['id']} is {refund['status']} here, and made at the provider"
        elif refund["status"] == "unanswered":
            yield "stuck", f"refund {refund['id']} is still unanswered"
        elif there[refund["provider_id"]]["status"] != refund["status"]:
            word = there[refund["provider_id"]]["status"]
            yield "wrong", f"refund {refund['id']} is {refund['status']} here, {word} at the provider"
        if refund["status"] in OPEN_REFUNDS and refund["poll_at"] is None:
            yield "stuck", f"refund {refund['id']} is {refund['status']}, and nobody looks at it"
    for reference, amount in spent.items():
        if reference in truth.charges and amount > truth.charges[reference]["amount_minor"]:
            yield "doubled", f"{amount} of {reference} given back, {truth.charges[reference]['amount_minor']} paid"


def judge_trails(truth: Truth, _: Stage) -> Found:
    """The trail's last row says what the payment's own row says. `audit` recomputes the chains."""
    last = {event["payment_id"]: event for event in truth.events}
    for payment_id, payment in truth.payments.items():
        event = last.get(payment_id)
        names = ("amount_minor", "currency", "charged_minor", "refunded_minor")
        if event is None or event["to_status"] != payment["status"] or any(event[n] != payment[n] for n in names):
            yield "broken", f"the trail of {payment_id} does not end where the payment stands"
        key = truth.keys.get(payment_id)
        if key is None:
            yield "broken", f"{payment_id} has no key"
        elif key["answer"] == "payment" and not (payment["checkout_url"] or payment["charge_reference"]):
            yield "broken", f"{payment_id} was answered with neither a checkout page nor money"


def judge_notifications(truth: Truth, stage: Stage) -> Found:
    """One for each change of status or refunded amount, each delivered, first heard in their order."""
    taken: dict[str, Json] = {}
    for received in stage.receiver.came:
        if not is_signed(received):
            yield "wrong", f"notification {received.id} is badly signed"
        if received.answer is OK and taken.setdefault(received.id, received.json) != received.json:
            yield "wrong", f"notification {received.id} came again with another body"
    changes: Counter[str] = Counter()
    before: Json | None = None
    for event in truth.events:
        if before is not None and before["payment_id"] == event["payment_id"]:
            stood = (before["to_status"], before["refunded_minor"])
            changes[event["payment_id"]] += stood != (event["to_status"], event["refunded_minor"])
        before = event
    made: Counter[str] = Counter()
    sequences: dict[str, list[int]] = defaultdict(list)
    for row in truth.notifications:
        made[row["payment_id"]] += row["incident_id"] is None
        if row["payment_id"] is not None:
            sequences[row["payment_id"]].append(row["sequence"])
        if str(row["id"]) not in taken:
            yield "lost", f"notification {row['sequence']} of {row['payment_id']} never came ({row['last_outcome']})"
    for payment_id in truth.payments:
        if made[payment_id] < changes[payment_id]:
            yield "lost", f"{payment_id}: {changes[payment_id]} changes, {made[payment_id]} notifications"
        if made[payment_id] > changes[payment_id]:
            yield "doubled", f"{payment_id}: {changes[payment_id]} changes, {made[payment_id]} notifications"
        if sequences[payment_id] != list(range(1, len(sequences[payment_id]) + 1)):
            yield "broken", f"the notifications of {payment_id} are numbered {sequences[payment_id]}"
    heard: dict[str, int] = {}
    for content in taken.values():
        payment = content["data"].get("payment")
        if payment is not None:
            sequence = content["data"]["sequence"]
            if sequence < heard.get(payment["id"], 0):
                yield "wrong", f"notification {sequence} of {payment['id']} came after {heard[payment['id']]}"
            heard[payment["id"]] = sequence


def is_signed(received: Received) -> bool:
    """As Standard Webhooks says; its own library would refuse what came minutes ago."""
    secret = base64.b64decode(NOTIFY_SECRET.removeprefix("whsec_"))
    signed = f"{received.id}.{received.headers['webhook-timestamp']}.".encode() + received.body
    digest = base64.b64encode(hmac.digest(secret, signed, "sha256")).decode()
    return received.headers["webhook-signature"] == f"v1,{digest}"


def run_command(stage: Stage, command: str) -> list[str]:
    """The lines of a command of manage.py that finds something wanting; none where it is content."""
    run = subprocess.run(
        [sys.executable, str(ROOT / "manage.py"), command],
        cwd=stage.folder,
        env=stage.command_env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if run.returncode == 2:  # there is no such command
        return []
    return (run.stdout + run.stderr).strip().splitlines() if run.returncode else []


def unexpected_lines(log: Path) -> list[str]:
    """What must not be in a log: a bug that the service caught, a traceback, a thread that died."""
    words = ("unexpected", "event_not_applied", "Traceback", "internal_error", '"failure"')
    # A database that went away is what was done to it; its words are libpq's ("closed the connection unexpectedly").
    lines = [line for line in log.read_text(errors="replace").splitlines() if '"event": "database_away"' not in line]
    return [line[:600] for line in lines if any(word in line for word in words)][:20]


# What is used


def usage(stage: Stage) -> Json:
    """The most that any worker uses, and the connections that all of them hold."""
    workers = [pid for instance in stage.instances for pid in children_of(instance.pid)]
    return {
        "workers": len(workers),
        "file descriptors": max(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in workers),
        "threads": max(int(status_of(pid)["Threads"]) for pid in workers),
        "megabytes": max(int(status_of(pid)["VmRSS"].split()[0]) for pid in workers) // 1024,
        **stage.sql(
            """
            SELECT count(*)::int AS connections,
                   count(*) FILTER (WHERE state LIKE 'idle in transaction%%')::int AS "in transaction"
              FROM pg_stat_activity WHERE application_name = 'paygate'
            """.replace("%%", "%")
        )[0],
    }


def status_of(pid: int) -> dict[str, Any]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def leaks(before: Json, after: Json) -> list[str]:
    """What is used more than before, beyond what a busy process keeps: gunicorn makes its threads as it needs them."""
    room = {
        "workers": 0,
        "file descriptors": 15,
        "threads": THREADS,
        "megabytes": 60,
        "connections": 12,
        "in transaction": 0,
    }
    return [
        f"{name}: {before[name]} before, {after[name]} after"
        for name, spare in room.items()
        if after[name] > before[name] + spare
    ]
