"""The environment, read once into a frozen dataclass and checked at start."""

import base64
import difflib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, tzinfo
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import psycopg
from dotenv import dotenv_values

import money

VERSION = "0.1.0"
PAYSTACK_URL = "https://api.paystack.co"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SECRET_KEY = re.compile(r"sk_(test|live)_[0-9A-Za-z_-]{8,200}")


HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?", re.ASCII)
APP_URL = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#]*)", re.ASCII | re.IGNORECASE)
NO_APPS = ("http", "https", "javascript", "vbscript", "data", "blob", "file", "about")
CONTACT = re.compile(r"[+(]?(?:[0-9][ ().-]{0,2}){7,15}|[\w.+-]+@(?:[\w-]+\.)+[\w-]+|https://[!-~]+", re.ASCII)
SHORTEST_TOKEN = 16
NAMES = tuple(
    """
    DATABASE_URL PAYSTACK_SECRET_KEY PAYSTACK_URL PAYSTACK_TIMEOUT PUBLIC_URL HOST PORT WEB_CONCURRENCY THREADS DB_POOL
    CURRENCIES API_TOKEN ADMIN_TOKEN REQUIRE_IDEMPOTENCY_KEY LEASE_SECONDS PAYMENT_TTL_HOURS RETENTION_DAYS PAY_FORM
    MERCHANT_NAME MERCHANT_CONTACT TIMEZONE NOTIFY_URL NOTIFY_SECRET RETURN_URL_ORIGINS CORS_ORIGINS RATE_LIMIT
    TRUSTED_PROXIES METRICS_TOKEN LOG_LEVEL WORKER_INTERVAL RUN_WORKER POSTGRES_PASSWORD
    """.split()  # noqa: SIM905  # as a list it would be 30 lines
)
"""The names that `.env` may set; compose.yaml reads the last name."""


