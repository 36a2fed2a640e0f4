# ruff: noqa: F811  (fixtures are imported by their names)
"""The owner's stories at the desk in a real browser, with the real server, worker and provider's sandbox."""

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import segno
from playwright.sync_api import Browser, Locator, Route, expect

from browsing import LOOKS, PHONE, Visitor, chromium, new_payment, serving  # noqa: F401
from office import ADMIN_TOKEN
from shop import Server, query, wait_until

HALF_AN_HOUR = 30 * 60 * 1000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, CURRENCIES="NGN,GHS,XOF", ADMIN_TOKEN=ADMIN_TOKEN) as server:
        yield server


class Owner(Visitor):
    def hear(self, message: Any) -> None:
        """A connection that a story breaks is told of too."""
        if "net::ERR_" not in message.text:
            super().hear(message)

    def enters(self, token: str = ADMIN_TOKEN) -> None:
        self.open("/desk")
        self.page.get_by_label("Your token").fill(token)
        self.press("Open the desk")

    def goes_to(self, name: str) -> None:
        self.page.get_by_role("navigation").get_by_role("link", name=re.compile(name)).click()
        expect(self.heading).to_be_focused()

    @property
    def heading(self) -> Locator:
        return self.page.locator("section:not([hidden]) h2")

    @property
    def dialog(self) -> Locator:
        return self.page.get_by_role("dialog")

    @property
    def rows(self) -> Locator:
        return self.page.locator("#list li")

    def field(self, name: str) -> Locator:
        return self.page.get_by_role("textbox", name=name, exact=True)

    def finds(self, text: str) -> None:
        self.page.get_by_label("Order, e-mail or reference").fill(text)
        self.press("Find")

    def opens(self, payment: dict[str, Any], status: str) -> None:
        """Its story, once it has this status."""
        self.open(f"/desk#payment={payment['id']}")
        expect(self.heading).to_contain_text(status)

    def asks_to(self, name: str) -> Locator:
        self.page.get_by_role("button", name=name).click()
        expect(self.dialog.get_by_role("heading")).to_be_focused()
        return self.dialog

    def hears(self, text: str) -> None:
        expect(self.page.locator("#said")).to_contain_text(text)


@pytest.fixture
def new_owner(chromium: Browser, server: Server) -> Iterator[Callable[..., Owner]]:
    owners: list[Owner] = []

    def new(**device: Any) -> Owner:
        owners.append(Owner(chromium, server, **device))
        return owners[-1]

    yield new
    for owner in owners:
        owner.page.context.close()
        assert owner.troubles == []


@pytest.fixture
def owner(new_owner: Callable[..., Owner]) -> Owner:
    """At the desk."""
    owner = new_owner(**PHONE, accept_downloads=True)
    owner.enters()
    expect(owner.heading).to_be_focused()
    return owner


def paid(server: Server, **order: Any) -> dict[str, Any]:
    payment = new_payment(server, **order)
    server.sandbox.pay(payment["reference"])
    wait_until(lambda: status_of(server, payment) != "pending")
    return payment


def status_of(server: Server, payment: dict[str, Any]) -> str:
    [row] = query(server.database_url, "SELECT status FROM payments WHERE id = %s", payment["id"])
    return str(row["status"])


def refunds_of(server: Server, payment: dict[str, Any]) -> list[int]:
    """What was asked of the provider, in hundredths."""
    ours = query(server.database_url, "SELECT amount_minor FROM refunds WHERE payment_id = %s", payment["id"])
    theirs = server.sandbox.refunds(payment["reference"])
    assert len(ours) == len(theirs)
    return [int(each["amount"]) for each in theirs]


def stored(owner: Owner) -> str:
    return str(owner.page.evaluate("JSON.stringify([sessionStorage, localStorage, document.cookie, location.href])"))


# The token


def test_a_wrong_token_opens_nothing_and_is_kept_nowhere(new_owner: Callable[..., Owner]) -> None:
    owner = new_owner(**PHONE)
    owner.enters("not-the-token-0123456789")
    expect(owner.page.get_by_role("alert")).to_contain_text("This is not the token")
    expect(owner.page.get_by_role("navigation")).to_be_hidden()
    owner.check("desk-wrong-token")
    assert "not-the-token" not in stored(owner)


