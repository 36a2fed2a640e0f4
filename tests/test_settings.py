"""The environment: what each name means, and what stops the start, in one line that names it."""

import base64
import re
import subprocess
import sys
from datetime import UTC
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

import settings
from shop import ROOT, SECRET_KEY

WHSEC = "whsec_" + base64.b64encode(bytes(range(32))).decode()
LIVE_KEY = "sk_live_fedcba9876543210"
NEEDED = {
    "DATABASE_URL": "postgresql://shop:opensesame@db.example.com/pay",
    "PAYSTACK_SECRET_KEY": SECRET_KEY,
}


def load(**env: str) -> settings.Settings:
    return settings.load({**NEEDED, **env})


def refusal(**env: str) -> str:
    with pytest.raises(settings.Invalid) as caught:
        load(**env)
    return str(caught.value)


def test_the_defaults_are_those_that_are_documented() -> None:
    assert load() == settings.Settings(
        database_url=NEEDED["DATABASE_URL"],
        paystack_secret_keys=(SECRET_KEY,),
        paystack_url="https://api.paystack.co",
        paystack_timeout_seconds=10,
        public_url="http://127.0.0.1:8000",
        host="127.0.0.1",
        port=8000,
        web_concurrency=2,
        threads=64,
        db_pool=8,
        currencies=("NGN",),
        api_token=None,
        require_idempotency_key=False,
        lease_seconds=60,
        payment_ttl_seconds=24 * 3600,
        retention_days=90,
        pay_form=False,
        timezone=UTC,
        merchant_name=None,
        merchant_contact=None,
        notify_url=None,
        notify_secrets=(),
        return_url_origins=(),
        cors_origins=(),
        rate_limit=(300, 60),
        trusted_proxies=0,
        metrics_token=None,
        log_level="INFO",
        worker_interval_seconds=2,
        run_worker=True,
    )


