# ruff: noqa: F811  (fixtures are imported by their names)
"""The owner's stories at the desk in a real browser, with the real server, worker and provider's sandbox."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import segno
from playwright.sync_api import expect

from browsing import LOOKS, PHONE, chromium, new_payment  # noqa: F401
from office import ADMIN_TOKEN
from owner import Owner, new_owner, owner, paid, refunds_of, server, stored  # noqa: F401

HALF_AN_HOUR = 30 * 60 * 1000


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


def test_what_fits_no_more_goes_and_nothing_is_shown_twice(owner: Owner) -> None:
    made = [new_payment(owner.server, customer_email="mallory@example.com", amount=100 + n) for n in range(23)]
    owner.page.get_by_role("radio", name="Waiting").check(force=True)
    owner.finds("mallory@example.com")
    expect(owner.rows).to_have_count(20)
    owner.server.sandbox.pay(made[-1]["reference"])
    expect(owner.rows.first).to_contain_text("121.00")
    assert [text.split()[1] for text in owner.rows.all_inner_texts()] == [f"{n}.00" for n in range(121, 101, -1)]
    owner.press("More")
    expect(owner.rows).to_have_count(22)


def test_what_others_typed_is_shown_as_they_typed_it(owner: Owner) -> None:
    named = "<img src=x onerror=alert(1)><b>John</b>"
    payment = paid(owner.server, customer_name=named, metadata={"note": named})
    owner.opens(payment, "Paid")
    expect(owner.page.locator("dd", has_text=named)).to_have_count(2)
    assert owner.page.locator("main img").count() == 0


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
    expect(owner.dialog.get_by_role("heading")).to_be_focused()
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
