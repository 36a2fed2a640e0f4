"""`make mutation-schema`: each guard, each constraint that keeps money and each field of the chain is left out of
schema.sql, one at a time, and the tests must notice.

Breaks are named by what stands in the schema, not by its lines. A break whose text is not there any more is an error,
and so is one that no database takes.
"""
# ruff: noqa: SIM905  # words are easier to read than a list of strings

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = (ROOT / "schema.sql").read_text()
TESTS = (
    *("test_schema.py", "test_db.py", "commands", "test_notifications.py", "test_refunds.py", "test_checkout.py"),
    *("test_charges.py", "test_paygate.py", "test_webhook.py", "test_worker.py", "test_pruning.py"),
)
"""What is run until a test fails; the one that fails most often comes first."""
Break = Callable[[], str]

TRIGGERS = """
    a_new_payment_is_audited a_changed_payment_is_audited a_changed_payment_is_notified
    a_new_incident_is_notified a_payment_only_rises what_a_payment_asks_for_never_changes
    a_payment_keeps_its_page_its_charge_and_its_erasure
    a_completed_payment_is_paid a_refund_stays_what_it_is
    refunds_are_never_removed payments_are_never_removed keys_are_never_removed charges_are_never_removed
    a_charge_learns_its_fees_once withdrawn_orders_stay_so
    payment_events_are_never_changed the_secret_is_never_changed incidents_are_never_removed
    a_charge_is_audited a_new_refund_is_audited a_changed_refund_is_audited an_incident_is_audited
    a_changed_order_is_audited a_kept_event_is_audited an_event_that_is_kept_no_more_is_audited
""".split()
CONSTRAINTS = """
    secrets_is_one_row mode_is_test_or_live status_is_known amount_is_positive reference_is_used_once
    reference_is_pg_and_26_of_base32 attempt_is_1_to_9 refunded_is_not_negative completed_has_paid_at
    money_came_has_a_charge charged_is_of_a_charge refunded_is_of_a_charge payment_has_one_key key_has_a_payment
    answer_is_known an_answer_has_its_time charge_reference_is_ours charge_has_a_payment
    charged_amount_is_not_negative refund_has_a_charge refunded_amount_is_positive refund_status_is_known
    refund_is_recorded_once the_provider_names_what_it_took processed_has_its_time an_event_is_stored_once
    only_a_received_event_is_retried a_closed_incident_names_who
    notifications_are_numbered an_ended_notification_is_not_due actor_is_known why_is_known
    payment_events_are_numbered
""".split()
BRANCHES = ("payment % has no charge that pays it",)
HASHED = (
    "coalesce(encode(previous_hash, 'hex'), '')",
    "event.payment_id",
    "event.n",
    "event.actor",
    "event.why",
    "coalesce(event.from_status, '')",
    "event.to_status",
    "event.amount_minor",
    "event.currency",
    "event.mode",
    "event.reference",
    "event.charged_minor",
    "event.refunded_minor",
    "encode(event.digest, 'hex')",
)
AUDITED = """
    status status_reason attempt checkout_url refunded_minor accepted_by paid_at expires_at customer_name
    customer_email customer_phone location description metadata return_url erased_at salt
""".split()
# AUDITED: the columns that may change alone; a charge comes with a new status and stays.
ASKED, KEPT = "what_a_payment_asks_for_never_changes", "a_payment_keeps_its_page_its_charge_and_its_erasure"
CHANGES = (
    ("completed ranks below review", "payment_rank", "WHEN 'completed' THEN 3", "WHEN 'completed' THEN 2"),
    ("failed ranks with pending", "payment_rank", "WHEN 'failed' THEN 1", "WHEN 'failed' THEN 0"),
    ("refunded ranks with partially_refunded", "payment_rank", "WHEN 'refunded' THEN 5", "WHEN 'refunded' THEN 4"),
    ("a status may move within its rank", "a_payment_only_rises", "<= payment_rank(OLD.status)",
     "< payment_rank(OLD.status)"),
    ("a status may fall", "a_payment_only_rises", "NEW.status <> OLD.status", "false"),
    ("a review may become partially_refunded", "a_payment_only_rises", "OLD.status = 'review'", "false"),
    ("a payment may go back to an earlier reference", "a_payment_only_rises", "NEW.attempt < OLD.attempt", "false"),
    ("a checkout URL may be replaced", KEPT, "OLD.checkout_url IS NOT NULL", "false"),
    ("a payment may follow another charge", KEPT, "OLD.charge_reference IS NOT NULL", "false"),
    ("an erasure may be undone", KEPT, "OLD.erased_at IS NOT NULL", "false"),
    ("a refund may be unanswered again", "a_refund_stays_what_it_is", "OLD.status <> 'unanswered'", "false"),
    ("the amount asked for may change", ASKED, "OLD.amount_minor,", "NEW.amount_minor,"),
    ("the currency asked for may change", ASKED, "OLD.currency,", "NEW.currency,"),
    ("the mode may change", ASKED, "OLD.mode,", "NEW.mode,"),
    ("the reference may change", ASKED, "OLD.reference,", "NEW.reference,"),
    ("the charged sum may change", KEPT, "OLD.charged_minor,", "NEW.charged_minor,"),
    ("the charge's currency may change", KEPT, "OLD.charged_currency)", "NEW.charged_currency)"),
    ("an attempt may not rise", "a_payment_only_rises", "NEW.attempt < OLD.attempt", "NEW.attempt > OLD.attempt"),
    ("a charge of another payment pays", "guard_completion", "payment_id = NEW.id", "true"),
    ("a charge of the other mode pays", "guard_completion", "mode = NEW.mode", "true"),
    ("a charge in another currency pays", "guard_completion", "currency = NEW.currency", "true"),
    ("a charge asked at another amount pays", "guard_completion",
     "coalesce(requested_minor, NEW.amount_minor) = NEW.amount_minor", "true"),
    ("a charge that is too small pays", "guard_completion", "amount_minor >= NEW.amount_minor", "true"),
    ("a charge of another sum pays", "guard_completion", "amount_minor = NEW.charged_minor", "true"),
    ("refunded needs no charge, whatever was given back", "guard_completion",
     "sum(amount_minor) >= NEW.charged_minor", "true"),
    ("a refund under way counts as given back", "guard_completion", "AND status = 'processed'", ""),
    ("a pending payment may become refunded", "guard_completion", "OLD.status = 'review'", "true"),
    ("a payment is paid when we heard of it", "guard_completion", "coalesce(paid_at, recorded_at)", "recorded_at"),
    ("a refund's provider id may change", "a_refund_stays_what_it_is", "(OLD.provider_id, OLD.amount_minor",
     "(NEW.provider_id, OLD.amount_minor"),
    ("a refund's amount may change", "a_refund_stays_what_it_is", "OLD.amount_minor,", "NEW.amount_minor,"),
    ("a refund's currency may change", "a_refund_stays_what_it_is", "OLD.currency)", "NEW.currency)"),
    ("a refund's charge may change", "a_refund_stays_what_it_is", "OLD.charge_reference,", "NEW.charge_reference,"),
    *((f"the digest leaves out {what}", "payment_digest", what, "NULL") for what in (
        "proved(to_jsonb(payment))", "proved(to_jsonb(c))", "proved(to_jsonb(r))", "proved(to_jsonb(i))",
        "encode(fingerprint, 'hex')", "encode(e.digest, 'hex')")),
    ("the notification waits for none before it", "notify_merchant", "AND dead_at IS NULL", "AND false"),
    ("notifications are all number one", "notify_merchant", "notified = notified + 1", "notified = 1"),
    ("the notification leaves the status out", "notify_merchant", "('status',", "("),
    ("the notification leaves the refunded sum out", "notify_merchant", "'refunded_minor',", ""),
)  # fmt: skip