def test_the_token_is_this_tabs_alone_until_its_owner_leaves(owner: Owner) -> None:
    payment = paid(owner.server, customer_name="Zebedee")
    owner.page.reload()
    expect(owner.rows.first).to_contain_text("Zebedee")
    assert ADMIN_TOKEN not in owner.page.evaluate("location.href + document.cookie + JSON.stringify(localStorage)")
    second = owner.page.context.new_page()
    second.goto(owner.server.url + "/desk")
    expect(second.get_by_label("Your token")).to_be_focused()
    owner.opens(payment, "Paid")
    owner.press("Leave")
    expect(owner.page.get_by_role("status")).to_contain_text("You have left")
    expect(owner.page.get_by_label("Your token")).to_have_value("")
    assert ADMIN_TOKEN not in stored(owner)
    assert "Zebedee" not in owner.page.content()


def test_half_an_hour_without_a_touch_ends_the_session(new_owner: Callable[..., Owner]) -> None:
    owner = new_owner(**PHONE)
    owner.page.clock.install()
    owner.enters()
    expect(owner.heading).to_be_focused()
    owner.page.clock.fast_forward(HALF_AN_HOUR - 60_000)
    owner.page.keyboard.press("Tab")
    owner.page.clock.fast_forward(HALF_AN_HOUR - 60_000)
    expect(owner.heading).to_be_visible()  # that touch counted
    owner.page.clock.fast_forward(61_000)
    expect(owner.page.get_by_role("status")).to_contain_text("Nothing was done for 30 minutes")
    assert ADMIN_TOKEN not in stored(owner)


def test_who_comes_back_after_that_half_hour_finds_nothing(new_owner: Callable[..., Owner]) -> None:
    owner = new_owner(**PHONE)
    owner.page.clock.install()
    owner.enters()
    expect(owner.heading).to_be_focused()
    owner.page.clock.pause_at("2050-01-01")  # asleep: no timer runs, and the first that happens is a touch
    owner.page.keyboard.press("Tab")
    expect(owner.page.get_by_role("status")).to_contain_text("Nothing was done for 30 minutes")
    assert ADMIN_TOKEN not in stored(owner)


def test_a_token_that_was_changed_meanwhile_is_forgotten(owner: Owner) -> None:
    server = owner.server
    server.stop()
    try:
        owner.hears("No connection. This page tries again by itself.")
        server.env["ADMIN_TOKEN"] = "another-token-0123456789"
        server.start()
        expect(owner.page.get_by_role("status")).to_contain_text("The server no longer takes this token")
        assert ADMIN_TOKEN not in stored(owner)
    finally:
        server.stop()
        server.env["ADMIN_TOKEN"] = ADMIN_TOKEN
        server.start()


def test_who_tries_too_often_is_told_how_long_to_wait(new_owner: Callable[..., Owner]) -> None:
    owner = new_owner(**PHONE)
    body = '{"status": "error", "code": "rate_limited", "message": "Too many.", "request_id": "x"}'
    owner.page.route("**/api/**", lambda route: route.fulfill(status=429, headers={"Retry-After": "20"}, body=body))
    owner.enters()
    expect(owner.page.get_by_role("alert")).to_contain_text("Wait 20 seconds, then try again.")


# Payments


def test_a_link_is_made_paid_and_seen_arriving(owner: Owner, new_owner: Callable[..., Owner]) -> None:
    page = owner.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate("navigator.share = async it => { window.shared = it; }")  # as phones have
    owner.goes_to("Link")
    owner.field("Amount").fill("18,500")
    owner.field("What for").fill("Ankara dress")
    owner.field("Order number").fill("2001")
    page.get_by_label("Can be paid").select_option("for a week")
    owner.press("Make the link")
    expect(page.get_by_role("heading", level=3, name="NGN 18,500.00")).to_be_focused()
    owner.check("desk-link")
    address = page.get_by_label("Payment link").input_value()
    assert address.startswith(
        owner.server.url + "/pay?amount=18500.00&currency=NGN&description=Ankara+dress&order=2001"
    )
    owner.press("Copy")
    owner.hears("The link is copied.")
    assert page.evaluate("navigator.clipboard.readText()") == address
    assert modules(owner) == [[bool(each) for each in row] for row in segno.make_qr(address).matrix_iter(border=4)]
    owner.press("Share")
    assert page.evaluate("window.shared.url") == address
    page.emulate_media(media="print")
    expect(page.get_by_role("img", name="The link as a QR code")).to_be_visible()
    expect(page.get_by_role("navigation")).to_be_hidden()
    page.emulate_media(media="screen")
    with page.expect_download() as download:
        owner.press("Save the QR code")
    assert download.value.suggested_filename == "payment-link-2001.png"
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")

    owner.goes_to("Payments")
    customer = new_owner(**PHONE)
    customer.open(address)
    for label, text in {"Your name": "Jane Doe", "E-mail": "jane@example.com", "Phone": "08012345678"}.items():
        customer.page.get_by_label(label).fill(text)
    customer.page.get_by_label("City or town").fill("Lagos")
    customer.press("Continue to payment")
    customer.sees_checkout()
    expect(owner.rows.first).to_contain_text(re.compile(r"NGN\s18,500.00\s+Waiting"))
    customer.press("Pay NGN 18,500.00")
    owner.hears("NGN\xa018,500.00, Jane Doe: Paid.")
    expect(owner.rows.first).to_contain_text("Order 2001")
    expect(owner.heading).to_be_focused()  # nothing was taken away from whoever reads
    owner.check("desk-payments")


