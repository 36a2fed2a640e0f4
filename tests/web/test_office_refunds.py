# ruff: noqa: F811  (fixtures are imported by their names)
"""Refunds over HTTP: one Idempotency-Key, one refund, for ever."""

import pytest

import refunds as money_back_core
from backstage import at_once, initialize_before, meanwhile, slow_process, somebody_waits
from invariants import check_books
from local.sandbox import Sandbox
from money_back import HOUR, age, incidents, only_refund, refunds, seek, settle, statuses
from office import Office, office  # noqa: F401  # a fixture
from refunds import Request
from shop import Shop, open_shop, sandbox, shop, wait_until  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures
from worker import apply_lists


def test_a_part_is_given_back_and_can_be_read(office: Office, sandbox: Sandbox) -> None:
    payment = paid(office.shop)
    answer = office.give_back(payment, "one", amount="10.50", reason="one item", by="Ada")
    made = answer.json["refund"]
    assert answer.status_code == 201
    assert (made["amount"], made["currency"], made["status"], made["made_by"], made["reason"]) == (
        *(10.5, "NGN", "pending", "operator:Ada", "one item"),
    )
    path = f"/payments/{payment['id']}/refunds"
    assert office.asked(path)["refunds"] == [made]
    assert office.asked(f"{path}/{made['id']}")["refund"] == made
    assert office.ask(f"{path}/RF-{'0' * 26}").status_code == 404
    settle(office.shop, sandbox, payment["reference"])
    done = office.asked(f"{path}/{made['id']}")["refund"]
    assert (done["status"], done["processed_at"] is not None) == ("processed", True)
    assert office.shop.get(payment["id"])["refunded_amount"] == 10.5


def test_without_an_amount_all_that_is_left_goes_back(office: Office) -> None:
    payment = paid(office.shop)
    office.give_back(payment, "one", amount=20)
    assert office.give_back(payment, "two").json["refund"]["amount"] == 30
    assert office.give_back(payment, "three").json["code"] == "not_possible"


def test_a_repeated_key_is_answered_with_its_refund_and_nothing_is_sent(office: Office, sandbox: Sandbox) -> None:
    payment = paid(office.shop)
    first = office.give_back(payment, "one", amount=20)
    assert first.headers.get("idempotent-replayed") is None
    settle(office.shop, sandbox, payment["reference"])
    again = office.give_back(payment, "one", amount=20)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (201, "true")
    assert (again.json["refund"]["id"], again.json["refund"]["status"]) == (first.json["refund"]["id"], "processed")
    assert sandbox.calls("refund") == 1


def test_the_same_amount_with_another_key_is_another_refund(office: Office) -> None:
    payment = paid(office.shop)
    made = [office.give_back(payment, key, amount=20).json["refund"]["id"] for key in ("one", "two")]
    assert len(set(made)) == 2


@pytest.mark.parametrize("body", [{"amount": 21}, {"amount": "20.01"}])
def test_a_key_that_comes_again_for_another_amount_is_refused(office: Office, body: dict[str, object]) -> None:
    payment = paid(office.shop)
    office.give_back(payment, "one", amount=20)
    assert office.give_back(payment, "one", **body).json["code"] == "idempotency_key_reused"
    assert len(refunds(office.shop)) == 1


def test_a_key_that_comes_again_for_another_payment_is_refused(office: Office) -> None:
    first, second = paid(office.shop), paid(office.shop)
    office.give_back(first, "one", amount=20)
    assert office.give_back(second, "one", amount=20).json["code"] == "idempotency_key_reused"
    assert len(refunds(office.shop)) == 1


def test_one_key_for_two_payments_at_the_same_moment_is_one_refund(office: Office) -> None:
    payments = [paid(office.shop) for _ in range(4)]
    answers = at_once([lambda payment=payment: office.give_back(payment, "one") for payment in payments])  # type: ignore[misc]
    assert sorted(answer.status_code for answer in answers) == [201, 422, 422, 422]
    assert len(refunds(office.shop)) == 1


def test_eight_requests_with_one_key_at_the_same_moment_are_one_refund(office: Office, sandbox: Sandbox) -> None:
    payment = paid(office.shop)
    answers = at_once([lambda: office.give_back(payment, "one", amount=20)] * 8)
    assert {answer.status_code for answer in answers} <= {201, 202}
    assert len({answer.json["refund"]["id"] for answer in answers}) == 1
    assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
    assert (len(sandbox.refunds()), sandbox.calls("refund")) == (1, 1)
    check_books(office.shop.database_url)