class Invalid(Exception):
    """A missing or malformed value: one line that names it and says what would be right."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    database_url: str = field(repr=False)
    paystack_secret_keys: tuple[str, ...] = field(repr=False)
    """The first key is for calls; each key verifies webhooks."""
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
    """For a shop's own site: opens payments, and reads a payment by its id."""
    admin_token: str | None = field(default=None, repr=False)
    """For the owner: the back office over HTTP."""
    require_idempotency_key: bool = False
    lease_seconds: float = 60
    payment_ttl_seconds: float = 24 * 3600
    retention_days: float = 90
    pay_form: bool = False
    merchant_name: str | None = None
    merchant_contact: str | None = None
    """Where customers can ask: a phone number, an e-mail address or an https URL."""
    timezone: tzinfo = UTC
    """The time zone of days and dates on pages, in reports and in lists. Programs get UTC."""
    notify_url: str | None = None
    notify_secrets: tuple[bytes, ...] = field(default=(), repr=False)
    return_url_origins: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    rate_limit: tuple[int, float] | None = (300, 60)
    """The number of POSTs of payments, and in how many seconds."""
    trusted_proxies: int = 0
    metrics_token: str | None = field(default=None, repr=False)
    log_level: str = "INFO"
    worker_interval_seconds: float = 2
    run_worker: bool = True

    @property
    def mode(self) -> str:
        """`test` or `live`. Only the key tells Paystack the mode."""
        return self.paystack_secret_keys[0].split("_")[1]

    @property
    def base_path(self) -> str:
        """The path of PUBLIC_URL, if a proxy serves paygate below a path; else empty."""
        return urlsplit(self.public_url).path

    @property
    def slots(self) -> int:
        """How many threads of a process may wait for the provider at once. The others serve reads and webhooks."""
        return max(1, self.threads * 3 // 4)


def environment(dotenv: Path = Path(".env"), environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment, and the values of `.env` (the environment wins). An empty value counts as not set. So does a
    HOST in the environment that is no address: some shells set it for compilers (`x86_64-conda-linux-gnu`)."""
    values = _dotenv(dotenv) if dotenv.is_file() else {}
    if not is_address(environ.get("HOST", "").strip()):
        environ = {name: value for name, value in environ.items() if name != "HOST"}
    return {name: value.strip() for each in (values, environ) for name, value in each.items() if value.strip()}


class _Strict(logging.Handler):
    """Raises Invalid for a line that python-dotenv cannot read: it only logs the line, and goes on."""

    def emit(self, record: logging.LogRecord) -> None:
        number = re.search("[0-9]+", record.getMessage())
        raise Invalid(f"line {number[0] if number else '?'}: not of the form NAME=value")


def _dotenv(path: Path) -> dict[str, str]:
    """The values in `path`. Nothing is expanded: a $ is a $. Raises Invalid for a line that is no setting."""
    logger, strict = logging.getLogger("dotenv"), _Strict()
    logger.addHandler(strict)
    try:
        values = dotenv_values(path, interpolate=False, encoding="utf-8-sig")
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise Invalid(f"{path} is not UTF-8") from None
    except Invalid as error:
        raise Invalid(f"{path}, {error}") from None
    finally:
        logger.removeHandler(strict)
    for name, value in values.items():
        number = next(
            (n for n, line in enumerate(lines, 1) if re.match(rf"\W*(export\s+)?{re.escape(name)}\b", line)), 0
        )
        if value is None:  # the name may be a secret, so the message leaves it out
            raise Invalid(f"{path}, line {number}: not of the form NAME=value")
        if name not in NAMES and not name.startswith("COMPOSE_"):
            close = difflib.get_close_matches(name.upper(), NAMES, n=1, cutoff=0.8)
            hint = f"; is it {close[0]}?" if close else ""
            raise Invalid(f"{path}, line {number}: nobody reads a setting of this name{hint}")
    return {name: value or "" for name, value in values.items()}


def load(env: Mapping[str, str] | None = None) -> Settings:
    """The settings in `env` (default: `environment()`). Raises Invalid."""
    env = environment() if env is None else env
    host = env.get("HOST", "127.0.0.1")
    if not is_address(host):
        raise Invalid("HOST must be an address to listen on: 127.0.0.1 for this machine alone, 0.0.0.0 for all")
    port = _integer(env, "PORT", 8000, 1, 65535)
    keys = _secret_keys(env)
    is_live = keys[0].startswith("sk_live_")
    return Settings(
        database_url=database_url(env),
        paystack_secret_keys=keys,
        paystack_url=_paystack_url(env),
        paystack_timeout_seconds=_number(env, "PAYSTACK_TIMEOUT", 10, 1, 60),
        public_url=_public_url(env, host, port, live=is_live),
        host=host,
        port=port,
        web_concurrency=_integer(env, "WEB_CONCURRENCY", 2, 1, 64),
        threads=_integer(env, "THREADS", 64, 2, 1000),
        db_pool=_integer(env, "DB_POOL", 8, 1, 1000),
        currencies=_currencies(env),
        api_token=_token(env, "API_TOKEN"),
        admin_token=_admin_token(env),
        require_idempotency_key=_switch(env, "REQUIRE_IDEMPOTENCY_KEY", "off"),
        lease_seconds=_number(env, "LEASE_SECONDS", 60, 3, 3600),
        payment_ttl_seconds=_number(env, "PAYMENT_TTL_HOURS", 24, 0.0001, 24 * 365) * 3600,
        retention_days=_number(env, "RETENTION_DAYS", 90, 1, 36500),
        pay_form=_switch(env, "PAY_FORM", "off"),
        merchant_name=env.get("MERCHANT_NAME"),
        merchant_contact=_contact(env),
        timezone=zone(env),
        notify_url=_notify_url(env, live=is_live),
        notify_secrets=_notify_secrets(env),
        return_url_origins=_origins(env, "RETURN_URL_ORIGINS"),
        cors_origins=_origins(env, "CORS_ORIGINS"),
        rate_limit=_rate(env, "RATE_LIMIT", "300/minute"),
        trusted_proxies=_integer(env, "TRUSTED_PROXIES", 0, 0, 10),
        metrics_token=_token(env, "METRICS_TOKEN"),
        log_level=_one_of(env, "LOG_LEVEL", "INFO", ("DEBUG", "INFO", "WARNING", "ERROR")),
        worker_interval_seconds=_number(env, "WORKER_INTERVAL", 2, 0.05, 3600),
        run_worker=_switch(env, "RUN_WORKER", "1"),
    )


def mode_of(env: Mapping[str, str]) -> str:
    """The mode of the key; `test` if neither a key nor a database is configured, as on a machine for a first try."""
    return "test" if not {"PAYSTACK_SECRET_KEY", "DATABASE_URL"} & env.keys() else _secret_keys(env)[0].split("_")[1]


def database_url(env: Mapping[str, str]) -> str:
    url = env.get("DATABASE_URL")
    if not url:
        raise Invalid("DATABASE_URL is missing: set it to postgresql://USER:PASSWORD@HOST/DATABASE")
    if not url.startswith(("postgresql://", "postgres://")):
        raise Invalid("DATABASE_URL must begin with postgresql:// or postgres://")
    try:
        psycopg.conninfo.conninfo_to_dict(url)
    except psycopg.Error as error:
        # libpq quotes the part that it cannot read. It may be the password; only the name of a parameter is shown.
        words = str(error) if "query parameter" in str(error) else str(error).partition('"')[0].rstrip(": ")
        raise Invalid(f"DATABASE_URL: {words.strip()} (in a password % is written %25, and a space %20)") from None
    return url


def zone(env: Mapping[str, str]) -> tzinfo:
    """The merchant's time zone. Raises Invalid."""
    name = env.get("TIMEZONE", "UTC")
    try:
        return UTC if name == "UTC" else ZoneInfo(name)
    except (ValueError, OSError, ZoneInfoNotFoundError):
        raise Invalid("TIMEZONE must be a name of the IANA's list, such as Africa/Lagos") from None


def origin(url: str) -> str | None:
    """Scheme, host and port of an absolute http or https URL, in one spelling for comparisons; else None."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or "\\" in url or not HOST.fullmatch(parts.netloc):
        return None
    if not parts.hostname:
        return None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    default_port = {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{host}" + (f":{port}" if port not in (None, default_port) else "")


def is_address(host: str) -> bool:
    try:
        return host == "localhost" or bool(ip_address(host))
    except ValueError:
        return False


def caller_origin(url: str) -> str | None:
    """Like `origin`, for the site or app that a customer comes from and goes back to: an app is `myapp://paid`."""
    app = APP_URL.match(url)
    if app is None or app[1].lower() in NO_APPS or not HOST.fullmatch(app[2]):
        return origin(url)
    return app[0].lower()


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
    _refuse_foreign_letters("PUBLIC_URL", url)
    if origin(url) is None or urlsplit(url).query or urlsplit(url).fragment:
        raise Invalid("PUBLIC_URL must be an absolute URL such as https://pay.example.com")
    if live and not url.startswith("https://"):
        raise Invalid("PUBLIC_URL must be https with a live key")
    return url


def _notify_url(env: Mapping[str, str], *, live: bool) -> str | None:
    url = env.get("NOTIFY_URL")
    _refuse_foreign_letters("NOTIFY_URL", url or "")
    if url is not None and (origin(url) is None or urlsplit(url).fragment):
        raise Invalid("NOTIFY_URL must be an absolute URL such as https://shop.example.com/paygate")
    if url is not None and live and not url.startswith("https://") and not is_loopback(urlsplit(url).hostname or ""):
        raise Invalid("NOTIFY_URL must be https with a live key: names and addresses of customers travel there")
    return url


def _refuse_foreign_letters(name: str, url: str) -> None:
    """The two standards for such hosts differ in some letters, so one URL might lead to two hosts."""
    if not url.isascii():
        raise Invalid(f"{name} must be in ASCII: write the host as your registrar shows it, xn--…")


def _contact(env: Mapping[str, str]) -> str | None:
    contact = env.get("MERCHANT_CONTACT", "")
    if contact and (not CONTACT.fullmatch(contact) or (":" in contact and origin(contact) is None)):
        raise Invalid("MERCHANT_CONTACT must be a phone number such as +234 801 234 5678, an e-mail or an https URL")
    return contact or None


def _token(env: Mapping[str, str], name: str) -> str | None:
    token = env.get(name)
    if token is not None and len(token) < SHORTEST_TOKEN:
        raise Invalid(f"{name} must have at least {SHORTEST_TOKEN} characters; openssl rand -hex 24 makes one")
    return token


def _admin_token(env: Mapping[str, str]) -> str | None:
    token = env.get("ADMIN_TOKEN")
    others = env.get("API_TOKEN"), env.get("METRICS_TOKEN")
    if token is not None and (not re.fullmatch("[!-~]{20,}", token) or token in others):
        raise Invalid("ADMIN_TOKEN must have at least 20 visible ASCII characters, and be no other token too")
    return token


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
    is_marked = all(text.startswith("whsec_") for text in texts)
    if len(keys) > 2 or not is_marked or not all(24 <= len(key) <= 64 for key in keys):
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
    origins = tuple(caller_origin(text) for text in _list(env, name))
    if any(each is None or each != text.rstrip("/") for each, text in zip(origins, _list(env, name), strict=True)):
        raise Invalid(f"{name} must be origins such as https://shop.example.com or myapp://paid, comma-separated")
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
