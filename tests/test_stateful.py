# ruff: noqa: F811  (fixtures are imported by their names)
"""Payments and a thousand events in every order: whatever comes, however often, a payment ends as the model says."""

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    get_state_machine_test,
    initialize,
    multiple,
    precondition,
    rule,
)

from backstage import at_once, end_time, fresh_seed, poll
from invariants import check_books
from local.sandbox import sign
from shop import Shop, open_shop, sandbox, shop  # noqa: F401

PRICE = 5000
HOW_PAID: dict[str, dict[str, Any]] = {
    "in full": {},
    "too much": {"amount": PRICE + 100},
    "with the fees": {"fees_by_customer": True},
    "too little": {"amount": PRICE - 1},
    "in another currency": {"currency": "GHS"},
}
PAYS = ("in full", "too much", "with the fees")

Post = tuple[bytes, dict[str, str]]


@dataclass
class Model:
    """What a payment should be, by nothing but the order in which paygate hears of its charges."""

    id: str
    references: list[str]
    answer: str
    paid: dict[str, str] = field(default_factory=dict)  # how each reference was paid
    declined: set[str] = field(default_factory=set)
    own: str | None = None
    status: str = "pending"
    is_over: bool = False
    incidents: set[tuple[str, str]] = field(default_factory=set)

    def hear(self, reference: str) -> None:
        """The first charge is the payment's own; every other one is an incident and nothing else."""
        if self.own is None:
            self.own = reference
            pays = self.paid[reference] in PAYS
            self.status = "completed" if pays else "review"
            if not pays:
                self.incidents.add(("mismatch", reference))
        elif self.own != reference:
            self.incidents.add(("second_charge", reference))

    def be_looked_at(self) -> None:
        if self.own is not None:
            return
        for reference in self.references:
            if reference in self.paid:
                self.hear(reference)
        if self.own is None and self.is_over and self.status == "pending":
            self.status = "failed" if self.declined else "expired"


def opened(shop: Shop, key: str, *, with_a_lost_answer: bool) -> Model:
    """A new payment; with a lost answer it has two transactions that can be paid, the first without a disclosed URL."""
    if with_a_lost_answer:
        shop.sandbox.fault("initialize", "lost-answer")
    answer = shop.create(key=key)
    assert answer.status_code == 201, answer.text
    payment = answer.json["payment"]
    first = payment["reference"].removesuffix("-2")
    assert (first != payment["reference"]) == with_a_lost_answer
    return Model(payment["id"], sorted({first, payment["reference"]}), answer.text)


def forged(shop: Shop, reference: str) -> Post:
    """What somebody would send who knows everything but the key."""
    body, headers = shop.sandbox.event(reference, status="success", amount=PRICE)
    return body, {**headers, "x-paystack-signature": sign(body, "sk_test_not_the_right_one")}


def changed(shop: Shop, reference: str) -> Post:
    """A genuine signature over other bytes."""
    body, headers = shop.sandbox.event(reference, status="success", amount=PRICE)
    return body.replace(b'"success"', b'"success" ', 1), headers


