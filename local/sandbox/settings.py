"""What `configure` changes."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

from local.sandbox.fees import CURRENCIES
from local.sandbox.ledger import SandboxError
from local.sandbox.wire import is_loopback


@dataclass
class Settings:
    secret_key: str
    merchant: str
    webhook_url: str | None
    retry_seconds: Sequence[float] | None  # when an event that was not answered by exactly 200 is sent again
    refund_seconds: float | None  # how long a refund stays in each state; None leaves it pending until move_refund
    latency_seconds: float = 0.0
    webhook_timeout_seconds: float = 30.0
    currencies: Sequence[str] = tuple(CURRENCIES)
    not_found_status: int = 400  # 404 has been seen too
    refund_events_with_id: bool = False
    fees_by_customer: bool = False
    page_cap: int = 100  # rows on a page of a list, at most

    def __post_init__(self) -> None:
        self.change(webhook_url=self.webhook_url)

    def change(self, **settings: Any) -> None:
        for name, value in settings.items():
            if name not in SETTINGS:
                raise SandboxError(f"no setting {name!r}; there is {', '.join(SETTINGS)}")
            if name == "webhook_url" and value is not None and not is_loopback(urlsplit(value).hostname or ""):
                raise SandboxError(f"the sandbox sends webhooks to loopback only, not to {value}")
            setattr(self, name, value)

    @property
    def mode(self) -> str:
        return "live" if self.secret_key.startswith("sk_live_") else "test"


SETTINGS = tuple(setting.name for setting in fields(Settings))