@pytest.mark.parametrize(
    ("name", "text", "attribute", "value"),
    [
        ("DATABASE_URL", "postgres://db/pay", "database_url", "postgres://db/pay"),
        ("DATABASE_URL", "postgresql://a,b/pay?target_session_attrs=read-write", "database_url", ...),
        ("PAYSTACK_SECRET_KEY", f"{SECRET_KEY}, sk_test_another00", "paystack_secret_keys", ...),
        ("PAYSTACK_URL", "https://proxy.example.com/paystack/", "paystack_url", "https://proxy.example.com/paystack"),
        ("PAYSTACK_URL", "http://127.0.0.1:8010", "paystack_url", "http://127.0.0.1:8010"),
        ("PAYSTACK_TIMEOUT", "2.5", "paystack_timeout_seconds", 2.5),
        ("PUBLIC_URL", "https://pay.example.com/", "public_url", "https://pay.example.com"),
        ("HOST", "localhost", "host", "localhost"),
        ("PORT", "8080", "public_url", "http://127.0.0.1:8080"),
        ("WEB_CONCURRENCY", "4", "web_concurrency", 4),
        ("THREADS", "16", "threads", 16),
        ("DB_POOL", "3", "db_pool", 3),
        ("CURRENCIES", "GHS, NGN,XOF", "currencies", ("GHS", "NGN", "XOF")),
        ("API_TOKEN", "open-sesame-0123", "api_token", "open-sesame-0123"),
        ("ADMIN_TOKEN", "open-sesame-01234567", "admin_token", "open-sesame-01234567"),
        ("REQUIRE_IDEMPOTENCY_KEY", "on", "require_idempotency_key", True),
        ("REQUIRE_IDEMPOTENCY_KEY", "1", "require_idempotency_key", True),
        ("REQUIRE_IDEMPOTENCY_KEY", "Off", "require_idempotency_key", False),
        ("LEASE_SECONDS", "30", "lease_seconds", 30),
        ("PAYMENT_TTL_HOURS", "0.5", "payment_ttl_seconds", 1800),
        ("RETENTION_DAYS", "30.5", "retention_days", 30.5),
        ("MERCHANT_NAME", "Mama Put & Sons", "merchant_name", "Mama Put & Sons"),
        ("MERCHANT_CONTACT", "+234 801 234 5678", "merchant_contact", ...),
        ("MERCHANT_CONTACT", "(0801) 234-5678", "merchant_contact", ...),
        ("MERCHANT_CONTACT", "help@shop.example.com", "merchant_contact", ...),
        ("MERCHANT_CONTACT", "https://shop.example.com/help?a=1", "merchant_contact", ...),
        (
            "RETURN_URL_ORIGINS",
            "https://shop.example.com, http://localhost:3000",
            "return_url_origins",
            ("https://shop.example.com", "http://localhost:3000"),
        ),
        ("CORS_ORIGINS", "https://shop.example.com", "cors_origins", ("https://shop.example.com",)),
        ("PAY_FORM", "on", "pay_form", True),
        ("TIMEZONE", "Africa/Lagos", "timezone", ZoneInfo("Africa/Lagos")),
        ("NOTIFY_SECRET", WHSEC, "notify_secrets", (bytes(range(32)),)),
        ("NOTIFY_SECRET", f"{WHSEC},whsec_{'QUJD' * 8}", "notify_secrets", (bytes(range(32)), b"ABC" * 8)),
        ("RATE_LIMIT", "5/second", "rate_limit", (5, 1)),
        ("RATE_LIMIT", "20/Hour", "rate_limit", (20, 3600)),
        ("RATE_LIMIT", "off", "rate_limit", None),
        ("TRUSTED_PROXIES", "1", "trusted_proxies", 1),
        ("METRICS_TOKEN", "count-0123456789", "metrics_token", "count-0123456789"),
        ("LOG_LEVEL", "debug", "log_level", "DEBUG"),
        ("WORKER_INTERVAL", "0.5", "worker_interval_seconds", 0.5),
        ("RUN_WORKER", "0", "run_worker", False),
    ],
)
def test_each_name_of_the_environment_is_read(name: str, text: str, attribute: str, value: object) -> None:
    if value is ...:
        value = tuple(text.split(", ")) if "," in text and attribute != "database_url" else text
    assert getattr(load(**{name: text}), attribute) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("DATABASE_URL", ""),
        ("DATABASE_URL", "mysql://shop:opensesame@db/pay"),
        ("DATABASE_URL", "db.example.com"),
        ("DATABASE_URL", "postgresql://shop:x@db/pay?pgbouncer=true"),
        ("DATABASE_URL", "postgresql://shop:100%@db/pay"),
        ("DATABASE_URL", "postgresql://shop:a b@db/pay"),
        ("PAYSTACK_SECRET_KEY", ""),
        ("PAYSTACK_SECRET_KEY", "pk_test_0123456789abcdef"),
        ("PAYSTACK_SECRET_KEY", "sk_test_"),
        ("PAYSTACK_SECRET_KEY", f"{SECRET_KEY},{LIVE_KEY}"),
        ("PAYSTACK_SECRET_KEY", "sk_test_aaaaaaaa,sk_test_bbbbbbbb,sk_test_cccccccc"),
        ("PAYSTACK_SECRET_KEY", "sk_test_aaaaaaaa\nX-Injected: 1"),
        ("PAYSTACK_URL", "api.paystack.co"),
        ("PAYSTACK_URL", "http://api.paystack.co"),
        ("PAYSTACK_URL", "https://user:password@api.paystack.co"),
        ("PAYSTACK_URL", "https://api.paystack.co?x=1"),
        ("PAYSTACK_URL", "ftp://api.paystack.co"),
        ("PAYSTACK_TIMEOUT", "0"),
        ("PAYSTACK_TIMEOUT", "nan"),
        ("PAYSTACK_TIMEOUT", "1e1"),
        ("PAYSTACK_TIMEOUT", "-1"),
        ("PUBLIC_URL", "pay.example.com"),
        ("PUBLIC_URL", "https://pay.example.com/#here"),
        ("PUBLIC_URL", "https://pay.example.com:port"),
        ("HOST", "x86_64-conda-linux-gnu"),
        ("HOST", "127.0.0.1:8000"),
        ("MERCHANT_CONTACT", "ask John"),
        ("MERCHANT_CONTACT", "080123"),
        ("MERCHANT_CONTACT", "help@shop"),
        ("MERCHANT_CONTACT", "help@shop.example.com?subject=x"),
        ("MERCHANT_CONTACT", "http://shop.example.com/help"),
        ("MERCHANT_CONTACT", "https://user:password@shop.example.com"),
        ("MERCHANT_CONTACT", "https:///help"),
        ("MERCHANT_CONTACT", "https://shop.example.com/a b"),
        ("MERCHANT_CONTACT", "javascript:alert(1)"),
        ("TIMEZONE", "Lagos"),
        ("TIMEZONE", "../etc/passwd"),
        ("TIMEZONE", "Africa"),
        ("PORT", "0"),
        ("PORT", "65536"),
        ("PORT", "http"),
        ("PORT", "٨٠٠٠"),
        ("WEB_CONCURRENCY", "0"),
        ("THREADS", "1"),
        ("THREADS", "4.5"),
        ("DB_POOL", "0"),
        ("CURRENCIES", "NGN,EUR"),
        ("CURRENCIES", "ngn"),
        ("REQUIRE_IDEMPOTENCY_KEY", "maybe"),
        ("LEASE_SECONDS", "1"),
        ("LEASE_SECONDS", "inf"),
        ("PAYMENT_TTL_HOURS", "0"),
        ("PAYMENT_TTL_HOURS", "tomorrow"),
        ("RETENTION_DAYS", "0"),
        ("RETURN_URL_ORIGINS", "shop.example.com"),
        ("RETURN_URL_ORIGINS", "https://shop.example.com/back"),
        ("RETURN_URL_ORIGINS", "*"),
        ("CORS_ORIGINS", "https://shop.example.com/x"),
        ("CORS_ORIGINS", "*"),
        ("PAY_FORM", "perhaps"),
        ("NOTIFY_URL", "shop.example.com/hook"),
        ("NOTIFY_SECRET", "opensesame"),
        ("NOTIFY_SECRET", "whsec_opensesame"),
        ("NOTIFY_SECRET", "whsec_" + "QUJD" * 4),
        ("NOTIFY_SECRET", f"{WHSEC},{WHSEC[:-4]},{WHSEC[:-8]}"),
        ("RATE_LIMIT", "300"),
        ("RATE_LIMIT", "0/minute"),
        ("RATE_LIMIT", "5/day"),
        ("TRUSTED_PROXIES", "-1"),
        ("TRUSTED_PROXIES", "all"),
        ("LOG_LEVEL", "LOUD"),
        ("WORKER_INTERVAL", "0"),
        ("RUN_WORKER", "2"),
    ],
)
def test_a_malformed_value_is_one_line_that_names_it(name: str, text: str) -> None:
    message = refusal(**{name: text})
    assert message.startswith(name)
    assert len(message.splitlines()) == 1