def modules(owner: Owner) -> list[list[bool]]:
    """The QR code as it is on the screen: the dark ones among its modules of 8 pixels."""
    dark: list[list[bool]] = owner.page.get_by_role("img", name="The link as a QR code").evaluate(
        """canvas => {
            const {width} = canvas, places = [...Array(width / 8).keys()].map(n => 8 * n + 4);
            const {data} = canvas.getContext("2d").getImageData(0, 0, width, width);
            return places.map(y => places.map(x => data[4 * (y * width + x)] < 128));
        }"""
    )
    return dark


def test_a_payment_is_found_by_order_e_mail_and_reference(owner: Owner) -> None:
    payment = paid(owner.server, customer_email="zebedee@example.com", metadata={"order": "3001"})
    for text in ("3001", "ZEBEDEE@example.com", payment["reference"], payment["reference"].lower()):
        owner.finds(text)
        expect(owner.rows).to_have_count(1)
        expect(owner.rows).to_contain_text("zebedee@example.com")
    owner.page.get_by_role("radio", name="Waiting").check()
    expect(owner.page.get_by_text("No payment fits.")).to_be_visible()
    owner.page.get_by_role("radio", name="Paid").check()
    owner.rows.get_by_role("link").click()
    expect(owner.heading).to_contain_text("Paid")
    owner.page.go_back()
    expect(owner.rows.get_by_role("link")).to_be_focused()


def test_there_is_more_below_and_news_comes_above(owner: Owner) -> None:
    for n in range(25):
        new_payment(owner.server, customer_email="eve@example.com", amount=100 + n)
    owner.finds("eve@example.com")
    expect(owner.rows).to_have_count(20)
    owner.page.locator("#list").evaluate(
        "it => new MutationObserver(() => { window.most = Math.max(window.most ?? 0, it.childElementCount); })"
        ".observe(it, {childList: true})"
    )
    owner.page.get_by_role("button", name="More").evaluate("it => { it.click(); it.click(); }")  # before any answer
    expect(owner.rows).to_have_count(25)
    expect(owner.rows.nth(20).get_by_role("link")).to_be_focused()
    expect(owner.page.get_by_role("button", name="More")).to_be_hidden()
    new_payment(owner.server, customer_email="eve@example.com", amount=999)
    expect(owner.rows).to_have_count(26)
    expect(owner.rows.first).to_contain_text("999.00")
    expect(owner.rows.nth(21).get_by_role("link")).to_be_focused()
    assert owner.page.evaluate("window.most") == 26, "no payment was shown twice"


def test_what_others_typed_is_shown_as_they_typed_it(owner: Owner) -> None:
    named = "<img src=x onerror=alert(1)><b>John</b>"
    payment = paid(owner.server, customer_name=named, metadata={"note": named})
    owner.opens(payment, "Paid")
    expect(owner.page.locator("dd", has_text=named)).to_have_count(2)
    assert owner.page.locator("main img").count() == 0


# Money back


def test_a_part_is_given_back_and_arrives(owner: Owner) -> None:
    payment = paid(owner.server)
    owner.opens(payment, "Paid")
    dialog = owner.asks_to("Refund…")
    expect(dialog).to_contain_text("NGN\xa01,250.50 to John Doe, john@example.com.")
    dialog.get_by_label("Amount").fill("1,000.25")
    dialog.get_by_label("Reason").fill("One bag was torn")
    expect(dialog).to_contain_text("NGN\xa01,000.25 to John Doe, john@example.com.")
    owner.check("desk-refund")
    dialog.get_by_role("button", name="Refund NGN 1,000.25").click()
    owner.hears("Refund of NGN\xa01,000.25. On its way.")
    assert refunds_of(owner.server, payment) == [100025]
    expect(owner.page.get_by_role("button", name="Refund…")).to_be_focused()
    owner.server.sandbox.move_refund(payment["reference"], "processed")
    expect(owner.heading).to_contain_text("Partly refunded")
    expect(owner.page.get_by_text("One bag was torn").first).to_be_visible()
    owner.check("desk-story")
    expect(owner.asks_to("Refund…").get_by_label("Amount")).to_have_value("250.25")


