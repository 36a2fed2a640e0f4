# ruff: noqa: F811  (fixtures are imported by their names)
"""The customer's pages in English and French: each reader's own, whole, and nothing of the other one in it."""

import itertools
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest

from backstage import end_time
from customer import NOWHERE, TYPED, Page, counter, form, get, link, only_payment, post, send, went_to  # noqa: F401
from shop import PAYMENTS, ROOT, OpenShop, Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures
from states import STATES, declined, paid, refunded
from web import links
from web.languages import CODES, TEXTS

FRENCH = {"Accept-Language": "fr-SN,fr;q=0.9,en;q=0.8"}
TABLES = {code: tomllib.loads((TEXTS / f"{code}.toml").read_text(encoding="utf-8")) for code in CODES}


def in_french(shop: Shop, path: str, query: str = "", status: int = 200) -> Page:
    page = Page(get(shop, path, query, **FRENCH), status)
    assert page.language == "fr"
    return page


# Which language


@pytest.mark.parametrize(
    ("wanted", "language"),
    [
        *((None, "en"), ("", "en"), ("fr", "fr"), ("fr-CA", "fr"), ("FR-sn, en", "fr"), ("en, fr", "en"), ("*", "en")),
        *(("en;q=0.8, fr", "fr"), ("en;q=0.8,fr;q=0.9", "fr"), ("fr;q=0.8, en-GB;q=0.9", "en")),
        *(("fr;q=0.30,en;q=0.3", "fr"), ("wo, fr;q=0.5", "fr"), ("de, yo", "en"), ("fro, frank", "en")),
        *(("fr;q=0", "en"), ("fr;q=0, *", "en"), ("en;q=0, *;q=0.1", "fr"), ("de, *;q=0.5, fr;q=0.7", "fr")),
        *(("fr ; q=0.9 , en;q=0.8", "fr"), ("fr;q=2", "en"), ("fr;q=x, en;q=0.1", "en"), ("<fr>", "en")),
        *(("fr;q=1.000;x=y", "en"), ("de," * 30 + "fr", "en")),
    ],
)
def test_a_page_is_in_the_language_that_the_reader_likes_best(shop: Shop, wanted: str | None, language: str) -> None:
    page = Page(get(shop, NOWHERE, **({} if wanted is None else {"Accept-Language": wanted})), 404)
    assert page.language == language
    assert page.heading == {"en": "There is nothing here", "fr": "Il n’y a rien ici"}[language]
    assert page.answer.headers["vary"] == "Accept-Language"


def test_the_api_speaks_english_to_everybody(shop: Shop) -> None:
    english = shop.create(amount=0).json["errors"]
    french = shop.create(amount=0, headers=FRENCH)
    assert french.json["errors"] == english == {"amount": ["must be greater than 0"]}
    assert "vary" not in french.headers
    assert shop.client.simulate_get(PAYMENTS + "/x", headers=FRENCH).json["message"] == "There is no such payment."


# Whole