def test_no_message_quotes_a_secret() -> None:
    assert "opensesame" not in refusal(DATABASE_URL="mysql://shop:opensesame@db/pay")
    for password in ("open%sesame", "open sesame", "open%00sesame", "opensesame@[x"):
        assert "sesame" not in refusal(DATABASE_URL=f"postgresql://shop:{password}@db/pay")
    assert '"schema"' in refusal(DATABASE_URL="postgresql://shop:opensesame@db/pay?schema=public")
    assert "hush" not in refusal(PAYSTACK_SECRET_KEY="sk_hush_0123456789")
    assert LIVE_KEY not in refusal(PAYSTACK_SECRET_KEY=f"{SECRET_KEY},{LIVE_KEY}")
    assert "opensesame" not in refusal(NOTIFY_SECRET="whsec_opensesame")


def test_no_secret_is_in_the_repr_of_the_settings() -> None:
    keys = f"{SECRET_KEY},sk_test_another00"
    shown = repr(
        load(API_TOKEN="hush-1" * 3, METRICS_TOKEN="hush-2" * 3, NOTIFY_SECRET=WHSEC, PAYSTACK_SECRET_KEY=keys)
    )
    assert "Settings(" in shown
    for secret in (SECRET_KEY, "sk_test_another00", "opensesame", "hush", WHSEC, r"\x01"):
        assert secret not in shown


def test_the_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        load().port = 9000  # type: ignore[misc]


def test_the_key_alone_tells_test_from_live() -> None:
    assert load().mode == "test"
    assert load(PAYSTACK_SECRET_KEY=LIVE_KEY, PUBLIC_URL="https://pay.example.com").mode == "live"


def test_a_public_url_is_needed_as_soon_as_others_can_reach_the_service() -> None:
    assert load(HOST="::1", PORT="9000").public_url == "http://[::1]:9000"
    assert refusal(HOST="0.0.0.0").startswith("PUBLIC_URL")  # noqa: S104
    assert load(HOST="0.0.0.0", PUBLIC_URL="http://pay.example.com").public_url == "http://pay.example.com"  # noqa: S104


def test_a_live_key_needs_https() -> None:
    assert refusal(PAYSTACK_SECRET_KEY=LIVE_KEY).startswith("PUBLIC_URL")
    assert refusal(PAYSTACK_SECRET_KEY=LIVE_KEY, PUBLIC_URL="http://pay.example.com").startswith("PUBLIC_URL")


