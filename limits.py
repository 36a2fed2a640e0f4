"""Who asks, and how often: what guards an endpoint that anyone may call."""

import hmac
import ipaddress
import logging
import threading
import time

import falcon

import log
from errors import Problem

MOST_ADDRESSES = 10_000


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
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    return str(ipaddress.ip_network((address, 64), strict=False)) if parsed.version == 6 else address


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
        scheme, _, given = (req.get_header("Authorization") or "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self.api_token.encode())
        if not is_right or scheme.lower() != "bearer":
            self.check_rate(req)
            raise Problem("unauthorized", headers={"WWW-Authenticate": "Bearer"})

    def check_rate(self, req: falcon.Request) -> None:
        """Raises Problem when the request's address has sent too many."""
        if self.rate_limit is not None and (seconds := self.rate_limit.seconds_to_wait(self.clients.address(req))):
            raise Problem("rate_limited", retry_after_seconds=seconds)
