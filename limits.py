"""Who asks, and how often: what guards an endpoint that anyone may call."""

import hmac
import ipaddress
import logging
import re
import threading
import time

import falcon

import log
from errors import Problem

MOST_ADDRESSES = 10_000
PORT = re.compile(r"^\[(.*)\](?::[0-9]+)?$|^([^:]*):[0-9]+$", re.ASCII)
"""Some proxies write the port too: 192.0.2.1:50000, [2001:db8::1]:50000."""


class Clients:
    """The address that a request comes from: the peer's, or the one that `trusted_proxies` proxies in front vouch for.

    X-Forwarded-For is written by anyone; only its last hops, one for each proxy of ours, can be believed.
    """

    def __init__(self, trusted_proxies: int) -> None:
        self.trusted_proxies = trusted_proxies
        self.has_warned = False

    def address(self, req: falcon.Request) -> str:
        forwarded = req.get_header("X-Forwarded-For")
        if forwarded is None:
            return str(req.remote_addr)
        if self.trusted_proxies == 0:
            if not self.has_warned:
                self.has_warned = True
                log.event(
                    "forwarded_addresses_ignored",
                    level=logging.WARNING,
                    outcome="set TRUSTED_PROXIES if a proxy is in front",
                )
            return str(req.remote_addr)
        hops = [hop.strip() for hop in forwarded.split(",")]
        return hops[-self.trusted_proxies] if len(hops) >= self.trusted_proxies else str(req.remote_addr)


class RateLimit:
    """At most `most` requests of one address in `per_seconds`, in this process: a bucket for each address that fills
    evenly. IPv6 counts by the /64, which is what one customer has."""

    def __init__(self, most: int, per_seconds: float) -> None:
        self.most = most
        self.per_seconds = per_seconds
        self.lock = threading.Lock()
        self.buckets: dict[str, tuple[float, float]] = {}

    def seconds_to_wait(self, address: str) -> float:
        """0 when this request may pass, which counts it; else how long until one may."""
        now, name = time.monotonic(), _network(address)
        with self.lock:
            left, at = self.buckets.pop(name, (float(self.most), now))
            left = min(self.most, left + (now - at) * self.most / self.per_seconds)
            if left < 1:
                self.buckets[name] = (left, now)
                return (1 - left) * self.per_seconds / self.most
            self.buckets[name] = (left - 1, now)
            if len(self.buckets) > MOST_ADDRESSES:  # the one that has been silent longest
                del self.buckets[next(iter(self.buckets))]
        return 0


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(PORT.sub(r"\1\2", address).partition("%")[0])
    except ValueError:
        return address[:64]
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    # A socket that listens on `::` shows IPv4's clients as ::ffff:192.0.2.1, which share one /64.
    return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))


def check_bearer(req: falcon.Request, token: str) -> None:
    """Raises Problem unless the request bears this token (RFC 6750, section 2.1)."""
    scheme, _, given = (req.get_header("Authorization") or "").partition(" ")
    if (
        not hmac.compare_digest(given.strip().encode("latin-1", "replace"), token.encode())
        or scheme.lower() != "bearer"
    ):
        raise Problem("unauthorized", headers={"WWW-Authenticate": "Bearer"})


class Guard:
    """What stands before each payment that somebody starts: the API token, and the rate limit for those without one."""

    def __init__(self, api_token: str | None, rate_limit: RateLimit | None, clients: Clients) -> None:
        self.api_token = api_token
        self.rate_limit = rate_limit
        self.clients = clients

    def check_token(self, req: falcon.Request) -> None:
        """Raises Problem unless the request bears the API token, where one is set. Else its address is counted."""
        if self.api_token is None:
            self.check_rate(req)
            return
        try:
            check_bearer(req, self.api_token)
        except Problem:
            self.check_rate(req)
            raise

    def check_rate(self, req: falcon.Request) -> None:
        """Raises Problem when the request's address has sent too many."""
        if self.rate_limit is not None and (seconds := self.rate_limit.seconds_to_wait(self.clients.address(req))):
            raise Problem("rate_limited", retry_after_seconds=seconds)
