# ruff: noqa: F811  (fixtures are imported by their names)
"""The back office over HTTP: who may, lists, cancels, reviews, incidents, links and the report."""

import csv
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from falcon.inspect import inspect_routes

import charges
import money
from backstage import end_time, make_due, meanwhile, poll, second_of_two, worker_of
from customer import form, get, payment_page, send, went_to
from invariants import check_books
from local.sandbox import Sandbox
from merchant import Merchant, merchant  # noqa: F401  # a fixture
from money_back import incidents, settle
from office import ADMIN_TOKEN, API, PAYMENTS, Office, ids, office  # noqa: F401  # a fixture
from shop import LIVE, ORDER, UNKNOWN_ID, Shop, open_shop, sandbox, shop, wait_until  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures
from web import office as back_office

PATHS = (
    ("GET", "/payments"),
    ("POST", f"/payments/{UNKNOWN_ID}/refunds"),
    ("GET", f"/payments/{UNKNOWN_ID}/refunds"),
    ("GET", f"/payments/{UNKNOWN_ID}/refunds/RF-{'0' * 26}"),
    ("POST", f"/payments/{UNKNOWN_ID}/cancel"),
    ("POST", f"/payments/{UNKNOWN_ID}/resolve"),
    ("GET", f"/payments/{UNKNOWN_ID}/events"),
    ("GET", "/incidents"),
    ("POST", "/incidents/1/close"),
    ("POST", "/links"),
    ("POST", "/links/withdraw"),
    ("GET", "/report"),
)


def ask(shop: Shop, method: str, path: str, token: str | None = None) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    answer = shop.client.simulate_request(method, API + path, headers=headers)
    return answer.status_code, answer.json.get("code", "")


# Who may


def test_every_path_of_the_back_office_is_in_the_list_above(office: Office) -> None:
    names = {UNKNOWN_ID: "{payment_id}", f"RF-{'0' * 26}": "{refund_id}", "/1/": "/{number:int}/"}
    routes = {API + path for _, path in PATHS}
    for value, name in names.items():
        routes = {path.replace(value, name) for path in routes}
    resources = {each.__name__ for each in back_office.Resource.__subclasses__()}
    of_the_owner = {each.path for each in inspect_routes(office.shop.app) if each.class_name in resources}
    assert len(of_the_owner) == len(resources)
    assert routes == {f"{API}/payments", *of_the_owner}


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_without_a_token_set_the_back_office_says_what_to_set(shop: Shop, method: str, path: str) -> None:
    assert ask(shop, method, path, ADMIN_TOKEN) == (403, "token_required")


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize("token", [None, "another-token-0123456789", "the-till's-token-0123456789"])
def test_only_the_owners_token_opens_the_back_office(
    open_shop: Callable[..., Shop], method: str, path: str, token: str | None
) -> None:
    shop = open_shop(ADMIN_TOKEN=ADMIN_TOKEN, API_TOKEN="the-till's-token-0123456789")
    assert ask(shop, method, path, token) == (401, "unauthorized")


