"""A PostgreSQL for the suite, and a fresh database for each test that asks for one."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from pytest_postgresql import factories

from commands.migrate import migrate
from local import embedded

# Neither a developer's configuration nor what is meant for another server may reach a test.
embedded.forget_libpq()
for name in ("DATABASE_URL", "PAYSTACK_SECRET_KEY", "PAYSTACK_URL"):
    os.environ.pop(name, None)


def pytest_configure() -> None:
    """SIGTERM ends a run as Ctrl-C does, so that the fixtures end the processes they started.

    A run in the background, or under nohup, ignores signals, and so would all that it starts and then interrupts.
    """
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.default_int_handler)


@dataclass(frozen=True)
class Server:
    """A server as pytest-postgresql wants it described."""

    host: str
    port: int
    user: str
    password: str | None
    template_dbname: str = "template1"
    maintenance_dbname: str = "postgres"
    options: str = ""


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The server at TEST_DATABASE_URL, else an embedded one of this process, in a temporary folder."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield server_at(url)
        return
    with embedded.temporary() as cluster:
        yield server_at(cluster.superuser_url)


def server_at(url: str) -> Server:
    parts = conninfo_to_dict(url)
    return Server(
        host=str(parts.get("host", "")),
        port=int(parts.get("port") or 5432),
        user=str(parts.get("user", "")),
        password=str(parts["password"]) if "password" in parts else None,
        maintenance_dbname=str(parts.get("dbname", "postgres")),
    )


def url_of(server: Server, dbname: str) -> str:
    password = f":{quote(server.password, safe='')}" if server.password else ""
    host = quote(server.host, safe="")
    return f"postgresql://{quote(server.user, safe='')}{password}@/{dbname}?host={host}&port={server.port}"


def load_schema(**database: Any) -> None:
    migrate(
        url_of(Server(**{name: database[name] for name in ("host", "port", "user", "password")}), database["dbname"])
    )


postgresql_noproc = factories.postgresql_noproc(depends_on="server", dbname="paygate", load=[load_schema])
postgresql = factories.postgresql("postgresql_noproc")


@pytest.fixture
def database_url(postgresql: psycopg.Connection[Any], server: Server) -> str:
    """The URL of a database of this test's own, with the schema and no rows."""
    return url_of(server, postgresql.info.dbname)


@pytest.fixture
def cluster() -> Iterator[embedded.Cluster]:
    """A server of this test's own, with no schema, to be restarted, killed and frozen."""
    with embedded.temporary() as cluster:
        yield cluster


@pytest.fixture(params=["America/New_York", "Pacific/Kiritimati"])
def elsewhere(request: pytest.FixtureRequest) -> Iterator[None]:
    """As on a machine whose own time zone is not UTC."""
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("TZ", request.param)
        time.tzset()
        yield
    time.tzset()
