# ruff: noqa: F811  (fixtures are imported by their names)
"""Money back: made once, whatever is lost on the way, never more than came, and found wherever it was made."""

import functools
import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

import checkout
import db
import paystack
from backstage import at_once, look, meanwhile, worker_of
from invariants import check_books
from relay import Relay
from sandbox import Sandbox
from shop import Shop, open_shop, sandbox, shop, wait_until  # noqa: F401  # fixtures
from till import Done, Till, open_till, paid, till  # noqa: F401  # fixtures

MINUTE, HOUR, DAY = 60, 3600, 86400
COMMIT = b"COMMIT\0"  # and not that of READ COMMITTED
SECOND_CALL = 10
"""A seed with which a fault that meets a call with probability 0.5 meets the second one, and not the first."""


def refunds(shop: Shop) -> list[dict[str, Any]]:
    return shop.sql("SELECT * FROM refunds ORDER BY created_at, id")


def only_refund(shop: Shop) -> dict[str, Any]:
    (refund,) = refunds(shop)
    return refund


def incidents(shop: Shop) -> list[str]:
    """The kinds of the open ones."""
    return [row["kind"] for row in shop.sql("SELECT kind FROM incidents WHERE closed_at IS NULL ORDER BY id")]


def statuses(shop: Shop) -> list[str]:
    return [refund["status"] for refund in refunds(shop)]


def age(shop: Shop, seconds: float) -> None:
    """As if every refund had been asked for `seconds` earlier, and is due for a look."""
    with psycopg.connect(shop.database_url) as conn:
        conn.execute("SET session_replication_role = replica")
        conn.execute(
            """
            UPDATE refunds SET look_at = now(), created_at = created_at - make_interval(secs => %(seconds)s),
                               send_ended_at = send_ended_at - make_interval(secs => %(seconds)s)
            """,
            {"seconds": seconds},
        )


def seek(shop: Shop) -> None:
    """One round of the worker's looks at refunds and at payments that wait for refunds, with everything due."""
    shop.sql("UPDATE refunds SET look_at = now() WHERE look_at IS NOT NULL")
    worker_of(shop).look_at_refunds()
    look(shop)


def settle(shop: Shop, sandbox: Sandbox, reference: str, status: str = "processed") -> None:
    """The last refund of a charge comes to its end at the provider, and the event tells of it."""
    sandbox.move_refund(reference, status)
    assert shop.deliver(reference, f"refund.{status}").status_code == 200
    seek(shop)


# A part and the whole