def test_guesses_of_the_token_are_limited(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(ADMIN_TOKEN=ADMIN_TOKEN, RATE_LIMIT="3/hour")
    answers = [ask(shop, "GET", "/payments", f"guess-{n}")[0] for n in range(5)]
    assert answers == [401, 401, 401, 429, 429]
    assert Office(shop).ask("/payments").status_code == 200  # whoever has it is not counted


@pytest.mark.parametrize("token", [None, "a-wrong-token-0123456789"])
def test_where_payments_are_opened_with_a_token_they_are_read_with_one(
    open_shop: Callable[..., Shop], token: str | None
) -> None:
    till_token = "the-till's-token-0123456789"
    shop = open_shop(ADMIN_TOKEN=ADMIN_TOKEN, API_TOKEN=till_token)
    payment = shop.create(headers={"Authorization": f"Bearer {till_token}"}).json["payment"]
    path = f"/payments/{payment['id']}"
    assert ask(shop, "GET", path, token) == (401, "unauthorized")
    assert [ask(shop, "GET", path, each)[0] for each in (till_token, ADMIN_TOKEN)] == [200, 200]
    assert shop.client.simulate_get(f"/pay/{payment['id']}").status_code == 200


# Lists


def test_payments_are_listed_newest_first_with_what_the_owner_may_see(office: Office) -> None:
    made = [office.shop.created(customer_name=name, metadata={"order": name}) for name in ("a", "b", "c")]
    listed = office.asked("/payments")
    assert (ids(listed), listed["next"]) == ([payment["id"] for payment in reversed(made)], None)
    (first, *_) = listed["payments"]
    others = {"customer_phone": "+2348012345678", "location": "Lagos", "metadata": {"order": "c"}, "cancelled_at": None}
    assert first == {**made[-1], **others}


def test_pages_hold_each_payment_once_though_all_came_at_one_moment(office: Office) -> None:
    made = {office.shop.created()["id"] for _ in range(7)}
    with_equal_times(office.shop)
    seen: list[str] = []
    page: dict[str, Any] = {"next": None}
    for _ in range(4):
        page = office.asked("/payments", limit=2, **({"after": page["next"]} if page["next"] else {}))
        seen += ids(page)
    assert (len(seen), set(seen), page["next"]) == (7, made, None)


def with_equal_times(shop: Shop) -> None:
    shop.sql("ALTER TABLE payments DISABLE TRIGGER USER")
    shop.sql("UPDATE payments SET created_at = '2026-01-31 12:00Z', expires_at = '2026-02-01'")
    shop.sql("ALTER TABLE payments ENABLE TRIGGER USER")


def test_a_list_is_filtered_by_each_of_its_filters(office: Office) -> None:
    shop = office.shop
    plain = shop.created(customer_email="One@Example.com")
    ordered = shop.created(metadata={"order": "1002"})
    money = paid(shop)
    back = paid(shop)
    shop.sandbox.dashboard_refund(back["reference"], 1000)
    settle(shop, shop.sandbox, back["reference"])
    review = paid(shop, customer_email="underpaid@example.com")
    newest_first = [review, back, money, ordered, plain]

    def found(**filters: object) -> list[dict[str, Any]]:
        listed = ids(office.asked("/payments", **filters))
        return [payment for payment in newest_first if payment["id"] in listed]

    assert found(status="pending") == [ordered, plain]
    assert found(status="completed") == [money]
    assert found(status="partially_refunded") == [back]
    assert found(status="review") == [review]
    assert found(status="paid") == [back, money]
    assert found(status="refunded") == found(status="failed") == found(status="expired") == []
    assert found(email="one@example.com") == [plain]
    assert found(order="1002") == [ordered]
    assert found(reference=money["reference"]) == found(reference=money["reference"] + "-3") == [money]
    assert found(since="2026-01-01") == newest_first
    assert found(until="2026-01-01") == []
    assert found(status="pending", order="1002", email=ORDER["customer_email"]) == [ordered]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("status", "lost", "must be one of pending, failed, expired"),
        ("limit", "0", "must be a whole number from 1 to 100"),
        ("limit", "101", "must be a whole number from 1 to 100"),
        ("limit", "ten", "must be a whole number from 1 to 100"),
        ("after", UNKNOWN_ID, "must be the `next` of an earlier page"),
        ("since", "yesterday", "must be a date such as"),
        ("until", "0001-01-01T00:00:00+14:00", "must be a date such as"),
        ("colour", "red", "is not a field here"),
        *((name, empty, "must not be empty") for name in ("status", "order", "email", "since") for empty in ("", " ")),
    ],
)
def test_a_wrong_filter_is_named(office: Office, name: str, value: str, message: str) -> None:
    answer = office.ask("/payments", **{name: value})
    assert (answer.status_code, answer.json["code"]) == (422, "invalid_fields")
    assert answer.json["errors"][name][0].startswith(message)


