# ruff: noqa: F811  (fixtures are imported by their names)
"""Lists that harm nobody."""

import csv
import io
import json
import re
from datetime import UTC, datetime, timedelta

import pytest

import commands
from ledger import as_superuser
from shop import Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures

HARMFUL = {
    "formula": "=HYPERLINK(1)",
    "plus": "+1+1",
    "minus": "-2+3",
    "at": "@SUM(A1)",
    "wide": "＝1+1",
    "quotes": 'John "Johnny" O\'Doe, Jr; x',
    "emoji": "John 👩‍👧 Doe ✔",
    "arabic": "محمد علي",
    "hebrew": "יוחנן דו",
}
UNSTORABLE = {  # no request brings these in, but an import by SQL may
    "tab": "\tJohn\tDoe",
    "lines": "John\r\nDoe",
    "escape": "John \x1b[2J\x1b]0;title\x07 Doe",
    "override": "John \u202eeoD",
}


def test_the_list_is_newest_first_and_of_one_mode(shop: Shop, till: Till) -> None:
    ids = [shop.created()["id"] for _ in range(3)]
    out = till.did("list")
    assert re.findall(r"PAY-\w{26}", out)[:3] == ids[::-1]
    live = till.did("list", PAYSTACK_SECRET_KEY="sk_live_0123456789abcdef")
    assert "PAY-" not in live


@pytest.mark.usefixtures("elsewhere")
def test_the_list_is_chosen_by_status_customer_and_time(shop: Shop, till: Till) -> None:
    first, second = paid(shop), shop.created(customer_email="Jane@Example.com")

    def listed(*words: str) -> list[str]:
        return [payment["id"] for payment in json.loads(till.did("list", "--json", *words))]

    assert listed("--status", "completed") == [first["id"]]
    assert listed("--email", "jane@example.COM") == [second["id"]]
    assert listed("--limit", "1") == [second["id"]]
    assert listed("--limit", "0") == [second["id"], first["id"]]
    today = datetime.now(UTC).date()
    assert listed("--since", str(today)) == [second["id"], first["id"]]
    assert listed("--until", str(today)) == []
    assert listed("--since", f"{today + timedelta(days=1)}") == []
    assert listed("--status", "refunded") == []
    till.did("refund", first["id"])
    assert listed("--status", "paid") == [first["id"]]


def test_a_payment_is_found_by_what_the_merchant_and_the_customer_know(shop: Shop, till: Till) -> None:
    one = shop.create("order-1001", metadata={"order": "1001"}, customer_phone="0803 111 2222").json["payment"]
    two = shop.create("order-1002", metadata={"order": "1002"}, customer_phone="+234 803 333 4444").json["payment"]
    again = shop.create("order-1002-b", metadata={"order": "1002"}).json["payment"]

    def listed(*words: str) -> list[str]:
        return [payment["id"] for payment in json.loads(till.did("list", "--json", *words))]

    assert listed("--order", "1001") == [one["id"]]
    assert listed("--order", "1002") == [again["id"], two["id"]]
    assert listed("--order", "100") == []
    assert listed("--reference", two["reference"]) == listed("--reference", two["reference"] + "-3") == [two["id"]]
    assert listed("--reference", "PG-1") == []
    for phone in ("08031112222", "+234 803 111 2222", "803-111-2222"):
        assert listed("--phone", phone) == [one["id"]]
    for name in ("order-1001", "1001"):
        assert till.did("show", name).startswith(one["id"])
    several = till.run("show", "1002")
    assert (several.status, "manage.py list --order 1002" in several.err) == (1, True)
    assert till.run("show", "1003").status == 1


def test_a_list_says_when_there_are_more(shop: Shop, till: Till) -> None:
    for _ in range(3):
        shop.created()
    for limit, more in (("2", True), ("3", False), ("4", False), ("0", False)):
        for form in ("table", "json", "csv"):
            done = till.run("list", "--limit", limit, "--format", form)
            listed = re.findall(r"PAY-\w{26}", done.out)
            assert len(set(listed)) == min(3, int(limit) or 3)
            assert ("there are more than 2: --limit 0" in done.err) == more


