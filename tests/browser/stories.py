# ruff: noqa: F811  (fixtures are imported by their names)
"""The customer's stories in a real browser, with the real server, worker and provider's sandbox: `make browser`."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect
from psycopg.conninfo import conninfo_to_dict

from backstage import end_time, make_due
from browsing import LOOKS, PHONE, Visitor, chromium, file_name, new_payment, serving, visitors  # noqa: F401
from shop import Server, query, wait_until
from web.links import Link

TYPED = {"Amount": "1250.50", "Your name": "John Doe", "E-mail": "john@example.com", "Phone": "0801 234 5678"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), CURRENCIES="NGN,GHS,KES,ZAR,USD,XOF") as server:
        yield server


@pytest.fixture
def new_customer(chromium: Browser, server: Server) -> Iterator[Callable[..., "Customer"]]:
    yield from visitors(Customer, chromium, server)


@pytest.fixture
def customer(new_customer: Callable[..., "Customer"]) -> "Customer":
    return new_customer(**PHONE)


class Customer(Visitor):
    def type(self, **others: str) -> None:
        for label, text in {**TYPED, "City or town": "Lagos", **others}.items():
            if self.page.get_by_label(label).count():
                self.page.get_by_label(label).fill(text)

    def sends_the_form(self, **typed: str) -> str:
        """From the form to the checkout; the payment's reference."""
        self.open("/pay")
        self.type(**typed)
        self.press("Continue to payment")
        self.sees_checkout()
        return reference_of(self.page)


def reference_of(page: Page) -> str:
    found = re.search(r"PG-\w{26}", page.inner_text("body"))
    assert found is not None
    return found[0]


def payment(server: Server, reference: str) -> dict[str, Any]:
    [row] = query(server.database_url, "SELECT * FROM payments WHERE reference = %s", reference)
    return row


def payments(server: Server) -> int:
    [row] = query(server.database_url, "SELECT count(*) AS number FROM payments")
    return int(row["number"])


def link(server: Server, **members: str) -> str:
    [row] = query(server.database_url, "SELECT value FROM secrets")
    made = Link(**{"amount": "18500.00", "currency": "NGN", "description": "Ankara dress", **members})
    return "/pay?" + made.query(row["value"], "test")


# Paying


def test_from_the_form_to_the_receipt(customer: Customer) -> None:
    customer.open("/pay")
    customer.sees("Pay Example Shop")
    customer.type()
    customer.page.get_by_role("heading").click()  # out of the last field, for the picture
    customer.check("form")
    customer.press("Continue to payment")
    customer.sees_checkout("checkout")
    customer.press("Pay NGN 1,250.50")
    customer.sees("^Paid$", "receipt")
    assert customer.page.title() == "Paid: NGN\u00a01,250.50 to Example Shop"
    expect(customer.page.get_by_role("status")).to_contain_text("This page is your receipt")
    expect(customer.page.get_by_role("button", name="Print or save this receipt")).to_be_visible()
    for nobodys in ("John", "john@example.com", "0801", "Lagos"):
        assert nobodys not in customer.page.content()


def test_from_the_form_to_the_receipt_in_french(new_customer: Callable[..., Customer]) -> None:
    customer = new_customer(**PHONE, locale="fr-SN")
    customer.open("/pay")
    customer.sees("Payer Example Shop", "french-form")
    for label, text in {"Montant": "2500,50", "Votre nom": "John Doe", "Téléphone": "0801 234 5678"}.items():
        customer.page.get_by_label(label).fill(text)
    customer.page.get_by_label("Ville").fill("Dakar")
    customer.page.get_by_label("Adresse e-mail").fill("john@example")
    customer.press("Continuer vers le paiement")
    expect(customer.page.get_by_role("alert")).to_contain_text("Veuillez vérifier ce que vous avez saisi")
    customer.check("french-errors")
    customer.page.get_by_label("Adresse e-mail").fill("john@example.com")
    customer.press("Continuer vers le paiement")
    customer.sees_checkout()
    customer.press("Pay NGN 2,500.50")
    customer.sees("^Payé$", "french-receipt")
    assert re.search(r"\d{1,2} \w+ \d{4} à \d\d:\d\d", customer.page.inner_text("#facts"))


