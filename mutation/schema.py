"""The breaks of schema.sql: each guard, each constraint that keeps money, each field of the chain, left out by hand.

They are named by what stands in the schema, not by its lines: of a function the last definition counts, wherever a
later migration puts it. A break whose text is not there any more is an error, and so is one that no database takes.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


class Gone(Exception):
    """What a break is about is not in the schema: adapt the break."""


@dataclass(frozen=True)
class Break:
    name: str
    make: Callable[[str], str] = field(repr=False)
    """The broken schema, from the whole one. Raises Gone."""


def breaks() -> list[Break]:
    return [
        *(Break(f"no trigger {name}", without_trigger(name)) for name in TRIGGERS),
        *(Break(f"no constraint {name}", without_constraint(name)) for name in CONSTRAINTS),
        *(Break(f"no guard: {message}", without_branch(message)) for message in BRANCHES),
        *(Break(f"the chain leaves out {part}", changed("payment_event_hash", part, "''")) for part in HASHED),
        *(Break(name, changed(function, old, new)) for name, function, old, new in CHANGES),
        *(Break(f"{name} is not audited", without_member(name)) for name in AUDITED),
    ]


TRIGGERS = (
    "a_new_payment_is_audited",
    "a_changed_payment_is_audited",
    "a_changed_payment_is_notified",
    "a_new_incident_is_notified",
    "a_payment_only_rises",
    "a_completed_payment_is_paid",
    "a_refund_stays_what_it_is",
    "refunds_are_never_removed",
    "payments_are_never_removed",
    "keys_are_never_removed",
    "charges_are_never_changed",
    "payment_events_are_never_changed",
    "the_secret_is_never_changed",
)
CONSTRAINTS = (
    "secrets_is_one_row",
    "mode_is_test_or_live",
    "status_is_known",
    "amount_is_positive",
    "reference_is_used_once",
    "reference_is_pg_and_26_of_base32",
    "attempt_is_1_to_9",
    "refunded_is_not_negative",
    "completed_has_paid_at",
    "money_came_has_a_charge",
    "charged_is_of_a_charge",
    "refunded_is_of_a_charge",
    "payment_has_one_key",
    "key_has_a_payment",
    "an_answer_is_whole",
    "an_answer_is_never_a_server_error",
    "charge_reference_is_ours",
    "charge_has_a_payment",
    "charged_amount_is_not_negative",
    "refund_has_a_charge",
    "refunded_amount_is_positive",
    "refund_status_is_known",
    "refund_is_recorded_once",
    "the_provider_names_what_it_took",
    "processed_has_its_time",
    "an_event_is_stored_once",
    "applied_has_its_time",
    "only_a_received_event_is_retried",
    "a_thing_opens_one_incident",
    "a_closed_incident_names_who",
    "notifications_are_numbered",
    "an_ended_notification_is_not_due",
    "actor_is_known",
    "why_is_known",
    "payment_events_are_numbered",
)
BRANCHES = (
    "what payment % asks for never changes",
    "payment % cannot fall from % to %",
    "payment % leaves review only accepted or wholly refunded",
    "payment % cannot go back to an earlier reference",
    "payment % has its checkout URL already",
    "payment % follows its own charge only",
    "payment % has been erased",
    "payment % has no charge that pays it",
    "what refund % is of never changes",
    "refund % has been answered",
)
HASHED = (
    "coalesce(previous_hash, '')",
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
)
AUDITED = (
    "status",
    "status_reason",
    "attempt",
    "checkout_url",
    "refunded_minor",
    "accepted_by",
    "paid_at",
    "expires_at",
    "customer_name",
    "customer_email",
    "customer_phone",
    "location",
    "description",
    "metadata",
    "return_url",
    "erased_at",
)
"""The columns that may change alone; a charge comes with a new status and stays."""
CHANGES = (
    ("completed ranks below review", "payment_rank", "WHEN 'completed' THEN 3", "WHEN 'completed' THEN 2"),
    ("failed ranks with pending", "payment_rank", "WHEN 'failed' THEN 1", "WHEN 'failed' THEN 0"),
    ("refunded ranks with partially_refunded", "payment_rank", "WHEN 'refunded' THEN 5", "WHEN 'refunded' THEN 4"),
    ("a status may move within its rank", "guard_payment", "<= payment_rank(OLD.status)", "< payment_rank(OLD.status)"),
    ("the amount asked for may change", "guard_payment", "OLD.amount_minor,", "NEW.amount_minor,"),
    ("the currency asked for may change", "guard_payment", "OLD.currency,", "NEW.currency,"),
    ("the mode may change", "guard_payment", "OLD.mode,", "NEW.mode,"),
    ("the reference may change", "guard_payment", "OLD.reference,", "NEW.reference,"),
    ("the charged sum may change", "guard_payment", "(OLD.charge_reference, OLD.charged_minor)",
     "(OLD.charge_reference, NEW.charged_minor)"),
    ("an attempt may not rise", "guard_payment", "NEW.attempt < OLD.attempt", "NEW.attempt > OLD.attempt"),
    ("a charge of another payment pays", "guard_completion", "payment_id = NEW.id", "true"),
    ("a charge of the other mode pays", "guard_completion", "mode = NEW.mode", "true"),
    ("a charge in another currency pays", "guard_completion", "currency = NEW.currency", "true"),
    ("a charge asked at another amount pays", "guard_completion",
     "coalesce(requested_minor, NEW.amount_minor) = NEW.amount_minor", "true"),
    ("a charge that is too small pays", "guard_completion", "amount_minor >= NEW.amount_minor", "true"),
    ("a charge of another sum pays", "guard_completion", "amount_minor = NEW.charged_minor", "true"),
    ("refunded needs no charge, whatever was given back", "guard_completion",
     "NEW.refunded_minor >= NEW.charged_minor", "true"),
    ("a new payment may be born refunded", "guard_completion", "TG_OP = 'UPDATE' AND", ""),
    ("a refund's provider id may change", "guard_refund",
     "OR (OLD.provider_id IS NOT NULL AND NEW.provider_id IS DISTINCT FROM OLD.provider_id)", ""),
    ("a refund's charge may change", "guard_refund", "OLD.charge_reference,", "NEW.charge_reference,"),
    ("the notification waits for none before it", "notify_merchant", "AND dead_at IS NULL", "AND false"),
    ("notifications are all number one", "notify_merchant", "notified = notified + 1", "notified = 1"),
    ("the notification leaves the status out", "notify_merchant", "'status', payment.status,", ""),
    ("the notification leaves the refunded sum out", "notify_merchant",
     "'refunded_minor', payment.refunded_minor,", ""),
)  # fmt: skip


def without_trigger(name: str) -> Callable[[str], str]:
    def make(schema: str) -> str:
        match = re.search(rf"CREATE TRIGGER {name}\s.*?\bON\s+(\w+)", schema, re.DOTALL)
        if match is None:
            raise Gone(f"trigger {name}")
        return f"{schema}\nDROP TRIGGER {name} ON {match[1]};\n"

    return make


def without_constraint(name: str) -> Callable[[str], str]:
    def make(schema: str) -> str:
        found = re.search(rf"CONSTRAINT {name}\s", schema)
        tables = re.findall(r"^(?:CREATE|ALTER) TABLE (\w+)", schema[: found.start() if found else 0], re.MULTILINE)
        if not tables:
            raise Gone(f"constraint {name}")
        return f"{schema}\nALTER TABLE {tables[-1]} DROP CONSTRAINT {name} CASCADE;\n"

    return make


def without_branch(message: str) -> Callable[[str], str]:
    """The condition of the IF before this message never holds."""

    def make(schema: str) -> str:
        at = schema.rfind(f"RAISE EXCEPTION '{message}'")
        begin, end = schema.rfind("    IF ", 0, at), schema.rfind("THEN", 0, at)
        if at < 0 or not 0 <= begin < end:
            raise Gone(f"guard {message}")
        return f"{schema[:begin]}    IF false {schema[end:]}"

    return make


def changed(function: str, old: str, new: str) -> Callable[[str], str]:
    """The first `old` in the last definition of a function is `new`."""

    def make(schema: str) -> str:
        definitions = list(
            re.finditer(rf"CREATE (?:OR REPLACE )?FUNCTION {function}\(.*?^\$\$", schema, re.DOTALL | re.MULTILINE)
        )
        pattern = r"\s+".join(map(re.escape, old.split()))
        lead, tail = (rf"(?<![\w.]){pattern}", r"(?![\w(])") if old[-1].isalnum() else (pattern, "")
        body = definitions[-1][0] if definitions else ""
        broken = re.sub(lead + tail, lambda _: new, body, count=1)
        if broken == body:
            raise Gone(f"{old} in {function}")
        return schema[: definitions[-1].start()] + broken + schema[definitions[-1].end() :]

    return make


def without_member(column: str) -> Callable[[str], str]:
    """A change of this column alone leaves no audit row."""

    def make(schema: str) -> str:
        triggers = list(
            re.finditer(r"CREATE (?:OR REPLACE )?TRIGGER a_changed_payment_is_audited\b.*?;", schema, re.DOTALL)
        )
        body = triggers[-1][0] if triggers else ""
        broken = re.sub(rf"\bOLD\.{column}\b", f"NEW.{column}", body)
        if broken == body:
            raise Gone(f"{column} in a_changed_payment_is_audited")
        return schema[: triggers[-1].start()] + broken + schema[triggers[-1].end() :]

    return make


def all_of(schema: str) -> Iterator[tuple[Break, str]]:
    """Each break with the broken schema, once all of them have been found. Raises Gone with all that are not."""
    made: list[tuple[Break, str]] = []
    gone: list[str] = []
    for each in breaks():
        try:
            made.append((each, each.make(schema)))
        except Gone as missing:
            gone.append(str(missing))
    unknown = set(re.findall(r"CREATE TRIGGER (\w+)", schema)) - set(TRIGGERS)
    gone += [f"nothing breaks trigger {name}" for name in sorted(unknown)]
    if gone:
        raise Gone("; ".join(gone))
    yield from made
