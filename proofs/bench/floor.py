"""The floor: a bare Falcon app that does what any such service must do for each request, and nothing else.

POST: two short transactions, each one statement, around one call to the provider through a kept `requests.Session`.
GET: one SELECT. Webhook: one transaction of two statements.

It checks nothing, signs nothing, logs nothing, audits nothing, and answers no retry. Its routes and answers are those
of paygate, so that the same requests measure both. It prepares no statements, as for a pooler (FLOOR_PREPARES=1: as
psycopg does by itself).
"""

import datetime
import hashlib
import json
import os
import secrets
from typing import Any, LiteralString

import falcon
import psycopg
import requests
import requests.adapters
from psycopg_pool import ConnectionPool

Pool = ConnectionPool[psycopg.Connection[tuple[Any, ...]]]

SCHEMA = """
CREATE TABLE payments (
    id text PRIMARY KEY, reference text NOT NULL UNIQUE, status text NOT NULL DEFAULT 'pending',
    amount_minor bigint NOT NULL, currency text NOT NULL, customer_name text NOT NULL, customer_email text NOT NULL,
    customer_phone text NOT NULL, location text NOT NULL, checkout_url text,
    created_at timestamptz NOT NULL DEFAULT now(), paid_at timestamptz);
CREATE TABLE idempotency_keys (key text PRIMARY KEY, payment_id text NOT NULL, answer text);
CREATE TABLE provider_events (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, digest bytea NOT NULL UNIQUE, body text NOT NULL,
    applied_at timestamptz);
CREATE TABLE charges (reference text PRIMARY KEY, payment_id text NOT NULL, amount_minor bigint NOT NULL);
"""


def create_app() -> falcon.App[falcon.Request, falcon.Response]:
    pool: Pool = ConnectionPool(
        os.environ["DATABASE_URL"],
        kwargs={"autocommit": True, "prepare_threshold": 5 if os.environ.get("FLOOR_PREPARES") else None},
        min_size=1,
        max_size=int(os.environ["DB_POOL"]),
        open=True,
    )
    session = requests.Session()
    session.trust_env = False  # it would read .netrc and the environment for each call
    session.headers["Authorization"] = f"Bearer {os.environ['PAYSTACK_SECRET_KEY']}"
    session.mount("http://", requests.adapters.HTTPAdapter(pool_connections=1, pool_maxsize=256))
    app = falcon.App()
    app.add_route("/api/v1/payments", Payments(pool, session, os.environ["PAYSTACK_URL"]))
    app.add_route("/api/v1/payments/{payment_id}", PaymentById(pool))
    app.add_route("/api/v1/webhooks/paystack", Webhook(pool))
    app.add_route("/readyz", Readiness(pool))
    return app


class Payments:
    def __init__(self, pool: Pool, session: requests.Session, provider: str) -> None:
        self.pool = pool
        self.session = session
        self.url = provider + "/transaction/initialize"

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        order = req.get_media()
        payment_id, reference = f"PAY-{secrets.token_hex(13).upper()}", f"PG-{secrets.token_hex(13).upper()}"
        key = req.get_header("Idempotency-Key")
        amount_minor = round(order["amount"] * 100)
        row = {**order, "key": key, "id": payment_id, "reference": reference, "amount_minor": amount_minor}
        with self.pool.connection() as conn:
            conn.execute(
                """
                WITH taken AS (INSERT INTO idempotency_keys (key, payment_id) VALUES (%(key)s, %(id)s)
                               RETURNING payment_id)
                INSERT INTO payments (id, reference, amount_minor, currency, customer_name, customer_email,
                                      customer_phone, location)
                SELECT payment_id, %(reference)s, %(amount_minor)s, 'NGN', %(customer_name)s, %(customer_email)s,
                       %(customer_phone)s, %(location)s
                  FROM taken
                """,
                row,
            )
        answer = self.session.post(
            self.url,
            json={
                "reference": reference,
                "email": order["customer_email"],
                "amount": amount_minor,
                "currency": "NGN",
                "callback_url": f"http://127.0.0.1/pay/{payment_id}",
                "metadata": {"payment": payment_id},
            },
            timeout=10,
        )
        url = answer.json()["data"]["authorization_url"]
        with self.pool.connection() as conn:
            conn.execute(
                """
                WITH opened AS (UPDATE payments SET checkout_url = %(url)s WHERE id = %(id)s RETURNING id)
                UPDATE idempotency_keys SET answer = %(url)s FROM opened WHERE key = %(key)s
                """,
                {**row, "url": url},
            )
        resp.status = falcon.HTTP_201
        resp.media = {
            "payment": {
                "id": payment_id,
                "customer_name": order["customer_name"],
                "customer_email": order["customer_email"],
                "amount": order["amount"],
                "status": "pending",
                "currency": "NGN",
                "reference": reference,
                "checkout_url": url,
            },
            "status": "success",
            "message": "Payment initiated successfully.",
        }


class PaymentById:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def on_get(self, req: falcon.Request, resp: falcon.Response, payment_id: str) -> None:
        with self.pool.connection() as conn:
            row = conn.execute("SELECT * FROM payments WHERE id = %s", (payment_id,)).fetchone()
        if row is None:
            raise falcon.HTTPNotFound
        resp.media = {
            "payment": {
                "id": row[0],
                "customer_name": row[5],
                "customer_email": row[6],
                "amount": row[3] / 100,
                "status": row[2],
                "currency": row[4],
                "reference": row[1],
                "checkout_url": row[9],
                "created_at": timestamp(row[10]),
                "paid_at": timestamp(row[11]),
            },
            "status": "success",
            "message": "Payment details retrieved successfully.",
        }


class Webhook:
    """One transaction of two statements, however many paygate needs."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body = req.bounded_stream.read()
        charge = json.loads(body)["data"]
        with self.pool.connection() as conn, conn.transaction():
            payment_id = one(
                conn,
                """
                WITH payment AS MATERIALIZED (SELECT id FROM payments WHERE reference = %s FOR UPDATE),
                event AS (INSERT INTO provider_events (digest, body, applied_at) VALUES (%s, %s, now())),
                charge AS (INSERT INTO charges (reference, payment_id, amount_minor) SELECT %s, id, %s FROM payment)
                SELECT id FROM payment
                """,
                (
                    charge["reference"],
                    hashlib.sha256(body).digest(),
                    body.decode(),
                    charge["reference"],
                    charge["amount"],
                ),
            )
            conn.execute(
                "UPDATE payments SET status = 'completed', paid_at = %s WHERE id = %s", (charge["paid_at"], payment_id)
            )
        resp.media = RECEIVED


RECEIVED = {"status": "success", "message": "Event received."}


class Readiness:
    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        with self.pool.connection() as conn:
            conn.execute("SELECT 1")
        resp.media = {"status": "success"}


def one(conn: psycopg.Connection[tuple[Any, ...]], statement: LiteralString, values: tuple[Any, ...]) -> Any:
    row = conn.execute(statement, values).fetchone()
    if row is None:
        raise falcon.HTTPNotFound
    return row[0]


def timestamp(moment: datetime.datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