def test_a_filter_that_comes_twice_is_named(office: Office) -> None:
    answer = office.shop.client.simulate_get(f"{PAYMENTS}?status=paid&status=review", headers=office.headers)
    assert answer.json["errors"] == {"status": ["must be a string"]}


def test_payments_of_the_other_mode_are_not_there(office: Office, open_shop: Callable[..., Shop]) -> None:
    payment = paid(office.shop)
    live = Office(open_shop(ADMIN_TOKEN=ADMIN_TOKEN, **LIVE))
    assert live.asked("/payments")["payments"] == []
    path = f"/payments/{payment['id']}"
    assert live.ask(f"{path}/events").status_code == live.ask(f"{path}/refunds").status_code == 404
    assert live.refused(f"{path}/cancel") == (404, "not_found")


# Cancel


def test_a_cancelled_order_gives_out_no_checkout_and_ends_at_the_next_poll(office: Office) -> None:
    shop = office.shop
    answer = shop.create(key="order-1")
    payment = answer.json["payment"]
    cancelled = office.did(f"/payments/{payment['id']}/cancel", {"by": "ada"})["payment"]
    assert (cancelled["status"], cancelled["checkout_url"]) == ("pending", None)
    assert cancelled["cancelled_at"] is not None
    assert shop.create(key="order-1").json["payment"]["checkout_url"] is None
    assert "checkout.paystack.com" not in shop.client.simulate_get(f"/pay/{payment['id']}").text
    assert office.did(f"/payments/{payment['id']}/cancel")["payment"] == cancelled  # repeated
    worker_of(shop).poll()
    assert shop.get(payment["id"])["status"] == "expired"
    rows = shop.sql("SELECT actor, why FROM payment_events ORDER BY id")
    assert [(row["actor"], row["why"]) for row in rows[-2:]] == [("operator:ada", "cancelled"), ("worker", "time_over")]
    check_books(shop.database_url)


@pytest.mark.parametrize("ended", [False, True])
def test_money_that_comes_after_a_cancel_counts_opens_an_incident_and_is_told(
    open_shop: Callable[..., Shop], merchant: Merchant, ended: bool
) -> None:
    shop = open_shop(ADMIN_TOKEN=ADMIN_TOKEN, **merchant.settings)
    payment = shop.created()
    Office(shop).did(f"/payments/{payment['id']}/cancel")
    if ended:
        poll(shop)
    shop.pay(payment["reference"])
    assert shop.get(payment["id"])["status"] == "completed"
    assert incidents(shop) == ["paid_after_cancel"]
    types = [row["type"] for row in shop.sql("SELECT type FROM notifications ORDER BY made_at")]
    assert types[-2:] in (["payment.completed", "incident.opened"], ["incident.opened", "payment.completed"])


def test_what_is_paid_cannot_be_cancelled(office: Office) -> None:
    payment = paid(office.shop)
    assert office.refused(f"/payments/{payment['id']}/cancel") == (422, "not_possible")
    assert office.asked(f"/payments/{payment['id']}/events")["events"]
    assert office.shop.sql("SELECT cancelled_at FROM payments") == [{"cancelled_at": None}]


def test_a_checkout_that_opens_while_its_order_is_cancelled_is_not_given_out(office: Office, sandbox: Sandbox) -> None:
    shop = office.shop
    sandbox.fault("initialize", "time-out", seconds=1, times=1)
    with meanwhile(lambda: shop.create(key="slow")) as answer:
        wait_until(lambda: sandbox.calls("initialize"))
        (row,) = shop.sql("SELECT id FROM payments")
        office.did(f"/payments/{row['id']}/cancel")
    assert answer().status_code in (201, 422)
    assert shop.get(row["id"])["checkout_url"] is None


# Reviews and incidents


def test_a_review_is_accepted(office: Office) -> None:
    payment = paid(office.shop, customer_email="underpaid@example.com")
    body = {"decision": "accept", "reason": "the rest came in cash", "by": "ada"}
    assert office.did(f"/payments/{payment['id']}/resolve", body)["payment"]["status"] == "completed"
    assert office.did(f"/payments/{payment['id']}/resolve", body)["payment"]["status"] == "completed"  # repeated
    assert office.refused(f"/payments/{payment['id']}/resolve", {**body, "by": "eve"}) == (422, "not_possible")
    assert office.shop.sql("SELECT accepted_by FROM payments") == [{"accepted_by": "operator:ada"}]