class Trade(RuleBasedStateMachine):
    """Everything that customers, the provider, forgers and the worker may do to payments, one after the other."""

    payments: Bundle[Model] = Bundle("payments")
    rounds = 0
    events: ClassVar[Counter[str]] = Counter()

    def __init__(self, shop: Shop) -> None:
        super().__init__()
        self.shop = shop
        Trade.rounds += 1
        self.models: list[Model] = []
        self.posts: list[tuple[Model, str, Post]] = []  # every event of money so far, delivered or not

    @initialize(target=payments, chance=st.randoms(use_true_random=False))
    def open_and_pay_some(self, chance: random.Random) -> Any:
        new = [self.open(with_a_lost_answer=number % 2 == 0) for number in range(6)]
        for _ in range(7):
            self.pay(chance.choice(new), chance.choice(sorted(HOW_PAID)), chance)
        return multiple(*new)

    @rule(target=payments, with_a_lost_answer=st.booleans())
    def open(self, with_a_lost_answer: bool) -> Model:
        key = f"{Trade.rounds}-{len(self.models)}"
        self.models.append(opened(self.shop, key, with_a_lost_answer=with_a_lost_answer))
        return self.models[-1]

    @rule(payment=payments, how=st.sampled_from(sorted(HOW_PAID)), chance=st.randoms(use_true_random=False))
    def pay(self, payment: Model, how: str, chance: random.Random) -> None:
        """With a card that works; a second time on the payment's other page, where it has one."""
        unpaid = [reference for reference in payment.references if reference not in payment.paid]
        if unpaid:
            reference = chance.choice(unpaid)
            self.shop.sandbox.pay(reference, **HOW_PAID[how])
            payment.paid[reference] = how
            payment.declined.discard(reference)
            self.posts.append((payment, reference, self.shop.sandbox.event(reference)))

    @rule(payment=payments)
    def decline(self, payment: Model) -> None:
        reference = payment.references[-1]
        if reference not in payment.paid:
            self.shop.sandbox.decline(reference)
            payment.declined.add(reference)

    @rule(payment=payments)
    def end_the_time(self, payment: Model) -> None:
        if payment.status == "pending":
            end_time(self.shop.database_url, payment.id)
            payment.is_over = True

    @precondition(lambda self: self.posts)
    @rule(chance=st.randoms(use_true_random=False), number=st.integers(1, 12))
    def deliver(self, chance: random.Random, number: int) -> None:
        """Any events so far, in any order, some of them again and again."""
        for delivery in chance.choices(self.posts, k=number):
            self.deliver_one(*delivery)

    def deliver_one(self, payment: Model, reference: str, post: Post) -> None:
        assert self.shop.webhook(*post).status_code == 200
        payment.hear(reference)
        Trade.events["genuine"] += 1
        self.check(payment)

    @rule(payment=payments, forge=st.sampled_from([forged, changed]))
    def forge(self, payment: Model, forge: Any) -> None:
        assert self.shop.webhook(*forge(self.shop, payment.references[-1])).status_code == 401
        Trade.events["forged"] += 1
        self.check(payment)

    @rule(payment=payments, of=st.sampled_from(["live", "refund.processed", "subscription.create"]))
    def send_what_is_no_money(self, payment: Model, of: str) -> None:
        """Signed, about a payment of ours, and no reason to believe that it is paid."""
        reference = payment.references[-1]
        event = "charge.success" if of == "live" else of
        data = {"reference": reference, "domain": "live" if of == "live" else "test", "status": "success"}
        body = json.dumps({"event": event, "data": {**data, "amount": PRICE, "currency": "NGN"}}).encode()
        headers = {"x-paystack-signature": sign(body, self.shop.sandbox.secret_key)}
        assert self.shop.webhook(body, headers).status_code == 200
        Trade.events["of no money"] += 1
        self.check(payment)

    @rule()
    def poll(self) -> None:
        poll(self.shop)
        for payment in self.models:
            payment.be_looked_at()
            self.check(payment)

    @rule(payment=payments)
    def ask_again_with_the_same_key(self, payment: Model) -> None:
        number = self.models.index(payment)
        answer = self.shop.create(key=f"{Trade.rounds}-{number}")
        assert (answer.status_code, answer.json["payment"]) == (201, self.shop.get(payment.id))

    def check(self, payment: Model) -> None:
        told = self.shop.get(payment.id)
        assert told["status"] == payment.status
        assert (told["paid_at"] is not None) == (payment.status == "completed")
        assert (told["checkout_url"] is not None) == (payment.status == "pending")

    def teardown(self) -> None:
        """At last every event comes, in either order, some for the tenth time, and the worker looks."""
        for delivery in (self.posts[::-1] + self.posts) * 4:
            self.deliver_one(*delivery)
        self.poll()
        for payment in self.models:
            assert (payment.own is not None) == bool(payment.paid)
        self.check_incidents()
        # The next round, in the same database, has nothing to do with these.
        self.shop.sql("UPDATE payments SET poll_at = NULL")

    def check_incidents(self) -> None:
        ours = [payment.id for payment in self.models]
        rows = self.shop.sql("SELECT kind, subject FROM incidents WHERE payment_id = ANY(%s)", ours)
        expected = Counter(incident for payment in self.models for incident in payment.incidents)
        assert Counter((row["kind"], row["subject"]) for row in rows) == expected


def test_events_in_any_order_end_in_the_models_state(shop: Shop) -> None:
    Trade.events.clear()
    options = settings(
        max_examples=8,
        stateful_step_count=30,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # to shrink a failure takes minutes here, and the seed finds it again
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    test = get_state_machine_test(lambda: Trade(shop), settings=options)  # type: ignore[arg-type]
    hypothesis.seed(fresh_seed())(test)()
    rows = check_books(shop.database_url)
    print(f"{dict(Trade.events)} events of {len(rows)} payments")


def test_a_thousand_events_at_once_end_in_the_models_state(shop: Shop) -> None:
    """Eight senders, who share all events, each of them in an order of its own: of two charges of one payment either
    may be the first, and exactly one is."""
    chance = random.Random(fresh_seed())  # noqa: S311
    payments = [opened(shop, f"order-{number}", with_a_lost_answer=number % 3 == 0) for number in range(45)]
    posts: list[Post] = []
    for payment in payments:
        for reference in chance.sample(payment.references, chance.randint(0, len(payment.references))):
            payment.paid[reference] = chance.choice(sorted(HOW_PAID))
            shop.sandbox.pay(reference, **HOW_PAID[payment.paid[reference]])
            posts += [shop.sandbox.event(reference)] * 30
        posts += [forged(shop, payment.references[-1]), changed(shop, payment.references[-1])]
    chance.shuffle(posts)
    assert len(posts) > 600

    def send(share: int) -> Counter[int]:
        return Counter(shop.webhook(*post).status_code for post in posts[share::8])

    answers = sum(at_once([partial(send, share) for share in range(8)]), Counter())
    assert answers == {401: 2 * len(payments), 200: len(posts) - 2 * len(payments)}
    expected: set[tuple[str, str]] = set()
    rows = {row["id"]: row for row in check_books(shop.database_url)}
    for payment in payments:
        own = rows[payment.id]["charge_reference"]
        assert (own is not None) == bool(payment.paid)
        for reference in [own, *(other for other in payment.paid if other != own)] if own else []:
            payment.hear(reference)
        assert rows[payment.id]["status"] == payment.status
        expected |= payment.incidents
    assert {(row["kind"], row["subject"]) for row in shop.sql("SELECT kind, subject FROM incidents")} == expected