def test_an_answer_that_is_lost_is_202_then_found_and_never_sent_again(office: Office, sandbox: Sandbox) -> None:
    payment = paid(office.shop)
    sandbox.fault("refund", "lost-answer", times=1)
    answer = office.give_back(payment, "one", amount=20)
    assert (answer.status_code, answer.json["refund"]["status"]) == (202, "unanswered")
    again = office.give_back(payment, "one", amount=20)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (202, "true")
    age(office.shop, 120)
    seek(office.shop)
    found = office.give_back(payment, "one", amount=20)
    assert (found.status_code, found.json["refund"]["status"]) == (201, "pending")
    assert (len(sandbox.refunds()), sandbox.calls("refund")) == (1, 1)


def test_what_a_killed_process_had_not_sent_the_repetition_sends(office: Office, sandbox: Sandbox) -> None:
    payment = paid(office.shop)
    request = Request(payment["id"], "20", "operator:admin", key="one")
    begun = money_back_core.begin(office.shop.app.database, "test", request)
    answer = office.give_back(payment, "one", amount=20)
    assert (answer.status_code, answer.json["refund"]["id"]) == (201, begun.id)
    assert sandbox.calls("refund") == 1


def test_what_a_killed_process_had_not_sent_is_not_sent_later(office: Office, sandbox: Sandbox) -> None:
    payment = paid(office.shop)
    request = Request(payment["id"], "20", "operator:admin", key="one")
    money_back_core.begin(office.shop.app.database, "test", request)
    age(office.shop, 61)
    answer = office.give_back(payment, "one", amount=20)
    assert (answer.status_code, answer.json["code"]) == (422, "provider_refused")
    assert "too late" in answer.json["errors"]["amount"][0]
    assert sandbox.calls("refund") == 0
    assert office.give_back(payment, "two", amount=50).status_code == 201  # the amount is free again


def test_what_is_too_late_to_send_waits_for_the_one_who_sends_it(office: Office) -> None:
    payment = paid(office.shop)
    request = Request(payment["id"], "20", "operator:admin", key="one")
    begun = money_back_core.begin(office.shop.app.database, "test", request)
    age(office.shop, 57)
    is_too_late = "SELECT id FROM refunds WHERE created_at < clock_timestamp() - interval '1 min'"
    with slow_process(office.shop) as database:
        assert money_back_core.begin_sending(database, begun)
        wait_until(lambda: office.shop.sql(is_too_late))
        with meanwhile(lambda: office.give_back(payment, "one", amount=20)) as repeated:
            wait_until(lambda: somebody_waits(office.shop))
            database.run(lambda conn: conn.commit())
    assert (repeated().status_code, repeated().json["refund"]["status"]) == (202, "unanswered")


def test_a_refund_whose_row_was_lost_with_its_database_is_found_by_its_key(office: Office, sandbox: Sandbox) -> None:
    payment = paid(office.shop)
    made = office.give_back(payment, "one", amount=20).json["refund"]
    office.shop.sql("SET session_replication_role = replica; DELETE FROM refunds")
    apply_lists(office.shop.app.database, office.shop.app.gateway)
    again = office.give_back(payment, "one", amount=20)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (201, "true")
    assert (again.json["refund"]["id"], sandbox.calls("refund")) == (made["id"], 1)


def test_a_refund_that_was_never_made_stays_so_for_its_key(office: Office, sandbox: Sandbox) -> None:
    payment = paid(office.shop)
    sandbox.fault("refund", "lost-request", times=1)
    office.give_back(payment, "one", amount=20)
    age(office.shop, HOUR)
    seek(office.shop)
    assert statuses(office.shop) == ["not_made"]
    answer = office.give_back(payment, "one", amount=20)
    assert (answer.status_code, answer.json["code"]) == (422, "not_possible")
    assert "ask with a new Idempotency-Key" in answer.json["message"]
    assert sandbox.calls("refund") == 1


def test_a_repetition_while_the_first_request_waits_sends_nothing(office: Office, sandbox: Sandbox) -> None:
    payment = paid(office.shop)
    sandbox.fault("refund", "time-out", seconds=1, times=1)
    with meanwhile(lambda: office.give_back(payment, "one", amount=20)) as first:
        wait_until(lambda: sandbox.calls("refund"))
        assert office.give_back(payment, "one", amount=20).status_code == 202
    assert first().status_code == 201
    assert sandbox.calls("refund") == 1