def test_a_double_click_on_refund_makes_one(owner: Owner) -> None:
    payment = paid(owner.server)
    owner.server.sandbox.fault("refund", "slow", seconds=1)
    owner.opens(payment, "Paid")
    owner.asks_to("Refund…").get_by_role("button", name="Refund NGN").dblclick()
    owner.hears("Refund of NGN\xa01,250.50.")
    assert refunds_of(owner.server, payment) == [125050]
    expect(owner.page.get_by_role("button", name="Refund…")).to_be_hidden()


def test_a_refund_whose_answer_is_lost_stays_one_refund(owner: Owner) -> None:
    payment, page = paid(owner.server), owner.page
    owner.opens(payment, "Paid")

    def lose(route: Route) -> None:
        route.fetch()  # the server has made it
        route.abort()

    page.route("**/refunds", lambda route: lose(route) if route.request.method == "POST" else route.continue_())
    dialog = owner.asks_to("Refund…")
    dialog.get_by_label("Amount").fill("500")
    dialog.get_by_label("Reason").fill("Came too late")
    dialog.get_by_role("button", name="Refund NGN 500.00").click()
    expect(dialog.get_by_role("alert")).to_contain_text("No answer came. What you typed is still here")
    expect(dialog.get_by_label("Amount")).to_have_value("500")
    owner.check("desk-no-answer")
    page.unroute("**/refunds")
    page.reload()  # whatever its owner does before the next try
    dialog = owner.asks_to("Refund…")
    expect(dialog).to_contain_text("It was sent and has no answer yet. Send it again: it stays one refund.")
    expect(dialog.get_by_label("Amount")).to_have_value("500.00")
    expect(dialog.get_by_label("Amount")).not_to_be_editable()
    dialog.get_by_role("button", name="Refund NGN 500.00").click()
    owner.hears("Refund of NGN\xa0500.00.")
    assert refunds_of(owner.server, payment) == [50000]
    dialog = owner.asks_to("Refund…")  # the next one is another
    dialog.get_by_label("Amount").fill("500")
    dialog.get_by_role("button", name="Refund NGN 500.00").click()
    wait_until(lambda: refunds_of(owner.server, payment) == [50000, 50000])


def test_what_is_wrong_is_said_at_its_field_and_can_be_corrected(owner: Owner) -> None:
    payment = paid(owner.server)
    owner.opens(payment, "Paid")
    dialog = owner.asks_to("Refund…")
    amount, send = dialog.get_by_label("Amount"), dialog.locator("button").first
    amount.fill("1,50")
    send.click()
    expect(amount).to_be_focused()
    expect(amount).to_have_accessible_description(re.compile("Amount must be clear: write it like 1500 or 1,500.50"))
    amount.fill("1250.505")
    send.click()
    expect(amount).to_have_accessible_description(re.compile("Amount must be clear"))
    amount.fill("2000")
    send.click()
    expect(dialog.get_by_role("alert")).not_to_be_empty()  # what the server says
    assert refunds_of(owner.server, payment) == []
    amount.fill("1250.50")
    send.click()
    owner.hears("Refund of NGN\xa01,250.50.")
    assert refunds_of(owner.server, payment) == [125050]


def test_a_second_charge_is_given_back_whole(owner: Owner) -> None:
    payment = paid(owner.server)
    second = f"{payment['reference']}-2"
    owner.server.sandbox.charge_elsewhere(second, 130000)
    owner.opens(payment, "Paid")
    expect(owner.page.get_by_text("Paid a second time: NGN\xa01,300.00")).to_be_visible()
    owner.asks_to("Give it back…").get_by_role("button", name="Refund NGN 1,300.00").click()
    owner.hears("Refund of NGN\xa01,300.00.")
    assert [each["amount"] for each in owner.server.sandbox.refunds(second)] == [130000]
    assert owner.server.sandbox.refunds(payment["reference"]) == []