def test_a_review_is_rejected_and_its_charge_goes_back_once(office: Office, sandbox: Sandbox) -> None:
    payment = paid(office.shop, customer_email="underpaid@example.com")
    path, body = f"/payments/{payment['id']}/resolve", {"decision": "reject", "reason": "wrong sum"}
    first = office.did(path, body, status=201)["refund"]
    assert office.did(path, body, status=201)["refund"]["id"] == first["id"]
    assert sandbox.calls("refund") == 1
    assert (first["made_by"], first["reason"]) == ("operator:admin", "wrong sum")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"reason": "x"}, "decision"),
        ({"decision": "maybe", "reason": "x"}, "decision"),
        ({"decision": "accept"}, "reason"),
        ({"decision": "accept", "reason": "x", "by": "a\nb"}, "by"),
        ({"decision": "accept", "reason": "x", "why": "y"}, "why"),
    ],
)
def test_a_decision_that_is_not_whole_changes_nothing(office: Office, body: dict[str, Any], field: str) -> None:
    payment = paid(office.shop, customer_email="underpaid@example.com")
    answer = office.do(f"/payments/{payment['id']}/resolve", body)
    assert (answer.status_code, list(answer.json["errors"])) == (422, [field])
    assert office.shop.get(payment["id"])["status"] == "review"


def test_incidents_are_listed_and_closed_by_name(office: Office) -> None:
    payment = paid(office.shop, customer_email="underpaid@example.com")
    (incident,) = office.asked("/incidents")["incidents"]
    assert (incident["kind"], incident["payment"], incident["closed_at"]) == ("mismatch", payment["id"], None)
    assert f"{payment['id']} is not its price: accept it, or reject it" in incident["what_to_do"]
    closed = office.did(f"/incidents/{incident['id']}/close", {"reason": "seen to it", "by": "ada"})["incident"]
    assert (closed["closed_by"], closed["close_reason"]) == ("operator:ada", "seen to it")
    assert office.refused(f"/incidents/{incident['id']}/close", {"reason": "again"}) == (422, "not_possible")
    assert office.asked("/incidents")["incidents"] == []
    assert office.asked("/incidents", status="all")["incidents"] == [closed]


def test_an_incident_that_is_not_there_or_of_the_other_mode_is_not_found(
    office: Office, open_shop: Callable[..., Shop]
) -> None:
    paid(office.shop, customer_email="underpaid@example.com")
    (incident,) = office.asked("/incidents")["incidents"]
    body = {"reason": "seen to it"}
    live = Office(open_shop(ADMIN_TOKEN=ADMIN_TOKEN, **LIVE))
    assert live.refused(f"/incidents/{incident['id']}/close", body) == (404, "not_found")
    for number in (incident["id"] + 1, 0, -1, 10**30):
        assert office.refused(f"/incidents/{number}/close", body) == (404, "not_found")
    assert office.asked("/incidents")["incidents"] == [incident]


def test_incidents_come_in_pages(office: Office) -> None:
    for n in range(5):
        office.shop.sql(
            "INSERT INTO incidents (mode, kind, subject) VALUES ('test', 'unknown_reference', %s)", f"PG-{n}"
        )
    first = office.asked("/incidents", limit=3)
    second = office.asked("/incidents", limit=3, after=first["next"])
    subjects = [incident["subject"] for incident in first["incidents"] + second["incidents"]]
    assert (subjects, second["next"]) == ([f"PG-{n}" for n in (4, 3, 2, 1, 0)], None)


def test_a_payments_events_are_what_show_tells(office: Office, till: Till) -> None:
    payment = paid(office.shop)
    office.give_back(payment, "back", amount=10, reason="one item")
    told = office.asked(f"/payments/{payment['id']}/events")["events"]
    assert told == json.loads(till.did("show", payment["id"], "--json"))["timeline"]
    assert "refund" in [each["what"] for each in told]


