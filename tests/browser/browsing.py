"""Whoever comes with a browser, and the server that they come to: for the stories that `make browser` tells.

Not a part of `make test`, which needs no browser. Every page that a story comes by is checked by axe-core, stays within
its width, loads nothing from elsewhere and raises no error. `PICTURES=FOLDER make browser` keeps what it looks like; a
few of these pictures, made smaller with `pngquant 32`, are in docs/.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from commands.migrate import migrate
from local import embedded
from local.sandbox import Sandbox
from shop import ORDER, SECRET_KEY, Server, free_port

# All but the first two keep it from asking hosts of its maker's at every start.
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
V = TypeVar("V", bound="Visitor")
RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 720}, "device_scale_factor": 2, "has_touch": True}
LOOKS: dict[str, dict[str, Any]] = {
    "light": PHONE,
    "dark": {**PHONE, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 320, "height": 640}},
    "wide": {"viewport": {"width": 1280, "height": 800}},
}

expect.set_options(timeout=20_000)


@contextmanager
def serving(folder: Path, **env: str) -> Iterator[Server]:
    """All of it, as a merchant runs it."""
    settings = {
        **{"PORT": str(free_port()), "PAY_FORM": "on", "WORKER_INTERVAL": "0.5"},
        **{"MERCHANT_NAME": "Example Shop", "MERCHANT_CONTACT": "+234 801 234 5678"},
        **env,
    }
    with embedded.temporary() as cluster:
        migrate(cluster.url)
        with (
            Sandbox(SECRET_KEY, webhook_url=f"http://127.0.0.1:{settings['PORT']}/api/v1/webhooks/paystack") as sandbox,
            Server(cluster.url, sandbox, folder, **settings) as server,
        ):
            sandbox.configure(merchant="Example Shop")
            yield server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Visitor:
    """One with a browser of their own, in which nothing may go wrong unseen."""

    def __init__(self, chromium: Browser, server: Server, **device: Any) -> None:
        self.server = server
        self.has_script = device.get("java_script_enabled", True)
        self.page: Page = chromium.new_context(**device).new_page()
        self.troubles: list[str] = []
        self.page.on("console", self.hear)
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.context.on("request", self.check_host)

    def hear(self, message: ConsoleMessage) -> None:
        """A page that is a 404 or 422 is told of too, which is no trouble."""
        if message.type in ("error", "warning") and "the server responded with a status" not in message.text:
            self.troubles.append(message.text)

    def check_host(self, request: Request) -> None:
        if not request.url.startswith((self.server.url, self.server.sandbox.url)):
            self.troubles.append(f"asked for {request.url}")

    def open(self, path: str) -> None:
        self.page.goto(path if path.startswith("http") else self.server.url + path)

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name).or_(self.page.get_by_role("link", name=name)).click()

    def sees(self, heading: str, picture: str | None = None) -> None:
        """Waits for a page with this heading, and checks it."""
        expect(self.page.get_by_role("heading", level=1)).to_have_text(re.compile(heading.replace(" ", r"\s")))
        self.check(picture)

    def sees_checkout(self, picture: str | None = None) -> None:
        """Looks where the browser is: wait_for_url fails when a second click overtakes the first."""
        expect(self.page).to_have_url(re.compile(re.escape(f"{self.server.sandbox.url}/checkout/")))
        self.page.wait_for_load_state()
        self.check(picture)

    def check(self, picture: str | None = None) -> None:
        width = self.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1], f"{self.page.title()} is wider than the screen"
        if self.has_script:
            found = Axe().run(self.page, options=RULES)
            assert found.violations_count == 0, found.generate_report()
        if picture and (folder := os.environ.get("PICTURES")):
            self.page.screenshot(path=Path(folder) / f"{picture}.png")


def visitors(kind: type[V], chromium: Browser, server: Server) -> Iterator[Callable[..., V]]:
    """Makes visitors, each with a browser of their own; at the end none of them may have had trouble unseen."""
    made: list[V] = []

    def new(**device: Any) -> V:
        made.append(kind(chromium, server, **device))
        return made[-1]

    yield new
    for visitor in made:
        visitor.page.context.close()
        assert visitor.troubles == []


def file_name(heading: str) -> str:
    return re.sub("[^a-z]+", "-", heading.lower()).strip("-")


def new_payment(server: Server, **order: Any) -> dict[str, Any]:
    return dict(
        server.create(**{**ORDER, "amount": "1250.50", "description": "Two bags of rice", **order}).json["payment"]
    )