def flat(table: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """The texts of a table, each with where it stands."""
    if isinstance(table, str):
        yield path, table
    else:
        for name, each in table.items() if isinstance(table, dict) else enumerate(table):
            yield from flat(each, (*path, str(name)))


def test_no_text_is_missing_in_a_language_and_none_has_other_parts() -> None:
    shapes = {
        code: {
            path: sorted(re.findall(r"\{\w+\}|<[^>]+>", text))
            for path, text in flat(table)
            if path[0] not in ("errors", "signs")
        }
        for code, table in TABLES.items()
    }
    assert shapes["en"] == shapes["fr"]
    for words, said in TABLES["fr"]["errors"].items():
        assert re.findall(r"\{\w+\}", words) == re.findall(r"\{\w+\}", said), words
    assert not [path for table in TABLES.values() for path, text in flat(table) if not text]


def pieces(code: str) -> set[str]:
    """What a language's texts are made of, between the parts that are put in. The API's words are English."""
    texts = [text for path, text in flat(TABLES[code]) if path[0] != "signs"]
    if code == "en":
        texts += TABLES["fr"]["errors"]
    split = itertools.chain.from_iterable(re.split(r"\{\w+\}|<[^>]*>", text) for text in texts)
    return {re.sub(r"\s+", " ", piece).strip(" .,:;?!«»") for piece in split}


def own(code: str) -> set[str]:
    """The pieces that have a word of three letters and are not the same in the other language."""
    [other] = set(CODES) - {code}
    return {piece for piece in pieces(code) - pieces(other) if re.search(r"[^\W\d_]{3}", piece)}


def found(code: str, page: Page) -> set[str]:
    text = re.sub(r"\s+", " ", page.text)
    return {piece for piece in own(code) if re.search(rf"(?<!\w){re.escape(piece)}(?!\w)", text)}


def check_both(shop: Shop, path: str, query: str = "", status: int = 200, **sent: Any) -> None:
    """A page is of one language, in either: what is asked for, or sent as a form."""
    for code, other in itertools.permutations(CODES):
        headers = {"Accept-Language": code, "Accept": "text/html"}
        page = Page(post(shop, sent, **headers) if sent else get(shop, path, query, **headers), status)
        assert page.language == code
        assert found(code, page)
        assert not found(other, page)


@pytest.mark.parametrize("state", STATES)
def test_a_payment_s_page_is_of_one_language(counter: Shop, state: str) -> None:
    payment = STATES[state][0](counter)
    check_both(counter, f"/pay/{payment['id']}")
    check_both(counter, f"/pay/{payment['id']}", "reference=x")


def test_a_payment_that_is_being_opened_is_of_one_language(counter: Shop) -> None:
    counter.sandbox.fault("initialize", "lost-request", times=20)
    page = Page(send(counter, form(counter)), 503)
    check_both(counter, f"/pay/{only_payment(counter)['id']}")
    check_both(counter, "/pay", status=503, **page.fields)


def test_forms_are_of_one_language(open_shop: OpenShop) -> None:
    for currencies in ("XOF", "NGN", "NGN,GHS,KES,ZAR,USD,XOF"):
        shop = open_shop(PAY_FORM="on", CURRENCIES=currencies)
        check_both(shop, "/pay")
        check_both(shop, "/")
    check_both(shop, "/pay", link(shop, order="1001", expires="4102444800"))
    check_both(shop, "/pay", "signature=x", status=403)
    check_both(shop, "/pay", link(shop, expires="1"), status=410)
    links.withdraw(shop.app.database, "test", "1002", "operator:ada")
    check_both(shop, "/pay", link(shop, order="1002"), status=410)
    went_to(post(shop, {**TYPED, "key": "one"}))
    check_both(shop, "/pay", status=422, **{**TYPED, "key": "one", "amount": "60"})
    end_time(shop.database_url, only_payment(shop)["id"])
    limited = open_shop(PAY_FORM="on", RATE_LIMIT="1/hour")
    post(limited, TYPED)
    check_both(limited, "/pay", status=429, **TYPED)


def test_what_goes_wrong_is_told_in_one_language(counter: Shop) -> None:
    payment = counter.created()
    check_both(counter, "/pay", status=400, customer_name="\ud800".encode("utf-8", "surrogatepass"))
    counter.app.database.close()
    check_both(counter, f"/pay/{payment['id']}", status=503)


# Errors of fields

WRONG = [
    ({"customer_name": " "}, "customer_name", "Votre nom : à remplir"),
    ({"customer_name": None}, "customer_name", "Votre nom : à remplir"),
    ({"customer_name": "x" * 101}, "customer_name", "Votre nom : 100 caractères au plus"),
    ({"customer_name": "a\nb"}, "customer_name", "Votre nom : ni caractères de contrôle"),
    ({"location": "4084 0840 8408 4081"}, "location", "Ville : pas de numéro de carte ici"),
    ({"customer_email": "john@"}, "customer_email", "Adresse e-mail : doit ressembler à john@example.com"),
    ({"customer_email": "x" * 254 + "@example.com"}, "customer_email", "Adresse e-mail : 254 caractères au plus"),
    ({"customer_phone": "801"}, "customer_phone", "Téléphone : 7 à 15 chiffres, précédés ou non d’un +"),
    ({"amount": "0"}, "amount", "Montant : doit être supérieur à 0"),
    ({"amount": "49.99"}, "amount", "Montant : 50,00\u00a0NGN au moins"),
    ({"amount": "1.234.5"}, "amount", "Montant : pas assez clair, écrivez par exemple 1500 ou 1 500,50"),
    ({"amount": "cent", "currency": "XOF"}, "amount", "Montant : pas assez clair, écrivez par exemple 1500 ou 1 500"),
    ({"amount": "50,5", "currency": "XOF"}, "amount", "Montant : un montant entier en XOF"),
    ({"amount": "1500.505"}, "amount", "Montant : 2 décimales au plus en NGN"),
    ({"amount": "1" * 13}, "amount", "Montant : 12 chiffres au plus avant la virgule"),
]


@pytest.mark.parametrize(("typed", "name", "said"), WRONG)
def test_what_is_wrong_with_a_field_is_said_in_french(
    open_shop: OpenShop, typed: dict[str, str | None], name: str, said: str
) -> None:
    shop = open_shop(PAY_FORM="on", CURRENCIES="NGN,XOF")
    fields = {**TYPED, "currency": "NGN", "key": "one", **typed}
    sent = {field: value for field, value in fields.items() if value is not None}
    page = Page(post(shop, sent, **FRENCH), 422)
    assert page.title.startswith("Erreur\u00a0: ")
    assert said.replace(" :", "\u00a0:") in page.described(name)
    check_both(shop, "/pay", status=422, **sent)


OF_NO_FORM = (
    *("must be a string", "must be an object", "must have strings", "must have at most 20", "must have values"),
    *("must be at most 4096", "must be an absolute URL", "must be at an origin"),
    *("must be a whole number", "must be a date", "is not a field", "is not JSON"),
)
"""How the errors begin that a form cannot be sent with."""


def test_the_table_has_each_error_that_a_form_can_be_sent_with_and_no_other() -> None:
    sources = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("web/orders.py", "money.py"))
    messages = {re.sub(r"\{.*?\}", "{}", said) for said in re.findall(r'"((?:must|is) [^"]+)"', sources)}
    messages = {said for said in messages if not said.startswith(OF_NO_FORM)}
    messages.add("must be clear: write it like 1500 or 1,500.50")
    messages.remove("must have at most 254 characters")  # as that of other lengths
    assert messages == {re.sub(r"\{.*?\}", "{}", words) for words in TABLES["fr"]["errors"]}