def test_from_a_link_to_the_receipt(customer: Customer) -> None:
    address = link(customer.server, order="1001", expires="4102444800")
    customer.open(address)
    customer.sees("NGN 18,500.00", "link")
    customer.type()
    customer.press("Continue to payment")
    customer.sees_checkout()
    customer.press("Pay NGN 18,500.00")
    customer.sees("^Paid$")
    customer.open(address)
    customer.sees("^Paid$")


def test_a_link_that_was_changed_says_so(customer: Customer) -> None:
    customer.open(link(customer.server).replace("18500", "500"))
    customer.sees("This payment link has been changed")


def test_a_declined_card_and_a_second_one(customer: Customer) -> None:
    reference = customer.sends_the_form()
    customer.press("Try a card that is declined")
    expect(customer.page.get_by_role("alert")).to_contain_text("Insufficient Funds")
    customer.check()
    customer.press("Cancel and go back")
    customer.sees("^(Not paid yet|Your last try was declined)$")
    expect(customer.page.get_by_role("status")).to_contain_text("Insufficient Funds")  # without a reload
    customer.check("declined")
    customer.press("Try again: pay NGN 1,250.50")
    customer.sees_checkout()
    customer.press("Pay NGN 1,250.50")
    customer.sees("^Paid$")
    assert payment(customer.server, reference)["status"] == "completed"


def test_walking_away_and_coming_back_on_another_phone(new_customer: Callable[..., Customer]) -> None:
    first = new_customer(**PHONE)
    address = link(first.server, order="1002")
    first.open(address)
    first.type()
    first.press("Continue to payment")
    first.sees_checkout()
    reference = reference_of(first.page)
    first.press("Cancel and go back")
    first.sees("Not paid yet", "pending")
    first.page.close()
    second = new_customer(**PHONE)
    second.open(address)
    second.sees("Not paid yet")
    second.press("Pay NGN 18,500.00")
    second.sees_checkout()
    assert reference_of(second.page) == reference
    second.press("Pay NGN 18,500.00")
    second.sees("^Paid$")


def test_a_double_click_is_one_payment(customer: Customer) -> None:
    server, before = customer.server, payments(customer.server)
    server.sandbox.fault("initialize", "slow", seconds=1)
    customer.open("/pay")
    customer.type()
    customer.page.get_by_role("button", name="Continue to payment").dblclick()
    customer.sees_checkout()
    assert payments(server) == before + 1
    customer.page.go_back()
    customer.sees("Pay Example Shop")  # and not a page that leads on by itself again


def test_the_back_button_never_makes_a_second_payment(customer: Customer) -> None:
    reference = customer.sends_the_form()
    before = payments(customer.server)
    customer.page.go_back()
    customer.sees("Pay Example Shop")
    expect(customer.page.get_by_label("Your name")).to_have_value("John Doe")
    customer.press("Continue to payment")
    customer.sees_checkout()
    assert reference_of(customer.page) == reference
    customer.press("Pay NGN 1,250.50")
    customer.sees("^Paid$")
    customer.page.go_back()
    customer.page.go_back()
    customer.sees("Pay Example Shop")
    customer.press("Continue to payment")
    customer.sees("^Paid$")
    assert payments(customer.server) == before
    customer.page.reload()
    customer.sees("^Paid$")


def test_back_and_something_changed(customer: Customer) -> None:
    reference = customer.sends_the_form()
    customer.page.go_back()
    customer.type(Amount="900")
    customer.press("Continue to payment")
    expect(customer.page.get_by_role("alert")).to_contain_text("You have changed something")
    customer.check()
    customer.press("Continue to payment")
    customer.sees_checkout()
    assert reference_of(customer.page) != reference


# Waiting


def test_a_slow_webhook_arrives_while_the_page_waits(customer: Customer) -> None:
    customer.sends_the_form(**{"E-mail": "late-webhook@example.com"})
    customer.press("Pay NGN 1,250.50")
    customer.sees("Your payment is being confirmed", "confirming")
    customer.page.evaluate("window.still_here = true")
    customer.sees("^Paid$")
    assert customer.page.evaluate("window.still_here"), "it was not loaded anew"
    assert customer.page.title().startswith("Paid: ")
    expect(customer.page.get_by_role("button", name="Print or save this receipt")).to_be_visible()


def test_a_lost_webhook_costs_seconds(customer: Customer) -> None:
    customer.sends_the_form(**{"E-mail": "lost-webhook@example.com"})
    customer.press("Pay NGN 1,250.50")
    customer.sees("Your payment is being confirmed")
    customer.sees("^Paid$")