@pytest.mark.usefixtures("elsewhere")
def test_days_and_times_are_the_merchant_s(shop: Shop, till: Till) -> None:
    payment = shop.created()
    as_superuser(till, "UPDATE payments SET created_at = '2026-01-31T23:30:00Z' WHERE id = %s", payment["id"])
    day = ("--since", "2026-02-01", "--until", "2026-02-02")
    assert payment["id"] not in till.did("list", *day)
    told = till.did("list", *day, TIMEZONE="Africa/Lagos")
    assert f"2026-02-01 00:30 WAT   {payment['id']}" in told
    assert '"created_at": "2026-01-31T23:30:00Z"' in till.did("list", *day, "--json", TIMEZONE="Africa/Lagos")


def names_told(till: Till) -> dict[str, list[str]]:
    table = till.did("list", "--limit", "0")
    rows = list(csv.DictReader(io.StringIO(till.did("list", "--limit", "0", "--format", "csv"), newline="")))
    return {
        "table": [re.split(r" NGN [0-9,.]+  ", line, maxsplit=1)[1] for line in table.splitlines() if "NGN" in line],
        "csv": [row["customer_name"] for row in rows],
        "json": [row["customer_name"] for row in json.loads(till.did("list", "--limit", "0", "--json"))],
    }


def test_every_name_comes_through_table_csv_and_json_unharmed_and_harmless(shop: Shop, till: Till) -> None:
    for name in HARMFUL.values():
        shop.created(customer_name=name)
    for name in UNSTORABLE.values():
        payment = shop.created()
        as_superuser(till, "UPDATE payments SET customer_name = %s WHERE id = %s", name, payment["id"])
    names = [*HARMFUL.values(), *UNSTORABLE.values()][::-1]
    told = names_told(till)
    assert told["json"] == names
    assert [name.removeprefix("'") for name in told["csv"]] == names
    assert not any(re.match(r"[=+\-@\t\r\n＝＋－＠]", name) for name in told["csv"])
    assert all(name.isprintable() or set(name) & set("\u200d") for name in told["table"])
    assert [line.partition(" <")[0] for line in told["table"]] == [commands.plain(name) for name in names]
    assert "\\u001b[2J" in commands.plain(UNSTORABLE["escape"])


def test_csv_has_the_members_of_get_and_the_rest_as_its_header(shop: Shop, till: Till) -> None:
    payment = paid(shop, metadata={"order": "7", "sku": "=1"}, location="Lagos")
    (row,) = csv.DictReader(io.StringIO(till.did("list", "--format", "csv")))
    told = shop.get(payment["id"])
    assert list(row) == [*told, "customer_phone", "location", "metadata"]
    assert (row["amount"], row["refunded_amount"], row["status_reason"]) == ("50.00", "0.00", "")
    assert json.loads(row["metadata"]) == {"order": "7", "sku": "=1"}
    (exported,) = json.loads(till.did("list", "--json"))
    assert {name: exported[name] for name in told} == told
    assert exported["metadata"] == {"order": "7", "sku": "=1"}


def test_an_empty_list_is_still_what_a_program_can_read(till: Till) -> None:
    assert json.loads(till.did("list", "--json")) == []
    assert till.did("list", "--format", "csv").count("\n") == 1


def test_since_is_included_and_until_is_not(shop: Shop, till: Till) -> None:
    payment = shop.created()
    as_superuser(till, "UPDATE payments SET created_at = '2026-02-01T00:00:00Z'")
    assert payment["id"] in till.did("list", "--since", "2026-02-01")
    assert payment["id"] not in till.did("list", "--until", "2026-02-01")
    assert payment["id"] in till.did("list", "--until", "2026-02-01T00:00:01")


def test_the_table_shows_the_price(shop: Shop, till: Till) -> None:
    shop.created(amount="1234.50")
    paid(shop, customer_email="pays-fees@example.com", amount="5000")
    out = till.did("list")
    assert " NGN 1,234.50  John Doe" in out and " NGN 5,000.00  John Doe" in out