# Links


def test_a_link_is_made_shared_and_paid_once(office: Office) -> None:
    body = {"amount": 75, "description": "A hat", "order": "1001", "expires_in": 3600, "qr": True}
    made = office.did("/links", body, status=201)["link"]
    assert (made["amount"], made["currency"], made["order"]) == (75, "NGN", "1001")
    assert made["qr_svg"].startswith("<svg")
    query = made["url"].partition("?")[2]
    page = form(office.shop, query)
    assert page.heading == "NGN\u00a075.00"
    assert send(office.shop, page).status_code == 303
    (payment,) = office.asked("/payments", order="1001")["payments"]
    assert (payment["amount"], payment["status"]) == (75, "pending")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "amount"),
        ({"amount": 49}, "amount"),
        ({"amount": "75.001"}, "amount"),
        ({"amount": 75, "currency": "EUR"}, "currency"),
        ({"amount": 75, "order": ""}, "order"),
        ({"amount": 75, "expires_in": 5}, "expires_in"),
        ({"amount": 75, "expires_in": "3600"}, "expires_in"),
        ({"amount": 75, "qr": "yes"}, "qr"),
        ({"amount": 75, "qr": True, "order": "é" * 500}, "qr"),
        ({"amount": 75, "orders": "1"}, "orders"),
    ],
)
def test_a_link_nobody_could_pay_is_not_made(office: Office, body: dict[str, Any], field: str) -> None:
    answer = office.do("/links", body)
    assert (answer.status_code, list(answer.json["errors"])) == (422, [field])


def test_a_withdrawn_link_takes_no_payment(office: Office, till: Till) -> None:
    shop = office.shop
    query = office.did("/links", {"amount": 75, "order": "1001"}, status=201)["link"]["url"].partition("?")[2]
    send(shop, form(shop, query))
    (pending,) = office.did("/links/withdraw", {"order": "1001"})["payments"]
    assert (pending["status"], pending["checkout_url"]) == ("pending", None)
    assert office.did("/links/withdraw", {"order": "1001"})["payments"] == [pending]  # repeated
    assert get(shop, f"/pay?{query}").status_code == 410
    make_due(shop.database_url)
    poll(shop)
    assert get(shop, f"/pay?{query}").status_code == 410
    assert office.refused("/links", {"amount": 75, "order": "1001"}) == (422, "not_possible")
    assert "withdrawn" in till.run("link", "--amount", "75", "--order", "1001").err
    assert office.did("/links", {"amount": 75, "order": "1002"}, status=201)


def test_a_payment_that_comes_while_links_are_withdrawn_leaves_no_other_one_open(office: Office) -> None:
    shop = office.shop
    for amount in (75, 80):  # a corrected price: two payments of one order
        made = office.did("/links", {"amount": amount, "order": "1001"}, status=201)["link"]
        send(shop, form(shop, made["url"].partition("?")[2]))
    first, second = shop.sql("SELECT id, reference, amount_minor FROM payments ORDER BY created_at")
    charge = money.Charge(first["reference"], "test", None, first["amount_minor"], None, None, "NGN", None, None)
    withdrawn = second_of_two(
        shop,
        lambda database: database.transaction(charges.apply_charge, charge, "webhook"),
        lambda _: office.did("/links/withdraw", {"order": "1001"}),
    )
    assert [payment["id"] for payment in withdrawn["payments"]] == [second["id"]]
    assert shop.get(second["id"])["checkout_url"] is None


