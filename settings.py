"""The environment, read once into a frozen dataclass and checked at start."""

import base64
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from dotenv.parser import parse_stream

import money

PAYSTACK_URL = "https://api.paystack.co"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SECRET_KEY = re.compile(r"sk_(test|live)_[0-9A-Za-z_-]{8,200}")


class Invalid(Exception):
    """A missing or malformed value: one line that names it and says what would be right."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    database_url: str = field(repr=False)
    paystack_secret_keys: tuple[str, ...] = field(repr=False)
    """The first one calls; each of them verifies webhooks."""
    paystack_url: str = PAYSTACK_URL
    paystack_timeout_seconds: float = 10
    public_url: str
    host: str = "127.0.0.1"
    port: int = 8000
    web_concurrency: int = 2
    threads: int = 64
    db_pool: int = 8
    currencies: tuple[str, ...] = ("NGN",)
    api_token: str | None = field(default=None, repr=False)
    require_idempotency_key: bool = False
    lease_seconds: float = 60
    payment_ttl_seconds: float = 24 * 3600
    retention_days: float = 90
    pay_form: bool = False
    merchant_name: str | None = None
    notify_url: str | None = None
    notify_secrets: tuple[bytes, ...] = field(default=(), repr=False)
    return_url_origins: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    rate_limit: tuple[int, float] | None = (300, 60)
    """How many POSTs of payments in how many seconds."""
    trusted_proxies: int = 0
    metrics_token: str | None = field(default=None, repr=False)
    log_level: str = "INFO"
    worker_interval_seconds: float = 2
    run_worker: bool = True

    @property
    def mode(self) -> str:
        """`test` or `live`, by the key: Paystack tells them apart by nothing else."""
        return self.paystack_secret_keys[0].split("_")[1]

    @property
    def slots(self) -> int:
        """How many threads of a process may wait for the provider at once; the rest keep serving reads and webhooks."""
        return max(1, self.threads * 3 // 4)


def environment(dotenv: Path = Path(".env"), environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment with what `.env` adds to it (the environment wins). An empty value counts as not set.

    python-dotenv expands `${X}` even in single quotes and only logs a line that it cannot read: its parser is used
    as it is, nothing is expanded, and a broken line stops the start.
    """
    values: dict[str, str] = {}
    if dotenv.is_file():
        try:
            lines = io.StringIO(dotenv.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise Invalid(f"{dotenv} is not UTF-8") from None
        for binding in parse_stream(lines):
            if binding.error or (binding.key is not None and binding.value is None):
                raise Invalid(f"{dotenv}, line {binding.original.line}: not of the form NAME=value")
            if binding.key is not None:
                values[binding.key] = binding.value or ""
    return {name: value.strip() for name, value in {**values, **environ}.items() if value.strip()}


def load(env: Mapping[str, str] | None = None) -> Settings:
    """The settings in `env` (default: `environment()`). Raises Invalid."""
    env = environment() if env is None else env
    host = env.get("HOST", "127.0.0.1")
    port = _integer(env, "PORT", 8000, 1, 65535)
    keys = _secret_keys(env)
    threads = _integer(env, "THREADS", 64, 2, 1000)
    return Settings(
        database_url=database_url(env),
        paystack_secret_keys=keys,
        paystack_url=_paystack_url(env),
        paystack_timeout_seconds=_number(env, "PAYSTACK_TIMEOUT", 10, 1, 60),
        public_url=_public_url(env, host, port, live=keys[0].startswith("sk_live_")),
        host=host,
        port=port,
        web_concurrency=_integer(env, "WEB_CONCURRENCY", 2, 1, 64),
        threads=threads,
        db_pool=_integer(env, "DB_POOL", 8, 1, 1000),
        currencies=_currencies(env),
        api_token=env.get("API_TOKEN"),
        require_idempotency_key=_switch(env, "REQUIRE_IDEMPOTENCY_KEY", "off"),
        lease_seconds=_number(env, "LEASE_SECONDS", 60, 3, 3600),
        payment_ttl_seconds=_number(env, "PAYMENT_TTL_HOURS", 24, 0.0001, 24 * 365) * 3600,
        retention_days=_number(env, "RETENTION_DAYS", 90, 1, 36500),
        pay_form=_switch(env, "PAY_FORM", "off"),
        merchant_name=env.get("MERCHANT_NAME"),
        notify_url=_notify_url(env),
        notify_secrets=_notify_secrets(env),
        return_url_origins=_origins(env, "RETURN_URL_ORIGINS"),
        cors_origins=_origins(env, "CORS_ORIGINS"),
        rate_limit=_rate(env, "RATE_LIMIT", "300/minute"),
        trusted_proxies=_integer(env, "TRUSTED_PROXIES", 0, 0, 10),
        metrics_token=env.get("METRICS_TOKEN"),
        log_level=_one_of(env, "LOG_LEVEL", "INFO", ("DEBUG", "INFO", "WARNING", "ERROR")),
        worker_interval_seconds=_number(env, "WORKER_INTERVAL", 2, 0.05, 3600),
        run_worker=_switch(env, "RUN_WORKER", "1"),
    )


def mode_of(env: Mapping[str, str]) -> str:
    """The mode of the key; test where neither a key nor a database is configured, as on a machine for trying it out."""
    return "test" if not {"PAYSTACK_SECRET_KEY", "DATABASE_URL"} & env.keys() else _secret_keys(env)[0].split("_")[1]


def database_url(env: Mapping[str, str]) -> str:
    url = env.get("DATABASE_URL")
    if not url:
        raise Invalid("DATABASE_URL is missing: set it to postgresql://USER:PASSWORD@HOST/DATABASE")
    if not url.startswith(("postgresql://", "postgres://")):
        raise Invalid("DATABASE_URL must begin with postgresql:// or postgres://")
    return url


def origin(url: str) -> str | None:
    """Scheme, host and port of an absolute http or https URL, in the one spelling that can be compared; else None."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or "\\" in url:
        return None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    default_port = {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{host}" + (f":{port}" if port not in (None, default_port) else "")


def is_loopback(host: str) -> bool:
    return host in LOOPBACK


def _secret_keys(env: Mapping[str, str]) -> tuple[str, ...]:
    keys = _list(env, "PAYSTACK_SECRET_KEY")
    if not keys:
        raise Invalid("PAYSTACK_SECRET_KEY is missing: copy it from Paystack's dashboard, Settings, API Keys")
    if len(keys) > 2 or not all(SECRET_KEY.fullmatch(key) for key in keys):
        raise Invalid("PAYSTACK_SECRET_KEY must be sk_test_… or sk_live_…, or two of them, comma-separated")
    if len({key.split("_")[1] for key in keys}) > 1:
        raise Invalid("PAYSTACK_SECRET_KEY must hold keys of one mode: a test and a live key do not go together")
    return keys


def _paystack_url(env: Mapping[str, str]) -> str:
    url = env.get("PAYSTACK_URL", PAYSTACK_URL).rstrip("/")
    if origin(url) is None or urlsplit(url).query or urlsplit(url).fragment:
        raise Invalid("PAYSTACK_URL must be an absolute URL such as " + PAYSTACK_URL)
    if not url.startswith("https://") and not is_loopback(urlsplit(url).hostname or ""):
        raise Invalid("PAYSTACK_URL must be https: the secret key travels there")
    return url


def _public_url(env: Mapping[str, str], host: str, port: int, *, live: bool) -> str:
    url = env.get("PUBLIC_URL", "").rstrip("/")
    if not url:
        if not is_loopback(host):
            raise Invalid("PUBLIC_URL is missing: set it to the https address at which customers reach paygate")
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if origin(url) is None or urlsplit(url).query or urlsplit(url).fragment:
        raise Invalid("PUBLIC_URL must be an absolute URL such as https://pay.example.com")
    if live and not url.startswith("https://"):
        raise Invalid("PUBLIC_URL must be https with a live key")
    return url


def _notify_url(env: Mapping[str, str]) -> str | None:
    url = env.get("NOTIFY_URL")
    if url is not None and (origin(url) is None or urlsplit(url).fragment):
        raise Invalid("NOTIFY_URL must be an absolute URL such as https://shop.example.com/paygate")
    return url


def _notify_secrets(env: Mapping[str, str]) -> tuple[bytes, ...]:
    """The keys in `whsec_…` (base64, of 24 to 64 bytes, as the Standard Webhooks specification says)."""
    texts = _list(env, "NOTIFY_SECRET")
    if env.get("NOTIFY_URL") and not texts:
        raise Invalid(
            "NOTIFY_SECRET is missing: NOTIFY_URL needs it to sign; make one with "
            "python -c 'import base64, os; print(\"whsec_\" + base64.b64encode(os.urandom(32)).decode())'"
        )
    try:
        keys = tuple(base64.b64decode(text.removeprefix("whsec_"), validate=True) for text in texts)
    except ValueError:
        keys = (b"",)
    if (
        len(keys) > 2
        or not all(text.startswith("whsec_") for text in texts)
        or any(len(k) < 24 or len(k) > 64 for k in keys)
    ):
        raise Invalid("NOTIFY_SECRET must be whsec_ and the base64 of 24 to 64 bytes, or two of these, comma-separated")
    return keys


def _rate(env: Mapping[str, str], name: str, default: str) -> tuple[int, float] | None:
    text = env.get(name, default).lower()
    if text == "off":
        return None
    parts = re.fullmatch(r"([1-9][0-9]{0,6})/(second|minute|hour)", text, re.ASCII)
    if parts is None:
        raise Invalid(f"{name} must be off, or a number for each second, minute or hour, such as {default}")
    return int(parts[1]), {"second": 1, "minute": 60, "hour": 3600}[parts[2]]


def _currencies(env: Mapping[str, str]) -> tuple[str, ...]:
    codes = _list(env, "CURRENCIES") or ("NGN",)
    if unknown := [code for code in codes if code not in money.CURRENCIES]:
        raise Invalid(f"CURRENCIES: {unknown[0]} is not among {', '.join(money.CURRENCIES)}")
    return codes


def _origins(env: Mapping[str, str], name: str) -> tuple[str, ...]:
    origins = tuple(origin(text) for text in _list(env, name))
    if any(each is None or each != text.rstrip("/") for each, text in zip(origins, _list(env, name), strict=True)):
        raise Invalid(f"{name} must be origins such as https://shop.example.com, comma-separated")
    return tuple(each for each in origins if each is not None)


def _list(env: Mapping[str, str], name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in env.get(name, "").split(",") if part.strip()))


def _switch(env: Mapping[str, str], name: str, default: str) -> bool:
    words = {"on": True, "1": True, "true": True, "yes": True, "off": False, "0": False, "false": False, "no": False}
    word = env.get(name, default).lower()
    if word not in words:
        raise Invalid(f"{name} must be on or off")
    return words[word]


def _one_of(env: Mapping[str, str], name: str, default: str, words: tuple[str, ...]) -> str:
    word = env.get(name, default).upper()
    if word not in words:
        raise Invalid(f"{name} must be one of {', '.join(words)}")
    return word


def _integer(env: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = env.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}", text, re.ASCII) or not least <= int(text) <= most:
        raise Invalid(f"{name} must be a whole number from {least} to {most}")
    return int(text)


def _number(env: Mapping[str, str], name: str, default: float, least: float, most: float) -> float:
    text = env.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text, re.ASCII) or not least <= float(text) <= most:
        raise Invalid(f"{name} must be a number from {least:g} to {most:g}")
    return float(text)