def test_notifications_are_never_sent_unsigned() -> None:
    assert refusal(NOTIFY_URL="https://shop.example.com/hook").startswith("NOTIFY_SECRET")
    settings = load(NOTIFY_URL="https://shop.example.com/hook", NOTIFY_SECRET=WHSEC)
    assert settings.notify_url == "https://shop.example.com/hook"


@pytest.mark.parametrize(("threads", "slots"), [(2, 1), (4, 3), (64, 48)])
def test_the_provider_may_hold_three_quarters_of_the_threads(threads: int, slots: int) -> None:
    assert load(THREADS=str(threads)).slots == slots


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://shop.example.com/thanks?x=1#y", "https://shop.example.com"),
        ("https://SHOP.example.com:443/", "https://shop.example.com"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:80/", "http://[::1]"),
        ("https://shop.example.com@evil.example/", None),
        ("https://shop.example.com\\@evil.example/", None),
        ("https://shop.example.com\\.evil.example/", None),
        ("https://shop.example.com:port/", None),
        ("https:///path", None),
        ("//shop.example.com/", None),
        ("javascript:alert(1)", None),
        ("/relative", None),
        ("https://[::1", None),
    ],
)
def test_an_origin_has_one_spelling_or_none(url: str, origin: str | None) -> None:
    assert settings.origin(url) == origin


# .env


def environment(folder: Path, text: str | bytes, **environ: str) -> dict[str, str]:
    dotenv = folder / ".env"
    dotenv.write_bytes(text.encode() if isinstance(text, str) else text)
    return settings.environment(dotenv, environ)


def test_the_environment_wins_over_dotenv(tmp_path: Path) -> None:
    assert environment(tmp_path, "PORT=8001\nTHREADS=16\n", PORT="9000") == {"PORT": "9000", "THREADS": "16"}


def test_no_dotenv_is_needed(tmp_path: Path) -> None:
    assert settings.environment(tmp_path / ".env", {"PORT": "9000"}) == {"PORT": "9000"}


def test_a_compiler_s_host_in_the_shell_is_not_ours(tmp_path: Path) -> None:
    for host in ("x86_64-conda-linux-gnu", "my-laptop", ""):
        assert "HOST" not in settings.environment(tmp_path / ".env", {"HOST": host})
    for host in ("0.0.0.0", "::", "localhost"):  # noqa: S104
        assert settings.environment(tmp_path / ".env", {"HOST": host}) == {"HOST": host}


def test_an_empty_value_counts_as_not_set(tmp_path: Path) -> None:
    assert environment(tmp_path, "API_TOKEN=\nMERCHANT_NAME=''\nHOST='  '\n", CURRENCIES="", PORT=" ") == {}


def test_dotenv_has_quotes_comments_and_export(tmp_path: Path) -> None:
    text = """
        # the shop
        export MERCHANT_NAME='Mama Put # Sons'
        API_TOKEN="two words" # not part of it
        PORT = 8001
    """
    expected = {"MERCHANT_NAME": "Mama Put # Sons", "API_TOKEN": "two words", "PORT": "8001"}
    assert environment(tmp_path, text) == expected


def test_nothing_in_dotenv_is_expanded(tmp_path: Path) -> None:
    text = "HOST='${HOME}'\nPORT=\"${HOME}\"\nTHREADS=${HOME}\nDB_POOL=$HOME\nCURRENCIES='$$ {x}'\n"
    expected = dict.fromkeys(("HOST", "PORT", "THREADS"), "${HOME}") | {"DB_POOL": "$HOME", "CURRENCIES": "$$ {x}"}
    shown = environment(tmp_path, text, HOME="/root")
    assert {name: shown[name] for name in expected} == expected


@pytest.mark.parametrize(
    "line", ["PAYSTACK_SECRET_KEY", "API_TOKEN='hush", "this is no setting", 'API_TOKEN="hush" hush', "=x"]
)
def test_a_broken_line_of_dotenv_stops_the_start(tmp_path: Path, line: str) -> None:
    with pytest.raises(settings.Invalid) as caught:
        environment(tmp_path, f"PORT=8001\n{line}\n")
    assert ".env, line 2" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert "hush" not in str(caught.value)


def test_a_dotenv_saved_by_a_windows_editor_is_read(tmp_path: Path) -> None:
    assert environment(tmp_path, b"\xef\xbb\xbfPORT=8001\r\nTHREADS=16\r\n") == {"PORT": "8001", "THREADS": "16"}