def test_the_focus_is_not_lost_when_the_button_that_has_it_goes(customer: Customer) -> None:
    waiting = new_payment(customer.server)
    customer.open(f"/pay/{waiting['id']}")
    customer.page.get_by_role("link", name="Pay NGN 1,250.50").focus()
    customer.server.sandbox.pay(waiting["reference"])
    customer.sees("^Paid$")
    expect(customer.page.get_by_role("status")).to_be_focused()


def test_without_javascript_all_of_it_works(new_customer: Callable[..., Customer]) -> None:
    customer = new_customer(**PHONE, java_script_enabled=False)
    customer.sends_the_form(**{"E-mail": "late-webhook@example.com"})
    customer.press("Pay NGN 1,250.50")
    customer.sees("Your payment is being confirmed")
    expect(customer.page.get_by_role("link", name="Stop that")).to_be_visible()
    customer.sees("^Paid$")
    expect(customer.page.get_by_role("button")).to_have_count(0)


def test_a_double_click_without_javascript(new_customer: Callable[..., Customer]) -> None:
    customer = new_customer(java_script_enabled=False)
    before = payments(customer.server)
    customer.server.sandbox.fault("initialize", "slow", seconds=1)
    customer.open("/pay")
    customer.type()
    customer.page.get_by_role("button", name="Continue to payment").dblclick()
    customer.sees_checkout()
    assert payments(customer.server) == before + 1