def test_a_payment_is_cancelled_once_its_owner_is_sure(owner: Owner) -> None:
    payment = new_payment(owner.server)
    owner.opens(payment, "Waiting")
    dialog = owner.asks_to("Cancel…")
    expect(dialog).to_contain_text("NGN\xa01,250.50, asked of John Doe, john@example.com.")
    dialog.get_by_role("button", name="Keep it").click()
    expect(owner.page.get_by_role("button", name="Cancel…")).to_be_focused()
    owner.asks_to("Cancel…").get_by_role("button", name="Cancel the payment").click()
    owner.hears("The payment is cancelled.")
    expect(owner.heading).to_contain_text("Cancelled")
    expect(owner.heading).to_be_focused()  # the button that had it is gone
    assert owner.server.request("GET", f"/api/v1/payments/{payment['id']}").json["payment"]["checkout_url"] is None


def test_the_links_of_an_order_are_withdrawn(owner: Owner) -> None:
    owner.goes_to("Link")
    owner.field("Amount").fill("500")
    owner.field("Order number").fill("4001")
    owner.press("Make the link")
    address = owner.page.get_by_label("Payment link").input_value()
    owner.field("Its order number").fill("4001")
    owner.asks_to("Withdraw").get_by_role("button", name="Withdraw").click()
    owner.hears("Withdrawn: nobody can pay by a link of this order any more.")
    owner.page.context.clear_cookies()
    assert owner.server.request("GET", address.removeprefix(owner.server.url)).status_code == 410


# What waits for a decision


def test_money_that_is_not_the_price_is_accepted(owner: Owner) -> None:
    payment = paid(owner.server, customer_email="underpaid@example.com")
    owner.goes_to("To decide")
    owner.page.locator("#reviews li", has_text="underpaid@example.com").first.get_by_role("link").click()
    dialog = owner.asks_to("Accept…")
    expect(dialog).to_contain_text("NGN\xa01,249.50 from John Doe, underpaid@example.com.")
    dialog.get_by_role("button", name="Accept").click()
    expect(dialog.get_by_label("Reason")).to_have_accessible_description(re.compile("Reason is required"))
    dialog.get_by_label("Reason").fill("The rest was paid in cash")
    dialog.get_by_role("button", name="Accept").click()
    owner.hears("Accepted: it is paid.")
    expect(owner.heading).to_contain_text("Paid")
    assert status_of(owner.server, payment) == "completed"


def test_money_that_is_not_the_price_is_sent_back(owner: Owner) -> None:
    payment = paid(owner.server, customer_email="underpaid@example.com")
    owner.opens(payment, "To decide")
    dialog = owner.asks_to("Send back…")
    dialog.get_by_label("Reason").fill("Not what was agreed")
    dialog.get_by_role("button", name="Send it back").click()
    owner.hears("Refund of NGN\xa01,249.50. On its way.")
    assert refunds_of(owner.server, payment) == [124950]


def test_an_incident_is_closed_with_a_reason(owner: Owner) -> None:
    reference = "PG-" + "9" * 26
    owner.server.sandbox.charge_elsewhere(reference)
    wait_until(lambda: query(owner.server.database_url, "SELECT id FROM incidents WHERE subject = %s", reference))
    owner.goes_to("To decide")
    card = owner.page.locator(".card", has_text=reference)
    expect(card).to_contain_text("Unknown reference")
    owner.check("desk-decide")
    card.get_by_role("button", name="Close…").click()
    owner.dialog.get_by_label("What was done").fill("It was a test")
    owner.dialog.get_by_role("button", name="Close it").click()
    owner.hears("Closed.")
    expect(card).to_have_count(0)
    [row] = query(owner.server.database_url, "SELECT * FROM incidents WHERE subject = %s", reference)
    assert (row["closed_by"], row["close_reason"]) == ("operator:admin", "It was a test")


# The report


