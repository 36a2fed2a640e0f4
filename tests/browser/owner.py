# ruff: noqa: F811  (fixtures are imported by their names)
"""Who stands at the desk, and what the stories ask of its server."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, expect

from browsing import PHONE, Visitor, chromium, new_payment, serving, visitors  # noqa: F401
from office import ADMIN_TOKEN
from shop import Server, query, wait_until


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
    yield from visitors(Owner, chromium, server)


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
    """What the provider was asked for, in hundredths, once each has its row and none has two."""
    known = "SELECT id FROM refunds WHERE payment_id = %s"

    def theirs() -> list[dict[str, Any]]:
        return server.sandbox.refunds(payment["reference"])

    wait_until(lambda: len(theirs()) == len(query(server.database_url, known, payment["id"])))
    return [int(each["amount"]) for each in theirs()]


def stored(owner: Owner) -> str:
    return str(owner.page.evaluate("JSON.stringify([sessionStorage, localStorage, document.cookie, location.href])"))