def test_a_page_that_could_not_be_shown_comes_by_itself(customer: Customer) -> None:
    waiting = new_payment(customer.server)
    name = str(conninfo_to_dict(customer.server.database_url)["dbname"])
    elsewhere = customer.server.database_url.replace(f"/{name}?", "/template1?")
    query(elsewhere, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    try:
        query(elsewhere, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", name)
        customer.open(f"/pay/{waiting['id']}")
        customer.sees("We cannot show this right now")
    finally:
        query(elsewhere, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
    customer.sees("Not paid yet")


# Reading


def test_what_is_wrong_is_read_out_and_leads_to_its_field(customer: Customer) -> None:
    page = customer.page
    customer.open("/pay")
    customer.type(Amount="twelve")
    customer.press("Continue to payment")
    expect(page.get_by_role("alert")).to_be_focused()
    customer.check("errors")
    assert page.title() == "Error: Pay Example Shop"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Amount")).to_be_focused()
    expect(page.get_by_label("Amount")).to_have_accessible_description(re.compile("Amount must be clear"))
    page.keyboard.type("1250")
    page.get_by_label("Amount").fill("1250")
    page.keyboard.press("Enter")
    customer.sees_checkout()


def test_with_the_keyboard_alone(new_customer: Callable[..., Customer]) -> None:
    customer = new_customer()
    customer.open("/pay")
    for text in ("1250.50", None, "John Doe", "john@example.com", "0801 234 5678", "Lagos"):
        customer.page.keyboard.press("Tab")
        if text:
            customer.page.keyboard.type(text)
    customer.page.keyboard.press("Tab")
    expect(customer.page.get_by_role("button", name="Continue to payment")).to_be_focused()
    outline = customer.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    customer.page.keyboard.press("Enter")
    customer.sees_checkout()


def states(server: Server) -> dict[str, str]:
    """A payment's page in every state, by its heading."""
    database = server.database_url
    made = {heading: new_payment(server) for heading in ("Not paid yet", "The time to pay has ended")}
    made["Paid"] = new_payment(server, amount="999999999.99", currency="NGN", metadata={"order": "1001"})
    made["Paid, and partly refunded"] = new_payment(server, currency="XOF", amount="5000")
    made["Refunded"] = new_payment(server, currency="ZAR")
    made["Your money has arrived and is being checked"] = new_payment(server, customer_email="underpaid@example.com")
    made["This payment did not work"] = new_payment(server)
    made["Your last try was declined"] = new_payment(server)
    for heading in ("This payment did not work", "Your last try was declined"):
        server.sandbox.decline(made[heading]["reference"])
    for heading in ("This payment did not work", "The time to pay has ended"):
        end_time(database, made[heading]["id"])
    for heading in ("Paid", "Paid, and partly refunded", "Refunded", "Your money has arrived and is being checked"):
        server.sandbox.pay(made[heading]["reference"])
    for heading, amount in {"Paid, and partly refunded": 200000, "Refunded": None}.items():
        reference = made[heading]["reference"]
        wait_until(lambda name=reference: payment(server, name)["status"] == "completed")  # type: ignore[misc]
        server.sandbox.dashboard_refund(reference, amount)
        server.sandbox.move_refund(reference, "processed")
    server.sandbox.dashboard_refund(made["Paid, and partly refunded"]["reference"], 50000)
    make_due(database)
    ends = {"failed", "expired", "partially_refunded", "refunded", "review"}
    ids = [each["id"] for each in made.values()]
    wait_until(
        lambda: (
            ends <= {row["status"] for row in query(database, "SELECT status FROM payments WHERE id = ANY(%s)", ids)}
        )
    )
    return {heading: f"/pay/{each['id']}" for heading, each in made.items()}


@pytest.fixture(scope="module")
def every_page(server: Server) -> dict[str, str]:
    others = {
        "Pay Example Shop": "/pay",
        "NGN 18,500.00": link(server, order="1003", expires="4102444800"),
        "There is nothing here": "/pay/PAY-1",
        "This payment link has been changed": "/pay?signature=x",
        "This payment link has ended": link(server, expires="1"),
        "Your payment is being confirmed": f"/pay/{new_payment(server)['id']}?reference=x",
    }
    return {**states(server), **others}


FRENCH: dict[str, dict[str, Any]] = {
    "french": {**PHONE, "locale": "fr-SN"},
    "french-dark": {**PHONE, "locale": "fr-SN", "color_scheme": "dark"},
}


@pytest.mark.parametrize("look", [*LOOKS, *FRENCH])
def test_every_page_can_be_read_however_it_is_looked_at(
    new_customer: Callable[..., Customer], every_page: dict[str, str], look: str
) -> None:
    customer = new_customer(**{**LOOKS, **FRENCH}[look])
    is_french = look in FRENCH
    for heading, address in every_page.items():
        customer.open(address)
        customer.sees(".+" if is_french else f"^{heading}$", f"{look}-{file_name(heading)}")
        expect(customer.page.locator("html")).to_have_attribute("lang", "fr" if is_french else "en")
    checkout = new_payment(customer.server)["checkout_url"]
    customer.open(checkout)
    customer.sees_checkout(f"{look}-checkout")


def test_a_large_amount_stays_inside_the_checkouts_column(new_customer: Callable[..., Customer]) -> None:
    customer = new_customer(**LOOKS["narrow"])
    customer.open(new_payment(customer.server, amount=1250000)["checkout_url"])
    heading = customer.page.get_by_role("heading", level=1)
    expect(heading).to_have_text("NGN\N{NO-BREAK SPACE}1,250,000.00")
    assert heading.evaluate("it => it.scrollWidth <= it.clientWidth")


def test_letters_twice_as_large_fit_too(new_customer: Callable[..., Customer], every_page: dict[str, str]) -> None:
    customer = new_customer(viewport={"width": 640, "height": 1280})
    for heading, address in every_page.items():
        customer.open(address)
        customer.page.evaluate("document.documentElement.style.fontSize = '200%'")
        customer.sees(f"^{heading}$")


def test_a_receipt_is_one_printed_page(
    new_customer: Callable[..., Customer], every_page: dict[str, str], tmp_path: Path
) -> None:
    customer = new_customer(color_scheme="dark")
    for heading in ("Paid", "Paid, and partly refunded", "Refunded"):
        customer.open(every_page[heading])
        pdf = Path(os.environ.get("PICTURES", tmp_path)) / f"{file_name(heading)}.pdf"
        customer.page.pdf(path=pdf, format="A4")
        assert len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())) == 1
    customer.page.emulate_media(media="print")
    for shown in (customer.page.locator("header"), customer.page.locator("#state"), customer.page.locator("#facts")):
        expect(shown).to_be_visible()
    for hidden in (customer.page.locator("#next"), customer.page.locator("#foot")):
        expect(hidden).to_be_hidden()
    black = customer.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert black == "rgb(255, 255, 255)"


@pytest.mark.parametrize("look", ["narrow", "dark"])
def test_the_description_of_the_api_can_be_read_too(new_customer: Callable[..., Customer], look: str) -> None:
    customer = new_customer(**LOOKS[look])
    customer.open("/docs")
    customer.check(f"{look}-docs")