def test_the_months_report_is_shown_and_downloaded(owner: Owner) -> None:
    paid(owner.server, location='=1+1, "Lagos"', currency="GHS", amount="1234.50")
    paid(owner.server, currency="XOF", amount=5000)
    owner.goes_to("Report")
    figures = owner.page.locator("#figures")
    expect(figures.get_by_role("heading", name="GHS")).to_be_visible()
    expect(figures.get_by_role("img").first).to_be_visible()
    expect(figures).to_contain_text("1,234.50")
    owner.check("desk-report")
    with owner.page.expect_download() as download:
        owner.press("Download CSV")
    with Path(download.value.path()).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    told = owner.server.request("GET", "/api/v1/report", headers=headers)
    assert len(rows) == len(told.json["report"]["rows"])
    totals = {row["currency"]: row["gross"] for row in rows if row["by"] == "total"}
    assert (totals["GHS"], totals["XOF"]) == ("1234.50", "5000")
    assert '\'=1+1, "Lagos"' in [row["key"] for row in rows if row["by"] == "location"]
    owner.page.get_by_label("Month").select_option(index=20)
    expect(owner.page.get_by_text("No money moved in this month.")).to_be_visible()
    expect(owner.page.get_by_role("button", name="Download CSV")).to_be_disabled()


# However it is used


def test_without_a_connection_what_was_typed_stays(owner: Owner) -> None:
    owner.goes_to("Link")
    owner.field("Amount").fill("700")
    owner.field("What for").fill("Two hats")
    owner.page.context.set_offline(True)
    owner.press("Make the link")
    expect(owner.page.get_by_role("alert")).to_contain_text("check your connection, then try again")
    owner.page.context.set_offline(False)
    expect(owner.field("What for")).to_have_value("Two hats")
    owner.press("Make the link")
    expect(owner.page.get_by_role("heading", name="NGN 700.00")).to_be_visible()


def test_a_refund_with_the_keyboard_alone(new_owner: Callable[..., Owner]) -> None:
    owner = new_owner()
    payment = paid(owner.server, metadata={"order": "5001"})
    keyboard, focused = owner.page.keyboard, owner.page.locator(":focus")

    def tab_to(name: str) -> None:
        for _ in range(30):
            keyboard.press("Tab")
            if name in (focused.inner_text() or focused.get_attribute("id") or ""):
                outline = focused.evaluate("it => getComputedStyle(it).outlineStyle")
                assert outline == "solid", f"{name} does not show that it has the focus"
                return
        raise AssertionError(f"no way to {name}")

    owner.open("/desk")
    keyboard.type(ADMIN_TOKEN)
    keyboard.press("Enter")
    expect(owner.heading).to_be_focused()
    tab_to("sought")
    keyboard.type("5001")
    keyboard.press("Enter")
    expect(owner.rows).to_have_count(1)
    tab_to("Order 5001")
    keyboard.press("Enter")
    expect(owner.heading).to_contain_text("Paid")
    tab_to("Refund…")
    keyboard.press("Enter")
    expect(owner.dialog.get_by_role("heading")).to_be_focused()
    keyboard.press("Escape")
    expect(owner.dialog).to_be_hidden()
    expect(focused).to_have_text("Refund…")
    keyboard.press("Enter")
    tab_to("refund-amount")
    keyboard.press("Control+A")
    keyboard.type("50")
    keyboard.press("Enter")
    owner.hears("Refund of NGN\xa050.00.")
    expect(focused).to_have_text("Refund…")
    assert refunds_of(owner.server, payment) == [5000]


@pytest.mark.parametrize("look", LOOKS)
def test_all_of_the_desk_can_be_read_however_it_is_looked_at(new_owner: Callable[..., Owner], look: str) -> None:
    owner = new_owner(**LOOKS[look])
    server = owner.server
    payment = paid(server, metadata={"order": "6001", "colour": "blue"})
    review = paid(server, customer_email="underpaid@example.com")
    server.sandbox.charge_elsewhere(f"{payment['reference']}-2", 125050)
    server.sandbox.charge_elsewhere()
    owner.open("/desk")
    owner.check(f"{look}-desk-enter")
    owner.enters()
    expect(owner.rows.first).to_be_visible()
    owner.check(f"{look}-desk-payments")
    owner.opens(payment, "Paid")
    owner.check(f"{look}-desk-payment")
    owner.asks_to("Refund…")
    owner.check(f"{look}-desk-refund")
    owner.opens(review, "To decide")
    owner.asks_to("Accept…")
    owner.check(f"{look}-desk-accept")
    owner.open("/desk#payments")
    for name in ("To decide", "Link", "Report"):
        owner.goes_to(name)
        owner.page.wait_for_load_state("networkidle")
        owner.check(f"{look}-desk-{name.lower().replace(' ', '-')}")


def test_the_home_page_leads_to_the_desk(new_owner: Callable[..., Owner]) -> None:
    owner = new_owner(**PHONE)
    owner.open("/")
    owner.press("For the shop’s owner: the desk")
    owner.sees("The desk of Example Shop")