def test_a_cancelled_order_is_not_paid_by_its_link(office: Office) -> None:
    shop = office.shop
    query = office.did("/links", {"amount": 75, "order": "1001"}, status=201)["link"]["url"].partition("?")[2]
    page = form(shop, query)
    send(shop, page)
    (payment,) = office.asked("/payments", order="1001")["payments"]
    office.did(f"/payments/{payment['id']}/cancel")
    for _ in range(2):  # before it ends, and afterwards
        assert went_to(get(shop, "/pay", query)) == went_to(send(shop, page)) == f"/pay/{payment['id']}"
        assert payment_page(shop, payment).heading == "This order was cancelled"
        poll(shop)
    assert len(office.asked("/payments", order="1001")["payments"]) == 1
    corrected = office.did("/links", {"amount": 80, "order": "1001"}, status=201)["link"]["url"].partition("?")[2]
    send(shop, form(shop, corrected))
    assert len(office.asked("/payments", order="1001")["payments"]) == 2


def test_a_withdrawn_link_still_shows_the_receipt_of_what_was_paid(office: Office) -> None:
    shop = office.shop
    query = office.did("/links", {"amount": 75, "order": "1001"}, status=201)["link"]["url"].partition("?")[2]
    send(shop, form(shop, query))
    (payment,) = office.asked("/payments", order="1001")["payments"]
    shop.pay(payment["reference"])
    assert office.did("/links/withdraw", {"order": "1001"})["payments"] == []
    assert get(shop, f"/pay?{query}").status_code == 303


def test_a_link_that_is_withdrawn_while_its_checkout_opens_leads_nowhere(office: Office, sandbox: Sandbox) -> None:
    shop = office.shop
    query = office.did("/links", {"amount": 75, "order": "1001"}, status=201)["link"]["url"].partition("?")[2]
    page = form(shop, query)
    sandbox.fault("initialize", "time-out", seconds=1, times=1)
    with meanwhile(lambda: send(shop, page)) as answer:
        wait_until(lambda: sandbox.calls("initialize"))
        # Only the mark: as if the search for its payments had come just before this one was reserved.
        shop.sql("INSERT INTO withdrawn_orders VALUES ('test', sha256(convert_to('1001', 'UTF8')), 'operator:admin')")
    assert answer().status_code == 410
    (payment,) = office.asked("/payments", order="1001")["payments"]
    assert payment["cancelled_at"] is not None


# The report


def test_the_report_is_that_of_the_command(office: Office, till: Till) -> None:
    payment = paid(office.shop)
    office.give_back(payment, "back", amount=10)
    settle(office.shop, office.shop.sandbox, payment["reference"])
    told = office.asked("/report")["report"]
    rows = list(csv.DictReader(io.StringIO(till.did("report", "--format", "csv"))))
    assert (told["mode"], told["timezone"], len(told["rows"])) == ("test", "UTC", len(rows))
    for row, line in zip(told["rows"], rows, strict=True):
        assert {name: float(line[name]) for name in ("gross", "fees", "refunds", "net", "payments")} == {
            name: row[name] for name in ("gross", "fees", "refunds", "net", "payments")
        }
    assert office.ask("/report", since="2026-02", until="2026-01").json["errors"] == {"since": ["must be before until"]}
    assert office.asked("/report", since="2020-01", until="2020-02")["report"]["rows"] == []


# The time of a payment


@pytest.mark.parametrize("seconds", [59, 86401, "soon", "60", 60.5, -60, True])
def test_a_payment_ends_after_a_minute_at_least_and_within_the_usual_time(shop: Shop, seconds: object) -> None:
    answer = shop.create(expires_in=seconds)
    assert (answer.status_code, answer.json["errors"]) == (
        *(422, {"expires_in": ["must be a whole number from 60 to 86400"]}),
    )


def test_a_payment_ends_when_its_order_says(shop: Shop) -> None:
    created = shop.create(key="short", expires_in=60)
    (row,) = shop.sql("SELECT extract(epoch FROM expires_at - created_at)::float8 AS seconds FROM payments")
    assert 59 < row["seconds"] < 61
    assert shop.create(key="short", expires_in=60).json["payment"]["id"] == created.json["payment"]["id"]
    assert shop.create(key="short", expires_in=61).json["code"] == "idempotency_key_reused"
    end_time(shop.database_url, created.json["payment"]["id"])
    poll(shop)
    assert shop.get(created.json["payment"]["id"])["status"] == "expired"