def without_trigger(name: str) -> str:
    found = re.search(rf"CREATE TRIGGER {name}\s.*?\bON\s+(\w+)", SCHEMA, re.DOTALL)
    assert found
    return f"{SCHEMA}\nDROP TRIGGER {name} ON {found[1]};\n"


def without_constraint(name: str) -> str:
    found = re.search(rf"CONSTRAINT {name}\s", SCHEMA)
    assert found
    table = re.findall(r"^(?:CREATE|ALTER) TABLE (\w+)", SCHEMA[: found.start()], re.MULTILINE)[-1]
    return f"{SCHEMA}\nALTER TABLE {table} DROP CONSTRAINT {name} CASCADE;\n"


def without_branch(message: str) -> str:
    """The condition of the IF before this message never holds."""
    at = SCHEMA.rindex(f"RAISE EXCEPTION '{message}'")
    begin, end = SCHEMA.rindex("    IF ", 0, at), SCHEMA.rindex("THEN", 0, at)
    return f"{SCHEMA[:begin]}    IF false {SCHEMA[end:]}"


def changed(name: str, old: str, new: str) -> str:
    """The first `old` in a function or a trigger is `new`."""
    found = re.search(
        rf"CREATE (?:FUNCTION {name}\(.*?(?:AS \$\$.*?^\$\$|^    RETURN .*?;$)|TRIGGER {name}\s.*?;$)",
        SCHEMA,
        re.DOTALL | re.MULTILINE,
    )
    assert found
    pattern = r"\s+".join(map(re.escape, old.split()))
    lead, tail = (rf"(?<![\w.]){pattern}", r"(?![\w(])") if old[-1].isalnum() else (pattern, "")
    return SCHEMA[: found.start()] + re.sub(lead + tail, lambda _: new, found[0], count=1) + SCHEMA[found.end() :]


BREAKS: dict[str, Break] = {
    **{f"no trigger {name}": partial(without_trigger, name) for name in TRIGGERS},
    **{f"no constraint {name}": partial(without_constraint, name) for name in CONSTRAINTS},
    **{f"no guard: {message}": partial(without_branch, message) for message in BRANCHES},
    **{f"the chain leaves out {part}": partial(changed, "payment_event_hash", part, "''") for part in HASHED},
    **{name: partial(changed, *change) for name, *change in CHANGES},
    **{f"{name} is not audited": partial(changed, "proved", "'poll_at',", f"'{name}',") for name in AUDITED},
}


def copy(folder: Path, schema: str) -> Path:
    """The project as git knows it, with this schema."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.split("\0")[:-1]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "schema.sql").write_text(schema)
    subprocess.run([sys.executable, "manage.py", "migrate"], cwd=folder, check=True)  # a database takes it
    return folder


def run_tests(folder: Path) -> int:
    tests = [f"tests/{name}" for name in TESTS]
    return subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", *tests], cwd=folder, check=False).returncode


def test_every_trigger_has_its_break() -> None:
    assert set(re.findall(r"CREATE TRIGGER (\w+)", SCHEMA)) == set(TRIGGERS)


def test_whole_the_schema_passes(tmp_path: Path) -> None:
    assert run_tests(copy(tmp_path, SCHEMA)) == 0


@pytest.mark.parametrize("name", BREAKS)
def test_the_tests_notice(name: str, tmp_path: Path) -> None:
    broken = BREAKS[name]()
    assert broken != SCHEMA, "what it breaks is gone: adapt the break"
    assert run_tests(copy(tmp_path, broken)) == 1
