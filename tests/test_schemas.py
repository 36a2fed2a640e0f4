"""Many businesses on one database: a schema and an account at the provider for each, and none sees another's."""

import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlsplit

import psycopg
import pytest

import commands
import db
from backstage import at_once, meanwhile
from commands.migrate import migrate, migrations
from invariants import check_books
from local.sandbox import Sandbox
from relay import Relay
from shop import ROOT, WEBHOOK, Server, Shop, environment, query, wait_until

ALL = [number for number, _ in migrations()]


@dataclass(frozen=True)
class Business:
    name: str
    """The schema's too."""
    url: str
    provider: Sandbox

    @property
    def env(self) -> dict[str, str]:
        return {
            "PAYSTACK_SECRET_KEY": self.provider.secret_key,
            "METRICS_TOKEN": "count-0123456789",
            "WORKER_INTERVAL": "0.2",
        }

    def serve(self, folder: Path) -> Server:
        folder.mkdir()
        return Server(self.url, self.provider, folder, **self.env)

    def manage(self, *arguments: str, url: str | None = None, status: int = 0) -> str:
        """What a command prints, which must end with this status."""
        run = subprocess.run(
            [sys.executable, str(ROOT / "manage.py"), *arguments],
            env={"PATH": os.environ["PATH"], **environment(url or self.url, self.provider, **self.env)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert run.returncode == status, run.stdout + run.stderr
        return run.stdout + run.stderr


def with_search_path(database_url: str, search_path: str) -> str:
    return f"{database_url}&options={quote(f'-csearch_path={search_path}')}"


@pytest.fixture(params=["options", "role"])
def pair(database_url: str, request: pytest.FixtureRequest) -> Iterator[list[Business]]:
    """Ada's and Ben's business, whose schemas are empty. The search_path comes with the URL, or by a role's default, as
    behind a pooler. In the schema `public` is a third one, of which nobody speaks."""
    roles = []
    with ExitStack() as stack, psycopg.connect(database_url, autocommit=True) as conn:
        found = []
        for name in ("ada", "ben"):
            conn.execute(f"CREATE SCHEMA {name}".encode())
            url = with_search_path(database_url, name)
            if request.param == "role":
                parts = urlsplit(database_url)
                roles.append(role := f"{name}_{secrets.token_hex(4)}")
                password = f" PASSWORD '{parts.password}'" if parts.password else ""
                conn.execute(f"CREATE ROLE {role} LOGIN{password}".encode())
                conn.execute(f"ALTER ROLE {role} SET search_path = {name}".encode())
                conn.execute(f"GRANT ALL ON SCHEMA {name} TO {role}".encode())
                conn.execute(f"GRANT CREATE ON DATABASE {conn.info.dbname} TO {role}".encode())
                credentials, _, host = parts.netloc.rpartition("@")
                user = role + (":" + credentials.partition(":")[2] if parts.password else "")
                url = parts._replace(netloc=f"{user}@{host}").geturl()
            provider = stack.enter_context(Sandbox(secret_key=f"sk_test_{name}_0123456789"))
            found.append(Business(name, url, provider))
        try:
            yield found
        finally:
            for role in roles:
                conn.execute(f"DROP OWNED BY {role} CASCADE".encode())
                conn.execute(f"DROP ROLE {role}".encode())


def test_two_businesses_on_one_database_see_nothing_of_each_other(
    pair: list[Business], database_url: str, tmp_path: Path
) -> None:
    for business in pair:
        assert migrate(business.url) == ALL
    with ExitStack() as stack:
        ada, ben = (stack.enter_context(business.serve(tmp_path / business.name)) for business in pair)
        ours, theirs = (server.create(key="order-1001", amount=50).json["payment"] for server in (ada, ben))
        assert ours["id"] != theirs["id"]
        assert ours["reference"] != theirs["reference"]
        assert ada.create(key="order-1001", amount=50).json["payment"]["id"] == ours["id"]
        for server, other in ((ada, theirs), (ben, ours)):
            assert server.request("GET", f"/api/v1/payments/{other['id']}").status_code == 404

        # A webhook for one; the other one's is lost, and found by its worker.
        for server, payment in ((ada, ours), (ben, theirs)):
            server.sandbox.pay(payment["reference"])
        event = ada.sandbox.event(ours["reference"])
        assert ben.request("POST", WEBHOOK, *event).status_code == 401
        assert ada.request("POST", WEBHOOK, *event).status_code == 200
        assert [status_of(ada, ours), status_of(ben, theirs)] == ["completed", "pending"]
        wait_until(lambda: status_of(ben, theirs) == "completed")

        for server in (ada, ben):
            metrics = server.request("GET", "/metrics", headers={"Authorization": "Bearer count-0123456789"}).text
            assert re.findall(r'^paygate_payments\{.*status="completed"\} (\S+)$', metrics, re.MULTILINE) == ["1"]
    for business, payment in zip(pair, (ours, theirs), strict=True):
        assert [row["id"] for row in check_books(business.url)] == [payment["id"]]
        assert query(business.url, "SELECT name, reference FROM provider_events") == (
            [{"name": "charge.success", "reference": ours["reference"]}] if payment is ours else []
        )
    assert check_books(database_url) == []


def status_of(server: Server, payment: dict[str, object]) -> object:
    return server.request("GET", f"/api/v1/payments/{payment['id']}").json["payment"]["status"]


@pytest.mark.parametrize("pair", ["role"], indirect=True)
def test_the_operator_of_one_business_works_on_no_other(
    pair: list[Business], database_url: str, tmp_path: Path
) -> None:
    ada, ben = pair
    paid = {}
    for business, amount in ((ada, 50), (ben, 70)):
        business.manage("migrate")
        with Shop(business.url, business.provider, PAYSTACK_SECRET_KEY=business.provider.secret_key) as shop:
            paid[business.name] = shop.created(amount=amount)
            shop.pay(paid[business.name]["reference"])
    for one, other in ((ada, ben), (ben, ada)):
        listed = one.manage("list")
        assert paid[one.name]["id"] in listed
        assert paid[other.name]["id"] not in listed
        one.manage("show", paid[other.name]["id"], status=1)
        one.manage("refund", paid[other.name]["id"], "--yes", status=1)
        assert "50.00" in (report := one.manage("report")) or one is ben
        assert "70.00" in report or one is ada
        one.manage("audit")
        one.manage("reconcile")
    ada.manage("refund", paid["ada"]["id"], "--amount", "20.00", "--yes")
    assert query(ada.url, "SELECT count(*) FROM refunds") == [{"count": 1}]
    assert query(ben.url, "SELECT count(*) FROM refunds") == [{"count": 0}]

    # What is backed up is one business's, and comes back without the others.
    ada.manage("backup", dump := str(tmp_path / "ada.dump"))
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(b"ALTER SCHEMA ada RENAME TO before")
        conn.execute(b"CREATE SCHEMA ada")
        conn.execute(f"GRANT ALL ON SCHEMA ada TO {psycopg.conninfo.conninfo_to_dict(ada.url)['user']}".encode())
    assert "whole" in ada.manage("restore", dump)
    assert [row["id"] for row in check_books(ada.url)] == [paid["ada"]["id"]]
    assert [row["id"] for row in check_books(ben.url)] == [paid["ben"]["id"]]


def test_the_schemas_of_one_database_are_migrated_at_once_and_each_in_turn(pair: list[Business]) -> None:
    ran = at_once([lambda url=business.url: (url, migrate(url)) for business in pair * 3])  # type: ignore[misc]
    for business in pair:
        assert sorted(number for url, numbers in ran if url == business.url for number in numbers) == ALL
        assert query(business.url, "SELECT count(*) FROM secrets") == [{"count": 1}]


def test_who_migrates_one_schema_waits_for_no_other(pair: list[Business]) -> None:
    ada, ben = pair
    done = threading.Event()

    def migrate_ada() -> list[int]:
        numbers = migrate(ada.url)
        done.set()
        return numbers

    with psycopg.connect(ada.url) as conn:
        conn.execute("SELECT pg_advisory_xact_lock(hashtext('paygate'), hashtext(current_schema()))")
        with meanwhile(migrate_ada) as migrated:
            assert migrate(ben.url) == ALL
            assert not done.wait(0.3)
            conn.commit()
            assert migrated() == ALL


def test_what_is_changed_from_another_schema_stands_in_its_own_trail(database_url: str, pair: list[Business]) -> None:
    """An operator's psql with another search_path meets the guards of the table that it names, and no other's."""
    ada, ben = pair
    for business in pair:
        migrate(business.url)
    with Shop(ada.url, ada.provider, PAYSTACK_SECRET_KEY=ada.provider.secret_key) as shop:
        payment = shop.created()
    for n, search_path in enumerate((ben.name, "public", "pg_catalog"), start=3):
        with psycopg.connect(with_search_path(database_url, search_path), autocommit=True) as conn:
            conn.execute("UPDATE ada.payments SET description = %s", [search_path])
            with pytest.raises(psycopg.errors.CheckViolation, match="has no charge that pays it"):
                conn.execute(
                    """
                    UPDATE ada.payments SET status = 'completed', paid_at = now(), charge_reference = reference,
                                            charged_minor = amount_minor
                    """
                )
        trail = query(ada.url, "SELECT n, why FROM payment_events WHERE payment_id = %s ORDER BY n", payment["id"])
        assert trail[-1] == {"n": n, "why": "by_hand"}
    assert len(check_books(ada.url)) == 1
    assert check_books(ben.url) == []


def test_a_pooler_that_drops_the_search_path_is_not_worked_through(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(b"CREATE SCHEMA ada")
    migrate(with_search_path(database_url, "ada"))
    with Relay(database_url) as relay, Sandbox(secret_key="sk_test_ada_0123456789") as provider:
        relay.replace(b"-csearch_path=ada", b"-cgeqo_effort=005")
        url = with_search_path(relay.url, "ada")
        ada = Business("ada", url, provider)
        complaint = 'its search_path is "$user", public, not ada as in the URL: a pooler ignores options'
        for command in ("migrate", "list", "audit", "doctor"):
            assert complaint in ada.manage(command, status=1)
        with Shop(url, provider, PAYSTACK_SECRET_KEY=provider.secret_key) as shop:
            assert shop.create(key="one").status_code == 503
            assert shop.client.simulate_get("/readyz").status_code == 503
    for schema in ("ada", "public"):
        assert check_books(with_search_path(database_url, schema)) == []


@pytest.mark.parametrize("option", ["-cSEARCH_PATH=ada", "--search-path=ada"])
def test_a_search_path_is_missed_however_its_name_is_written(database_url: str, option: str) -> None:
    """As PostgreSQL reads it: in any case, and with dashes."""
    with Relay(database_url) as relay:
        relay.replace(option.encode(), b"-cgeqo_effort=" + b"5".rjust(len(option) - 14, b"0"))
        with pytest.raises(db.DatabaseUnavailable, match="a pooler ignores options"):
            migrate(f"{relay.url}&options={quote(option)}")


@pytest.mark.parametrize("search_path", ["ada", '"ada"', "ada,pg_catalog", r"ada,\ pg_catalog", "ada -cwork_mem=8MB"])
def test_a_search_path_may_be_written_in_any_way(database_url: str, search_path: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(b"CREATE SCHEMA ada")
    url = with_search_path(database_url, search_path)
    assert migrate(url) == ALL
    with commands.reading(url) as conn, db.Database(url, 1) as database:
        assert conn.execute("SELECT current_schema() AS name").fetchone() == {"name": "ada"}
        assert db.is_ready(database)