def test_a_dotenv_that_is_not_utf_8_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(settings.Invalid, match=r"\.env"):
        environment(tmp_path, b"MERCHANT_NAME=Caf\xe9\n")


def test_an_empty_variable_does_not_win_over_dotenv(tmp_path: Path) -> None:
    assert environment(tmp_path, "API_TOKEN=from-the-file-012\n", API_TOKEN="") == {"API_TOKEN": "from-the-file-012"}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("API_TOKN", "; is it API_TOKEN?"),
        ("api_token", "; is it API_TOKEN?"),
        ("SHOE_SIZE", ""),
        ("PAYSTACK_SECRET", "; is it PAYSTACK_SECRET_KEY?"),
    ],
)
def test_a_name_in_dotenv_that_nobody_reads_stops_the_start(tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(settings.Invalid) as caught:
        environment(tmp_path, f"PORT=8001\n{name}=hush\n")
    assert str(caught.value).endswith(f".env, line 2: nobody reads a setting of this name{hint}")


def test_dotenv_may_hold_what_is_read_and_what_compose_reads(tmp_path: Path) -> None:
    asked: set[str] = set()

    class Asked(dict[str, str]):
        def get(self, name: str, default: Any = None) -> Any:
            asked.add(name)
            return super().get(name, default)

    settings.load(Asked(NEEDED))
    example = re.findall("^#?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert {*asked, "POSTGRES_PASSWORD"} == set(settings.NAMES) == set(example)
    assert environment(tmp_path, "COMPOSE_PROJECT_NAME=till\n") == {"COMPOSE_PROJECT_NAME": "till"}


@pytest.mark.parametrize(
    ("settings_given", "said"),
    [
        ({"API_TOKEN": "x" * 15}, "API_TOKEN must have at least 16 characters"),
        ({"METRICS_TOKEN": "x" * 15}, "METRICS_TOKEN must have at least 16 characters"),
        ({"ADMIN_TOKEN": "x" * 19}, "ADMIN_TOKEN must have at least 20 visible ASCII characters"),
        ({"ADMIN_TOKEN": "é" * 20}, "ADMIN_TOKEN must have at least 20 visible ASCII characters"),
        (
            {"ADMIN_TOKEN": "x" * 20, "API_TOKEN": "x" * 20},
            "ADMIN_TOKEN must have at least 20 visible ASCII characters, and be no",
        ),
        (
            {"ADMIN_TOKEN": "x" * 20, "METRICS_TOKEN": "x" * 20},
            "ADMIN_TOKEN must have at least 20 visible ASCII characters, and be no",
        ),
        ({"CORS_ORIGINS": "https://*.example.com"}, "CORS_ORIGINS must be origins"),
        ({"CORS_ORIGINS": "*"}, "CORS_ORIGINS must be origins"),
        ({"RETURN_URL_ORIGINS": "javascript://x"}, "RETURN_URL_ORIGINS must be origins"),
        ({"RETURN_URL_ORIGINS": "myapp://"}, "RETURN_URL_ORIGINS must be origins"),
        ({"PUBLIC_URL": "https://päy.example.com"}, "PUBLIC_URL must be in ASCII"),
        ({"PUBLIC_URL": "https://*.example.com"}, "PUBLIC_URL must be an absolute URL"),
        ({"NOTIFY_URL": "https://päy.example.com", "NOTIFY_SECRET": WHSEC}, "NOTIFY_URL must be in ASCII"),
        (
            {
                "PAYSTACK_SECRET_KEY": "sk_live_0123456789",
                "PUBLIC_URL": "https://pay.example.com",
                "NOTIFY_URL": "http://shop.example.com/hook",
                "NOTIFY_SECRET": WHSEC,
            },
            "NOTIFY_URL must be https with a live key",
        ),
    ],
)
def test_what_would_match_nothing_or_be_weak_stops_the_start(settings_given: dict[str, str], said: str) -> None:
    with pytest.raises(settings.Invalid) as caught:
        settings.load({**NEEDED, **settings_given})
    assert str(caught.value).startswith(said)
    assert len(str(caught.value).splitlines()) == 1


# The start


def test_gunicorn_stops_with_one_line_that_names_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gunicorn", "--config", ROOT / "gunicorn.conf.py", "paygate:create_app()"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "DATABASE_URL": NEEDED["DATABASE_URL"]},
        capture_output=True,
        check=False,
        text=True,
        timeout=20,
    )
    assert done.returncode != 0
    assert re.search("PAYSTACK_SECRET_KEY is missing", done.stderr)
    assert len(done.stderr.splitlines()) == 1, done.stderr