def test_a_part_then_the_rest_is_partially_refunded_then_refunded(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    assert "refund RF-" in till.did("refund", payment["id"], "--amount", "20.00", "--reason", "one item")
    assert shop.get(payment["id"])["status"] == "completed"
    settle(shop, sandbox, payment["reference"])
    assert (shop.get(payment["id"])["status"], shop.get(payment["id"])["refunded_amount"]) == ("partially_refunded", 20)
    till.did("refund", payment["id"])
    settle(shop, sandbox, payment["reference"])
    assert (shop.get(payment["id"])["status"], shop.get(payment["id"])["refunded_amount"]) == ("refunded", 50)
    assert [refund["amount"] for refund in sandbox.refunds()] == [2000, 3000]
    assert incidents(shop) == []
    check_books(shop.database_url)


def test_a_small_part_needs_no_minimum(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"], "--amount", "0.01")
    assert [refund["amount"] for refund in sandbox.refunds()] == [1]


@pytest.mark.parametrize(
    ("amount", "words"),
    [
        ("50.01", "only 50.00 NGN of"),
        ("0", "must be greater than 0"),
        ("-1", "must be greater than 0"),
        ("0.001", "at most 2 decimals"),
    ],
)
def test_an_amount_that_cannot_be_given_back_is_refused(
    shop: Shop, sandbox: Sandbox, till: Till, amount: str, words: str
) -> None:
    payment = paid(shop)
    done = till.run("refund", payment["id"], f"--amount={amount}")
    assert done.status == 1
    assert words in done.err
    assert (sandbox.calls("refund"), refunds(shop)) == (0, [])


def test_what_was_never_paid_cannot_be_given_back(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = shop.created()
    done = till.run("refund", payment["id"])
    assert (done.status, sandbox.calls("refund")) == (1, 0)
    assert "no money has come" in done.err


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_the_provider_refuses_and_the_amount_is_free_again(
    shop: Shop, sandbox: Sandbox, till: Till, status: int
) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "answer", status=status, body={"status": False, "message": "Balance is too low"})
    done = till.run("refund", payment["id"])
    assert done.status == 1
    assert "Balance is too low" in done.err
    assert statuses(shop) == ["refused"]
    till.did("refund", payment["id"])
    assert statuses(shop) == ["refused", "pending"]
    assert len(sandbox.refunds()) == 1


@pytest.mark.parametrize("status", [402, 409, 422])
def test_what_is_no_clear_refusal_may_have_been_made(shop: Shop, sandbox: Sandbox, till: Till, status: int) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "answer", effect=True, status=status, body={"status": False, "message": "Perhaps"})
    assert till.run("refund", payment["id"]).status == 1
    assert statuses(shop) == ["unanswered"]
    seek(shop)
    assert statuses(shop) == ["pending"]


# Asked twice


def test_the_same_refund_asked_for_twice_is_made_once(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"], "--amount", "20")
    again = till.did("refund", payment["id"], "--amount", "20.00", OPERATOR="grace")
    assert f"asked for already: refund {only_refund(shop)['id']} of 20.00 NGN" in again
    assert "operator:ada" in again
    assert sandbox.calls("refund") == 1


def test_another_amount_of_what_went_back_whole_is_refused(shop: Shop, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    assert "asked for already" in till.did("refund", payment["id"])
    assert "asked for already" in till.did("refund", payment["id"], "--amount", "50.00")
    more = till.run("refund", payment["id"], "--amount", "1.00")
    assert more.status == 1
    assert "only 0.00 NGN" in more.err


def test_again_makes_two_equal_refunds_two(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"], "--amount", "20")
    till.did("refund", payment["id"], "--amount", "20", "--again")
    seek(shop)
    settle(shop, sandbox, payment["reference"])
    assert [refund["amount_minor"] for refund in refunds(shop)] == [2000, 2000]
    assert len({refund["provider_id"] for refund in refunds(shop)}) == 2
    assert sorted(statuses(shop)) == ["pending", "processed"]


def test_after_a_day_the_same_amount_is_another_refund(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"], "--amount", "20")
    age(shop, DAY + MINUTE)
    till.did("refund", payment["id"], "--amount", "20")
    assert len(sandbox.refunds()) == 2


def test_with_nothing_left_the_refund_that_took_it_is_named(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    assert only_refund(shop)["id"] in till.did("refund", payment["id"])
    age(shop, DAY + MINUTE)
    done = till.run("refund", payment["id"])
    assert done.status == 1
    assert only_refund(shop)["id"] in done.err
    assert sandbox.calls("refund") == 1


def give_back(shop: Shop, payment_id: str, minor: int, *, again: bool = False) -> str:
    """What became of one operator's refund: its status, or why there is none."""
    database, gateway = shop.app.database, shop.app.gateway
    try:
        return checkout.refund(
            database, gateway, payment_id, amount_minor=lambda _: minor, again=again, made_by="operator:ada"
        ).status
    except (db.RefundImpossible, db.RefundAsked) as refused:
        return type(refused).__name__


@pytest.mark.parametrize(("again", "outcome"), [(False, "RefundAsked"), (True, "RefundImpossible")])
def test_eight_operators_at_once_give_back_sixty_percent_once(
    shop: Shop, sandbox: Sandbox, till: Till, again: bool, outcome: str
) -> None:
    payment = paid(shop)
    outcomes = at_once([lambda: give_back(shop, payment["id"], 3000, again=again)] * 8)
    assert sorted(outcomes) == sorted(["pending", *[outcome] * 7])
    assert [refund["amount"] for refund in sandbox.refunds()] == [3000]

    settle(shop, sandbox, payment["reference"], "failed")
    assert incidents(shop) == ["refund_failed"]
    till.did("refund", payment["id"], "--amount", "30.00")  # it can be given back again
    assert [refund["status"] for refund in sandbox.refunds()] == ["failed", "pending"]


def test_different_parts_at_once_never_add_up_to_more_than_came(shop: Shop, sandbox: Sandbox) -> None:
    payment = paid(shop)
    amounts = (3000, 2900, 2800, 2700, 2600, 2500)
    outcomes = at_once([functools.partial(give_back, shop, payment["id"], minor) for minor in amounts])
    assert outcomes.count("pending") == 1
    assert sum(refund["amount"] for refund in sandbox.refunds()) <= 5000


# Lost answers


@pytest.mark.parametrize(
    "fault", ["lost-answer", "500", "502", "503", "garbage", "no-data", "status-string", "truncated"]
)
def test_a_refund_whose_answer_is_lost_is_found_by_its_note_and_made_once(
    shop: Shop, sandbox: Sandbox, till: Till, fault: str
) -> None:
    payment = paid(shop)
    sandbox.fault("refund", fault, effect=True)
    done = till.run("refund", payment["id"])
    assert done.status == 1
    assert "it counts as made, and is looked for" in done.err
    assert only_refund(shop)["status"] == "unanswered"

    repeated = till.did("refund", payment["id"])  # the operator tries again: it is not sent again
    assert only_refund(shop)["id"] in repeated
    seek(shop)
    assert only_refund(shop)["status"] == "pending"
    assert only_refund(shop)["id"] == sandbox.refunds()[0]["merchant_note"]
    assert (sandbox.calls("refund"), len(sandbox.refunds())) == (1, 1)


def test_a_list_that_is_still_empty_proves_nothing(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "lost-answer")
    assert till.run("refund", payment["id"]).status == 1
    sandbox.fault("list-refunds", "empty-list", times=None)
    seek(shop)
    age(shop, 20 * MINUTE)
    seek(shop)
    assert only_refund(shop)["status"] == "unanswered"
    sandbox.clear_faults()
    seek(shop)
    assert only_refund(shop)["status"] == "pending"
    assert incidents(shop) == []


def test_a_refund_that_the_provider_never_took_is_free_after_half_an_hour(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "lost-request")
    assert till.run("refund", payment["id"]).status == 1
    age(shop, 29 * MINUTE)
    seek(shop)
    assert only_refund(shop)["status"] == "unanswered"
    age(shop, 2 * MINUTE)
    seek(shop)
    assert (only_refund(shop)["status"], incidents(shop)) == ("not_made", ["refund_not_made"])
    till.did("refund", payment["id"])
    assert statuses(shop) == ["not_made", "pending"]


def test_a_refund_of_the_dashboard_counts_once_ours_is_given_up(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    """Before that it might have been ours."""
    payment = paid(shop)
    sandbox.fault("refund", "lost-request")
    assert till.run("refund", payment["id"], "--amount", "20").status == 1
    sandbox.dashboard_refund(payment["reference"], 1000)
    sandbox.move_refund(payment["reference"], "processed")
    seek(shop)
    assert (statuses(shop), shop.get(payment["id"])["status"]) == (["unanswered"], "completed")
    age(shop, 31 * MINUTE)
    seek(shop)
    assert sorted(statuses(shop)) == ["not_made", "processed"]
    told = shop.get(payment["id"])
    assert (told["status"], told["refunded_amount"]) == ("partially_refunded", 10)
    assert till.run("audit").status == 0


def test_a_younger_refund_stays_spent_when_an_older_one_is_given_up(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    sandbox.fault("refund", "lost-request", times=2)
    assert till.run("refund", paid(shop)["id"]).status == 1
    age(shop, 31 * MINUTE)
    assert till.run("refund", paid(shop)["id"]).status == 1
    seek(shop)
    assert statuses(shop) == ["not_made", "unanswered"]


def test_a_refund_that_shows_up_after_all_is_revived_and_counted(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "lost-answer")
    assert till.run("refund", payment["id"]).status == 1
    sandbox.fault("list-refunds", "empty-list", times=None)
    age(shop, 31 * MINUTE)
    seek(shop)
    assert only_refund(shop)["status"] == "not_made"
    sandbox.clear_faults()
    age(shop, 14 * MINUTE)
    seek(shop)
    assert (only_refund(shop)["status"], incidents(shop)) == ("pending", ["refund_revived"])
    settle(shop, sandbox, payment["reference"])
    assert shop.get(payment["id"])["status"] == "refunded"


def test_what_took_the_amount_is_recorded_before_it_is_free(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    """A colleague made it in the dashboard meanwhile: freed blindly, the amount would be given back twice."""
    payment = paid(shop)
    sandbox.fault("refund", "lost-request")
    assert till.run("refund", payment["id"]).status == 1
    sandbox.dashboard_refund(payment["reference"])
    seek(shop)
    assert statuses(shop) == ["unanswered"]  # it might be ours
    age(shop, 31 * MINUTE)
    seek(shop)
    assert sorted(statuses(shop)) == ["not_made", "pending"]
    done = till.run("refund", payment["id"])
    assert "asked for already" in done.out
    assert len(sandbox.refunds()) == 1


@pytest.mark.parametrize("fault", ["lost-request", "503", "invalid-key", "garbage", "429"])
def test_a_provider_that_is_away_for_an_hour_is_not_missing_a_refund(
    shop: Shop, sandbox: Sandbox, till: Till, fault: str
) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "lost-answer")
    assert till.run("refund", payment["id"]).status == 1
    sandbox.fault("list-refunds", fault, times=None)
    age(shop, HOUR)
    background = worker_of(shop)
    for _ in range(3):
        shop.sql("UPDATE refunds SET look_at = now()")
        with pytest.raises((paystack.Unavailable, paystack.Misconfigured)):
            background.look_at_refunds()
    assert only_refund(shop)["status"] == "unanswered"
    sandbox.clear_faults()
    seek(shop)
    assert only_refund(shop)["status"] == "pending"


def test_a_listing_that_breaks_off_on_its_second_page_proves_nothing(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    other, payment = paid(shop, amount=500), paid(shop)
    for _ in range(100):
        sandbox.dashboard_refund(other["reference"], 100)
    sandbox.fault("refund", "lost-request")
    assert till.run("refund", payment["id"]).status == 1
    age(shop, HOUR)
    sandbox.backdate(other["reference"], HOUR)
    newest = sandbox.dashboard_refund(other["reference"], 100)  # the first page is full, and ours is not on it
    assert newest["id"]
    pages = sandbox.calls("list-refunds")
    sandbox.fault("list-refunds", "garbage", seed=SECOND_CALL, probability=0.5)
    with pytest.raises(paystack.Unavailable):
        worker_of(shop).look_at_refunds()
    assert sandbox.calls("list-refunds") - pages == 2
    assert "not_made" not in statuses(shop)


def test_a_refund_that_stays_open_is_an_incident_after_thirty_days(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    age(shop, 29 * DAY)
    seek(shop)
    assert (incidents(shop), only_refund(shop)["look_at"] is None) == ([], False)
    age(shop, DAY)
    seek(shop)
    assert (incidents(shop), only_refund(shop)["look_at"]) == (["refund_not_final"], None)
    settle(shop, sandbox, payment["reference"])
    assert incidents(shop) == []  # closed by its end


def test_the_end_of_one_refunds_looks_is_not_that_of_anothers(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    old, new = paid(shop), paid(shop)
    till.did("refund", old["id"])
    age(shop, 30 * DAY)
    till.did("refund", new["id"])
    seek(shop)
    looks = {refund["payment_id"]: refund["look_at"] is not None for refund in refunds(shop)}
    assert looks == {old["id"]: False, new["id"]: True}
    assert incidents(shop) == ["refund_not_final"]


def test_one_refund_that_the_provider_does_not_know_holds_up_no_other(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    first, second = paid(shop), paid(shop)
    till.did("refund", first["id"])
    till.did("refund", second["id"])
    sandbox.move_refund(second["reference"], "processed")
    shop.sql("UPDATE refunds SET look_at = now() - interval '1 min' WHERE payment_id = %s", first["id"])
    shop.sql("UPDATE refunds SET look_at = now() WHERE payment_id = %s", second["id"])
    sandbox.fault("fetch-refund", "not-found", times=None, prefix=first["reference"])
    worker_of(shop).look_at_refunds()
    assert shop.get(second["id"])["status"] == "refunded"


def test_an_answer_that_names_no_reference_is_known_by_the_refunds_own_id(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop)
    with psycopg.connect(shop.database_url) as conn:
        conn.execute("SET session_replication_role = replica")
        conn.execute("UPDATE charges SET provider_id = NULL")  # as from an event without one
    till.did("refund", payment["id"])
    (refund,) = sandbox.refunds()
    told = {"id": refund["id"], "transaction": 1, "amount": 5000, "currency": "NGN", "status": "processed"}
    sandbox.fault("fetch-refund", "answer", body={"status": True, "message": "", "data": told})
    age(shop, MINUTE)
    worker_of(shop).look_at_refunds()
    assert shop.get(payment["id"])["status"] == "refunded"


# Killed, or cut off, at each step


@pytest.fixture
def relay(database_url: str) -> Iterator[Relay]:
    with Relay(database_url) as relay:
        yield relay


def kill_when(process: "subprocess.Popen[str]", reached: Callable[[], object]) -> None:
    try:
        wait_until(reached, 40)
    finally:
        process.kill()
        process.communicate(timeout=10)


@pytest.mark.parametrize("after", [False, True])
def test_killed_around_the_commit_nothing_was_asked_for(
    shop: Shop, sandbox: Sandbox, till: Till, relay: Relay, after: bool
) -> None:
    payment = paid(shop)
    moment = relay.after(COMMIT) if after else relay.before(COMMIT)
    process = till.start("refund", payment["id"], env={"DATABASE_URL": relay.url})
    kill_when(process, moment.reached.is_set)
    moment.over.set()
    assert (statuses(shop), sandbox.calls("refund")) == (["unanswered"] if after else [], 0)
    age(shop, 33 * MINUTE)
    seek(shop)
    till.did("refund", payment["id"])
    assert len(sandbox.refunds()) == 1


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("again", [(), ("--again",)])
def test_a_commit_whose_reply_is_lost_makes_one_refund(
    shop: Shop, sandbox: Sandbox, till: Till, relay: Relay, after: bool, again: tuple[str, ...]
) -> None:
    payment = paid(shop)
    moment = relay.after(COMMIT) if after else relay.before(COMMIT)
    moment.over.set()
    till.did("refund", payment["id"], "--amount", "20", *again, DATABASE_URL=relay.url)
    assert moment.reached.is_set()
    assert (statuses(shop), sandbox.calls("refund")) == (["pending"], 1)


def test_a_database_that_goes_before_the_answer_is_stored_says_where_to_look(
    shop: Shop, sandbox: Sandbox, till: Till, relay: Relay
) -> None:
    payment = paid(shop)
    for _ in range(3):  # each try to store it
        relay.before(b"FROM charges\n         WHERE mode =").over.set()
    done = till.run("refund", payment["id"], DATABASE_URL=relay.url)
    assert done.status == 1
    assert f"never asked for twice: manage.py show {payment['id']}" in done.err
    seek(shop)
    assert (statuses(shop), sandbox.calls("refund")) == (["pending"], 1)


def test_killed_before_the_provider_took_it_it_is_not_made(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "time-out-before")
    kill_when(till.start("refund", payment["id"]), lambda: sandbox.calls("refund") == 1)
    assert only_refund(shop)["status"] == "unanswered"
    assert only_refund(shop)["id"] in till.did("refund", payment["id"])
    age(shop, 33 * MINUTE)
    seek(shop)
    assert (statuses(shop), sandbox.refunds()) == (["not_made"], [])


def test_killed_before_the_answer_came_it_is_found(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "time-out")
    kill_when(till.start("refund", payment["id"]), sandbox.refunds)
    assert only_refund(shop)["status"] == "unanswered"
    seek(shop)
    assert (statuses(shop), len(sandbox.refunds())) == (["pending"], 1)


def test_killed_before_the_answer_was_stored_it_is_found(
    shop: Shop, sandbox: Sandbox, till: Till, relay: Relay
) -> None:
    payment = paid(shop)
    moment = relay.before(b"FROM charges\n         WHERE mode =")
    process = till.start("refund", payment["id"], env={"DATABASE_URL": relay.url})
    kill_when(process, moment.reached.is_set)
    moment.over.set()
    seek(shop)
    assert (statuses(shop), len(sandbox.refunds())) == (["pending"], 1)
    assert sandbox.calls("refund") == 1


# Events and the dashboard


def test_an_event_without_an_id_before_our_own_answer_makes_no_second_refund(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "time-out", seconds=1.0)
    with meanwhile(lambda: till.shell("refund", payment["id"], "--amount", "20")) as done:
        wait_until(sandbox.refunds, 40)
        assert shop.deliver(payment["reference"], "refund.pending").status_code == 200
        look(shop)
        assert statuses(shop) == ["pending"]
    assert done().status == 0
    seek(shop)
    assert (statuses(shop), len(sandbox.refunds())) == (["pending"], 1)


def test_a_refund_made_in_the_dashboard_is_adopted_once(shop: Shop, sandbox: Sandbox) -> None:
    payment = paid(shop)
    sandbox.dashboard_refund(payment["reference"], 2000)
    for _ in range(3):
        assert shop.deliver(payment["reference"], "refund.pending").status_code == 200
        seek(shop)
    settle(shop, sandbox, payment["reference"])
    assert (only_refund(shop)["origin"], only_refund(shop)["status"]) == ("dashboard", "processed")
    assert shop.get(payment["id"])["status"] == "partially_refunded"


def test_a_refund_of_all_that_was_paid_may_be_more_than_the_price(shop: Shop, sandbox: Sandbox) -> None:
    """Where the customer bore the fees, the dashboard gives those back too."""
    payment = paid(shop, customer_email="pays-fees@example.com")
    whole = sandbox.dashboard_refund(payment["reference"])["amount"]
    assert whole > 5000
    settle(shop, sandbox, payment["reference"])
    told = shop.get(payment["id"])
    assert (told["status"], told["refunded_amount"]) == ("refunded", whole / 100)
    assert incidents(shop) == []


def test_a_plain_refund_gives_back_at_most_the_price(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop, customer_email="pays-fees@example.com")
    till.did("refund", payment["id"])
    assert [refund["amount"] for refund in sandbox.refunds()] == [5000]


def test_more_given_back_than_came_is_recorded_and_is_an_incident(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.dashboard_refund(payment["reference"], 6000)
    settle(shop, sandbox, payment["reference"])
    assert shop.get(payment["id"])["refunded_amount"] == 60
    assert incidents(shop) == ["refunded_too_much"]
    assert till.run("audit").status == 0  # somebody was told


def test_a_refund_that_fails_after_it_was_processed_lowers_the_sum_and_keeps_the_state(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    settle(shop, sandbox, payment["reference"])
    assert shop.get(payment["id"])["status"] == "refunded"
    settle(shop, sandbox, payment["reference"], "failed")
    told = shop.get(payment["id"])
    assert (told["status"], told["refunded_amount"]) == ("refunded", 0)
    assert incidents(shop) == ["refund_failed"]
    till.did("refund", payment["id"])  # it is owed again
    settle(shop, sandbox, payment["reference"])
    assert shop.get(payment["id"])["refunded_amount"] == 50


def test_a_refund_that_wants_attention_is_an_incident_until_it_ends(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    settle(shop, sandbox, payment["reference"], "needs-attention")
    assert incidents(shop) == ["refund_needs_attention"]
    settle(shop, sandbox, payment["reference"])
    assert incidents(shop) == []


def test_an_older_answer_does_not_undo_a_processed_refund(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    settle(shop, sandbox, payment["reference"])
    sandbox.ledger.refund_named(payment["reference"]).status = "pending"
    look(shop)
    till.did("sync", payment["id"])
    assert only_refund(shop)["status"] == "processed"


def test_a_refund_event_that_overtakes_its_charge_is_not_forgotten(shop: Shop, sandbox: Sandbox) -> None:
    payment = shop.created()
    sandbox.pay(payment["reference"])
    sandbox.dashboard_refund(payment["reference"], 1000)
    sandbox.move_refund(payment["reference"], "processed")
    assert shop.deliver(payment["reference"], "refund.processed").status_code == 200
    look(shop)
    look(shop)
    assert shop.get(payment["id"])["refunded_amount"] == 10


def test_reversed_without_any_webhook_is_paid_then_refunded(shop: Shop, sandbox: Sandbox) -> None:
    payment = shop.created()
    sandbox.pay(payment["reference"])
    sandbox.dashboard_refund(payment["reference"])
    sandbox.move_refund(payment["reference"], "processed")
    look(shop)
    look(shop)
    assert shop.get(payment["id"])["status"] == "refunded"
    trail = shop.sql("SELECT to_status FROM payment_events ORDER BY n")
    assert [row["to_status"] for row in trail][-2:] == ["completed", "refunded"]
    assert incidents(shop) == []
    check_books(shop.database_url)


def test_reversed_without_a_refund_is_a_chargeback_after_half_an_hour(shop: Shop, sandbox: Sandbox) -> None:
    payment = shop.created()
    sandbox.pay(payment["reference"])
    sandbox.alter(payment["reference"], status="reversed")
    look(shop)
    look(shop)
    assert (shop.get(payment["id"])["status"], incidents(shop)) == ("completed", [])
    shop.sql("UPDATE payments SET refunds_awaited_since = now() - interval '31 min'")
    look(shop)
    assert incidents(shop) == ["chargeback"]
    assert shop.sql("SELECT look_at, refunds_awaited_since FROM payments") == [
        {"look_at": None, "refunds_awaited_since": None}
    ]


# A second charge


def pay_again(shop: Shop, sandbox: Sandbox, payment: dict[str, Any]) -> str:
    """A second transaction of the same payment is paid: an earlier answer was lost, and both pages were open."""
    second = f"{payment['reference']}-2"
    sandbox.charge_elsewhere(second, amount=5000)
    assert shop.deliver(second).status_code == 200
    return second


def test_the_second_charge_is_given_back_and_the_payment_stays_completed(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop)
    second = pay_again(shop, sandbox, payment)
    assert incidents(shop) == ["second_charge"]
    assert f"refund {second}" in till.did("show", payment["id"])
    till.did("refund", second)
    settle(shop, sandbox, second)
    told = shop.get(payment["id"])
    assert (told["status"], told["refunded_amount"]) == ("completed", 0)
    assert incidents(shop) == []
    assert [(refund["reference"], refund["amount"]) for refund in sandbox.refunds()] == [(second, 5000)]
    assert till.run("audit").status == 0


def test_a_reference_means_exactly_that_charge(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    done = till.run("refund", f"{payment['reference']}-3")
    assert (done.status, sandbox.calls("refund")) == (1, 0)
    assert f"no money has come for {payment['reference']}-3" in done.err


# Review


@pytest.fixture
def review(shop: Shop) -> dict[str, Any]:
    """A payment of which NGN 1.00 is missing."""
    payment = paid(shop, customer_email="underpaid@example.com")
    assert shop.get(payment["id"])["status"] == "review"
    return payment


@pytest.mark.parametrize("email", ["underpaid@example.com", "other-currency@example.com"])
def test_money_that_is_not_the_price_goes_to_review(shop: Shop, email: str) -> None:
    payment = paid(shop, customer_email=email)
    assert shop.get(payment["id"])["status"] == "review"
    assert incidents(shop) == ["mismatch"]


def test_a_charge_asked_at_another_amount_goes_to_review(shop: Shop, sandbox: Sandbox) -> None:
    payment = shop.created()
    sandbox.alter(payment["reference"], requested_amount=4000)
    shop.pay(payment["reference"])
    assert (shop.get(payment["id"])["status"], incidents(shop)) == ("review", ["mismatch"])


def test_accept_completes_and_says_who_and_why(shop: Shop, till: Till, review: dict[str, Any]) -> None:
    till.did("resolve", review["id"], "accept", "--reason", "the rest came in cash", "--by", "Grace")
    assert shop.get(review["id"])["status"] == "completed"
    assert incidents(shop) == []
    story = till.did("show", review["id"])
    assert "operator:Grace" in story
    assert "the rest came in cash" in story
    assert till.run("audit").status == 0
    again = till.run("resolve", review["id"], "accept", "--reason", "twice")
    assert (again.status, "nothing to accept" in again.err) == (1, True)


def test_reject_gives_the_whole_charge_back_and_ends_in_refunded(
    shop: Shop, sandbox: Sandbox, till: Till, review: dict[str, Any]
) -> None:
    till.did("resolve", review["id"], "reject", "--reason", "too little")
    assert shop.get(review["id"])["status"] == "review"
    settle(shop, sandbox, review["reference"])
    told = shop.get(review["id"])
    assert (told["status"], told["refunded_amount"]) == ("refunded", 49)
    assert incidents(shop) == []
    assert till.run("audit").status == 0


def test_reject_may_be_repeated_after_a_failed_refund(
    shop: Shop, sandbox: Sandbox, till: Till, review: dict[str, Any]
) -> None:
    words = ("resolve", review["id"], "reject", "--reason", "too little")
    till.did(*words)
    settle(shop, sandbox, review["reference"], "failed")
    assert shop.get(review["id"])["status"] == "review"
    till.did(*words)
    settle(shop, sandbox, review["reference"])
    assert shop.get(review["id"])["status"] == "refunded"


def test_a_partial_refund_keeps_it_in_review_until_the_rest_goes_back(
    shop: Shop, sandbox: Sandbox, till: Till, review: dict[str, Any]
) -> None:
    till.did("refund", review["id"], "--amount", "9")
    accept = ("resolve", review["id"], "accept", "--reason", "enough")
    assert "open or made" in till.run(*accept).err  # nobody may count it as paid while money goes back
    settle(shop, sandbox, review["reference"])
    assert shop.get(review["id"])["status"] == "review"
    assert till.run(*accept).status == 1
    till.did("resolve", review["id"], "reject", "--reason", "too little")
    settle(shop, sandbox, review["reference"])
    assert shop.get(review["id"])["status"] == "refunded"
    assert [refund["amount"] for refund in sandbox.refunds()] == [900, 4000]


def test_what_is_not_in_review_is_not_rejected(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    done = till.run("resolve", payment["id"], "reject", "--reason", "by mistake")
    assert (done.status, sandbox.calls("refund")) == (1, 0)
    assert "nothing to reject" in done.err


def test_more_paid_than_asked_for_is_completed_and_show_says_so(shop: Shop, till: Till) -> None:
    payment = paid(shop, customer_email="overpaid@example.com")
    assert shop.get(payment["id"])["status"] == "completed"
    assert "1.00 NGN more than the price" in till.did("show", payment["id"])


# What is said


def test_the_refund_for_a_program_is_json(shop: Shop, till: Till) -> None:
    payment = paid(shop)
    told = json.loads(till.did("refund", payment["id"], "--amount", "20", "--json"))
    assert (told["amount"], told["status"], told["payment"]) == (20, "pending", payment["id"])
    assert not told["is_repetition"]
    again = json.loads(till.did("refund", payment["id"], "--amount", "20", "--json"))
    assert (again["id"], again["is_repetition"]) == (told["id"], True)


def test_a_live_key_does_not_touch_a_test_payment(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    live = {"PAYSTACK_SECRET_KEY": "sk_live_0123456789abcdef", "PUBLIC_URL": "https://pay.example.com"}
    for words in (("refund", payment["id"]), ("sync", payment["id"])):
        done = till.run(*words, **live)
        assert done.status == 1
        assert payment["id"] in done.err
    assert sandbox.calls("refund") == 0
