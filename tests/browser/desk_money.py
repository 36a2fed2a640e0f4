# ruff: noqa: F811  (fixtures are imported by their names)
"""The owner's stories of money at the desk in a real browser: refunds, what waits for a decision, the report."""

import csv
import re
from pathlib import Path

from playwright.sync_api import Route, expect

from browsing import chromium, new_payment  # noqa: F401
from office import ADMIN_TOKEN
from owner import Owner, new_owner, owner, paid, refunds_of, server, status_of  # noqa: F401
from shop import query, wait_until

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


def test_a_refund_that_failed_after_all_is_made_again(owner: Owner) -> None:
    payment = paid(owner.server)
    owner.opens(payment, "Paid")
    owner.asks_to("Refund…").get_by_role("button", name="Refund NGN").click()
    owner.hears("Refund of NGN\xa01,250.50.")
    owner.server.sandbox.move_refund(payment["reference"], "processed")
    expect(owner.heading).to_contain_text("Refunded")
    expect(owner.page.get_by_role("button", name="Refund…")).to_be_hidden()
    owner.server.sandbox.move_refund(payment["reference"], "failed")
    owner.asks_to("Refund…").get_by_role("button", name="Refund NGN 1,250.50").click()
    wait_until(lambda: refunds_of(owner.server, payment) == [125050, 125050])


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


def test_all_that_is_left_of_what_came_is_sent_back(owner: Owner) -> None:
    payment = new_payment(owner.server)
    owner.server.sandbox.alter(payment["reference"], requested_amount=200000)
    owner.server.sandbox.pay(payment["reference"], 200000)
    owner.opens(payment, "To decide")
    owner.server.sandbox.dashboard_refund(payment["reference"], 125050)
    owner.server.sandbox.move_refund(payment["reference"], "processed")
    expect(owner.page.get_by_text("refund of NGN 1,250.50").first).to_be_visible()
    dialog = owner.asks_to("Send back…")
    dialog.get_by_label("Reason").fill("All of it")
    dialog.get_by_role("button", name="Send it back").click()
    owner.hears("Refund of NGN\xa0749.50.")


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


def test_no_month_is_shown_or_downloaded_as_another(owner: Owner) -> None:
    paid(owner.server)
    owner.goes_to("Report")
    month, figures = owner.page.get_by_label("Month"), owner.page.locator("#figures")
    button = owner.page.get_by_role("button", name="Download CSV")
    expect(figures).to_contain_text("NGN")
    held: list[Route] = []

    def hold(route: Route) -> None:
        held.append(route)

    owner.page.route("**/report?*", hold)
    month.select_option(index=1)
    expect(figures).to_be_hidden()
    expect(button).to_be_disabled()
    wait_until(lambda: owner.page.evaluate("1") and held)
    month.select_option(index=0)
    wait_until(lambda: owner.page.evaluate("1") and len(held) >= 2)
    for route in reversed(held):  # the month that nobody asks for any more answers last
        with owner.page.expect_response("**/report?*") as answer:
            route.continue_()
        answer.value.finished()
        expect(figures).to_contain_text("NGN")
    expect(button).to_be_enabled()
    owner.page.unroute("**/report?*")
    owner.page.context.set_offline(True)
    month.select_option(index=1)
    owner.hears("No connection.")
    expect(figures).to_be_hidden()
    expect(button).to_be_disabled()
    owner.page.context.set_offline(False)
    expect(owner.page.get_by_text("No money moved in this month.")).to_be_visible()
