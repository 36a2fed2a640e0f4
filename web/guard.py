"""Tokens, addresses and the rate limit: they guard the endpoints that anyone may call."""

import functools
import hmac
import ipaddress
import logging
import re
import threading
import time

import falcon

from settings import Settings
from web.errors import Problem

logger = logging.getLogger("paygate")

MOST_ADDRESSES = 10_000
PORT = re.compile(r"^\[(.*)\](?::[0-9]+)?$|^([^:]*):[0-9]+$", re.ASCII)
"""Some proxies write the port too: 192.0.2.1:50000, [2001:db8::1]:50000."""


class RateLimit:
    """At most `most` requests from one address in `per_seconds`, in this process: each address has a bucket that fills
    evenly. IPv6 counts by the /64, because one customer has a whole /64."""

    def __init__(self, most: int, per_seconds: float) -> None:
        self.most = most
        self.per_seconds = per_seconds
        self.lock = threading.Lock()
        self.buckets: dict[str, tuple[float, float]] = {}

    def seconds_to_wait(self, address: str) -> float:
        """Count a request: 0 if it may pass, else the seconds until a request may pass."""
        now, name = time.monotonic(), network(address)
        with self.lock:
            left, at = self.buckets.pop(name, (float(self.most), now))
            left = min(self.most, left + (now - at) * self.most / self.per_seconds)
            self.buckets[name] = (left - 1 if left >= 1 else left, now)
            if len(self.buckets) > MOST_ADDRESSES:  # forget the address that has been silent longest
                del self.buckets[next(iter(self.buckets))]
        return 0 if left >= 1 else (1 - left) * self.per_seconds / self.most


@functools.lru_cache(MOST_ADDRESSES)  # to parse it costs a twentieth of a GET
def network(address: str) -> str:
    """The network that counts as one customer: an IPv4 address, an IPv6 /64."""
    try:
        parsed = ipaddress.ip_address(PORT.sub(r"\1\2", address).partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    # A socket that listens on `::` shows IPv4's clients as ::ffff:192.0.2.1, which share one /64.
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))


def bears(req: falcon.Request, token: str) -> bool:
    """Whether the request has this token (RFC 6750, section 2.1)."""
    scheme, _, given = (req.get_header("Authorization") or "").partition(" ")
    is_same = hmac.compare_digest(given.strip().encode("latin-1", "replace"), token.encode())
    return is_same and scheme.lower() == "bearer"


class Guard:
    """Who may do what: the API token opens payments and reads a payment; the owner's token opens the back office. The
    rate limit is for clients without a token."""

    def __init__(self, settings: Settings) -> None:
        self.api_token = settings.api_token
        self.admin_token = settings.admin_token
        self.rate_limit = RateLimit(*settings.rate_limit) if settings.rate_limit else None
        self.trusted_proxies = settings.trusted_proxies
        self.has_warned = False

    def check_token(self, req: falcon.Request) -> None:
        """Raises Problem unless the request has the API token, if a token is set. Without a token set, counts its
        address."""
        if self.api_token is None:
            self.check_rate(req)
        else:
            self.check_bearer(req, self.api_token)

    def check_reader(self, req: falcon.Request) -> None:
        """Raises Problem unless the request has the API's or the owner's token, if an API token is set."""
        if self.api_token is not None:
            self.check_bearer(req, self.api_token, self.admin_token)

    def check_admin(self, req: falcon.Request) -> None:
        """Raises Problem unless the request has the owner's token."""
        if self.admin_token is None:
            raise Problem("token_required")
        self.check_bearer(req, self.admin_token)

    def check_bearer(self, req: falcon.Request, *tokens: str | None) -> None:
        """Raises Problem unless the request has one of these tokens. A wrong token is counted, to limit guesses."""
        if not any(bears(req, token) for token in tokens if token is not None):
            self.check_rate(req)
            raise Problem("unauthorized", headers={"WWW-Authenticate": "Bearer"})

    def check_rate(self, req: falcon.Request) -> None:
        """Raises Problem if the request's address has sent too many requests."""
        if self.rate_limit is not None and (seconds := self.rate_limit.seconds_to_wait(self.address(req))):
            raise Problem("rate_limited", retry_after_seconds=seconds)

    def address(self, req: falcon.Request) -> str:
        """The address of a request's client: the peer's address, or the address that `trusted_proxies` proxies report.

        Anyone can write X-Forwarded-For. Only its last hops, one for each proxy of ours, can be believed.
        """
        forwarded = req.get_header("X-Forwarded-For")
        hops = [] if forwarded is None else [hop.strip() for hop in forwarded.split(",")]
        if hops and self.trusted_proxies == 0 and not self.has_warned:
            self.has_warned = True
            outcome = "set TRUSTED_PROXIES if a proxy is in front"
            logger.warning("forwarded_addresses_ignored", extra={"outcome": outcome})
        is_reported = 0 < self.trusted_proxies <= len(hops)
        # An address has 64 characters at most, and it is remembered.
        return hops[-self.trusted_proxies][:64] if is_reported else str(req.remote_addr)