def test_paystack_s_own_words_stay_as_they_came(counter: Shop) -> None:
    assert "Insufficient Funds" in in_french(counter, f"/pay/{declined(counter)['id']}").text
    refusal = {"status": False, "message": "Invalid Email Address Passed", "code": "invalid_email_address"}
    counter.sandbox.fault("initialize", "answer", effect=False, status=400, body=refusal)
    page = Page(post(counter, {**TYPED, "key": "one"}, **FRENCH), 422)
    assert page.described("customer_email") == "Adresse e-mail\u00a0: Invalid Email Address Passed"


# Money and dates


def test_money_and_dates_are_written_as_the_french_do(open_shop: OpenShop) -> None:
    shop = open_shop(CURRENCIES="XOF,NGN", TIMEZONE="Africa/Dakar")
    francs = in_french(shop, f"/pay/{paid(shop, amount='1250000')['id']}")
    assert francs.facts["Payé"] == "1\u00a0250\u00a0000\u00a0F\u00a0CFA"
    month = "janvier février mars avril mai juin juillet août septembre octobre novembre décembre".replace(" ", "|")
    assert re.fullmatch(rf"\d{{1,2}} ({month}) \d{{4}} à \d\d:\d\d GMT", francs.facts["Payé le"])
    naira = in_french(shop, f"/pay/{refunded(shop, 2050, currency='NGN')['id']}")
    assert naira.facts["Payé"] == "50,00\u00a0NGN"
    assert naira.facts["Remboursé"].startswith("20,50\u00a0NGN")
    asked = in_french(open_shop(PAY_FORM="on"), "/pay", link(shop, amount="1234567.50"))
    assert asked.heading == "1\u00a0234\u00a0567,50\u00a0NGN"


@pytest.mark.parametrize(
    ("typed", "amount_minor"),
    [
        *(("1500,50", 150050), ("1 500,5", 150050), ("75,00", 7500), ("1 500,00 NGN", 150000)),
        *(("1,500", 150000), ("1500.50", 150050)),
    ],
)
def test_a_french_form_takes_a_comma_before_the_decimals(counter: Shop, typed: str, amount_minor: int) -> None:
    went_to(post(counter, {**TYPED, "amount": typed}, **FRENCH))
    assert only_payment(counter)["amount_minor"] == amount_minor


def test_every_text_escapes_what_is_put_in(open_shop: OpenShop) -> None:
    evil = '<i>"Shop"</i> {0.__class__} %s &amp;'
    shop = open_shop(PAY_FORM="on", MERCHANT_NAME=evil, MERCHANT_CONTACT="https://shop.example.com/?a=<i>{0}")
    payment = shop.created(description=evil, metadata={"order": evil})
    shop.sql("UPDATE payments SET status_reason = %s WHERE id = %s", f"last try declined: {evil}", payment["id"])
    asked = link(shop, description=evil, order=evil)
    for page in (in_french(shop, f"/pay/{payment['id']}"), in_french(shop, "/pay", asked)):
        assert not page.all("i")
        assert page.text.count(evil) >= 4
    page = Page(post(shop, {**TYPED, "currency": evil}, **FRENCH), 422)
    assert page.of("p").count("currency\u00a0: à choisir parmi NGN") == 1