def test_what_paystack_refuses_is_said_in_its_words(office: Office, sandbox: Sandbox) -> None:
    payment = paid(office.shop, customer_email="refund-refused@example.com")
    sandbox.fault("refund", "answer", times=1, status=400, body={"status": False, "message": "Balance too low"})
    answer = office.give_back(payment, "one", amount=20)
    assert (answer.status_code, answer.json["code"]) == (422, "provider_refused")
    assert answer.json["errors"] == {"amount": ["Balance too low"]}
    assert only_refund(office.shop)["status"] == "refused"
    again = office.give_back(payment, "one", amount=20)
    assert (again.json["code"], again.headers["idempotent-replayed"]) == ("provider_refused", "true")


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        ("much", "must be an amount such as 50 or 50.00"),
        ("1e1", "must be an amount such as 50 or 50.00"),
        (True, "must be an amount such as 50 or 50.00"),
        (0, "must be greater than 0"),
        (-1, "must be greater than 0"),
        ("1.001", "must have at most 2 decimals in NGN"),
    ],
)
def test_an_amount_that_is_none_is_refused(office: Office, amount: object, message: str) -> None:
    payment = paid(office.shop)
    answer = office.give_back(payment, "one", amount=amount)
    assert (answer.status_code, answer.json["errors"]) == (422, {"amount": [message]})
    assert refunds(office.shop) == []


def test_a_second_charge_is_given_back_by_its_reference(office: Office, sandbox: Sandbox) -> None:
    shop = office.shop
    payment = paid(shop)
    second = payment["reference"] + "-2"
    initialize_before(sandbox, second)
    shop.pay(second)
    assert incidents(shop) == ["second_charge"]
    made = office.give_back(payment, "one", reference=second).json["refund"]
    assert (made["reference"], made["amount"]) == (second, 50)
    settle(shop, sandbox, second)
    assert (incidents(shop), shop.get(payment["id"])["status"]) == ([], "completed")
    other = paid(shop)
    answer = office.give_back(payment, "two", reference=other["reference"])
    assert answer.json["errors"] == {"reference": ["must be a reference of this payment"]}


@pytest.mark.parametrize("paid_minor", [5000, 5075], ids=["the price", "the fees too"])
def test_money_that_came_after_a_cancel_is_seen_to_once_it_has_gone_back(
    office: Office, sandbox: Sandbox, paid_minor: int
) -> None:
    payment = office.shop.created()
    office.did(f"/payments/{payment['id']}/cancel")
    office.shop.pay(payment["reference"], amount=paid_minor)
    assert office.shop.get(payment["id"])["status"] == "completed"
    assert incidents(office.shop) == ["paid_after_cancel"]
    office.give_back(payment, "one")
    settle(office.shop, sandbox, payment["reference"])
    assert incidents(office.shop) == []


def test_more_than_is_left_and_what_was_never_paid_are_refused_in_words(office: Office) -> None:
    payment, unpaid = paid(office.shop), office.shop.created()
    answer = office.give_back(payment, "one", amount="50.01")
    assert (answer.status_code, answer.json["code"]) == (422, "not_possible")
    assert answer.json["message"] == f"Only NGN 50.00 of {payment['reference']} can still be given back."
    assert office.give_back(unpaid, "two").json["code"] == "not_possible"
    assert office.do(f"/payments/{payment['id']}/refunds", {"amount": 1}).json["code"] == "idempotency_key_required"


def test_the_command_and_the_api_know_of_each_others_refunds(office: Office, till: Till) -> None:
    payment = paid(office.shop)
    office.give_back(payment, "one", amount=20)
    assert "asked for already" in till.did("refund", payment["id"], "--amount", "20")
    till.did("refund", payment["id"], "--amount", "20", "--again")
    assert office.give_back(payment, "two", amount=20).json["code"] == "not_possible"
    assert "operator:admin" in till.did("show", payment["id"])


def test_a_provider_that_hangs_holds_no_more_refunds_than_there_are_slots(office: Office, sandbox: Sandbox) -> None:
    payment = paid(office.shop)
    slots = office.shop.app.office.slots
    taken = 0
    while slots.acquire(blocking=False):
        taken += 1
    try:
        assert office.give_back(payment, "one", amount=20).json["code"] == "busy"
    finally:
        for _ in range(taken):
            slots.release()
    assert (refunds(office.shop), sandbox.calls("refund")) == ([], 0)
