"""Years of payments, written by SQL in minutes, to be planned for (test_plans.py).

Each row is what the service would have left: ids and references are made from keys and a secret, the audit trail is
chained by the schema's own function (so that `audit` finds it whole), bodies and notifications are pruned as
RETENTION_DAYS says. Triggers are off meanwhile, every constraint of a row holds.

The trade of today is the same in a history of any size, so that two of them differ in what lies behind them and in
nothing else: the pending payments, those to review and what /metrics counts are today's.
"""

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime

import psycopg

import db

SECRET = hashlib.sha256(b"of any history").digest()
SLICE = 50_000
"""Payments that are written at once, in the order of time as the service would have written them."""
PAYMENTS_OF_A_CUSTOMER = 5
# 70 % are paid and stay so, 1 % are given back, 1 in 1,000 is paid short and accepted later, 6 % end after a declined
# card, the others unpaid. Only today's can be pending or in review.
PLAN = """
CREATE TEMPORARY TABLE slice ON COMMIT DROP AS
SELECT each.*,
       names.id,
       names.reference,
       'https://checkout.paystack.com/' || left(md5('checkout ' || n), 15) AS checkout_url,
       'Customer ' || customer || ' Adeyemi' AS customer_name,
       'customer-' || customer || '@example.com' AS customer_email,
       (ARRAY['Lagos', 'Abuja', 'Kano', 'Ibadan', 'Port Harcourt', 'Enugu', 'Kaduna', 'Jos'])[1 + n %% 8] AS location,
       CASE WHEN first_status IN ('completed', 'review') THEN created_at + interval '3 min'
            WHEN first_status IN ('failed', 'expired') THEN created_at + interval '1 day' END AS ended_at,
       CASE WHEN first_status <> last_status THEN created_at + interval '12 h' END AS changed_at,
       CASE first_status WHEN 'completed' THEN amount_minor WHEN 'review' THEN amount_minor - 1000 ELSE 0 END
       AS charged_minor,
       CASE last_status WHEN 'refunded' THEN amount_minor WHEN 'partially_refunded' THEN 1000 ELSE 0 END
       AS refunded_minor
  FROM (
    SELECT n, at AS created_at, n %% greatest(1, %(payments)s / %(payments_of_a_customer)s) AS customer,
           5000 + n %% 200 * 100 AS amount_minor,
           CASE WHEN dice < 710 THEN 'completed' WHEN dice < 711 THEN 'review' WHEN is_today THEN 'pending'
                WHEN dice < 771 THEN 'failed' ELSE 'expired' END AS first_status,
           CASE WHEN dice < 700 THEN 'completed'
                WHEN dice < 710 AND is_today THEN 'completed'
                WHEN dice < 705 THEN 'partially_refunded' WHEN dice < 710 THEN 'refunded'
                WHEN dice < 711 AND is_today THEN 'review' WHEN dice < 711 THEN 'completed'
                WHEN is_today THEN 'pending' WHEN dice < 771 THEN 'failed' ELSE 'expired' END AS last_status
      FROM (
        SELECT n, n * 7919 %% 1000 AS dice, n > %(payments)s - %(today)s AS is_today,
               CASE WHEN n > %(payments)s - %(today)s
                    THEN %(now)s - interval '20 h' * ((%(payments)s - n)::float8 / %(today)s)
                    ELSE %(now)s - interval '2 days'
                         - interval '728 days' * ((%(payments)s - %(today)s - n)::float8 / (%(payments)s - %(today)s))
               END AS at
          FROM generate_series(%(first)s::bigint, %(last)s) AS n
      ) AS dated
  ) AS each JOIN names USING (n)
"""
STATEMENTS = (
    """
    INSERT INTO payments (id, mode, status, status_reason, amount_minor, currency, reference, checkout_url,
                          charge_reference, charged_minor, refunded_minor, accepted_by, customer_name, customer_email,
                          customer_phone, location, metadata, source, created_at, expires_at, paid_at, poll_at,
                          polled_at, notified, pruned)
    SELECT id, 'test', last_status,
           CASE last_status WHEN 'failed' THEN 'last try declined: Insufficient Funds' END,
           amount_minor, 'NGN', reference, checkout_url,
           CASE WHEN charged_minor > 0 THEN reference END, charged_minor, refunded_minor,
           CASE WHEN (first_status, last_status) = ('review', 'completed') THEN 'operator:anna' END,
           customer_name, customer_email, '+23480' || lpad((n %% 100000000)::text, 8, '0'), location,
           jsonb_build_object('order', 'order-' || n), 'api', created_at, created_at + interval '1 day',
           CASE WHEN last_status IN ('completed', 'partially_refunded', 'refunded') THEN ended_at END,
           -- Nothing is due: the worker has just looked at all that it looks at.
           CASE WHEN last_status IN ('pending', 'failed', 'expired') AND created_at > %(now)s - interval '366 days'
                THEN %(now)s + interval '1 day' + interval '1 h' * (n %% 144) END,
           CASE WHEN charged_minor = 0 THEN created_at + interval '1 day' END,
           (ended_at IS NOT NULL)::int + (changed_at IS NOT NULL)::int,
           num_nonnulls(nullif(ended_at <= %(now)s - make_interval(days => %(retention_days)s), false),
                        nullif(changed_at <= %(now)s - make_interval(days => %(retention_days)s), false))
      FROM slice ORDER BY created_at
    """,
    """
    INSERT INTO idempotency_keys (mode, key, fingerprint, payment_id, token, reference_exists, answer, answered_at)
    SELECT 'test', sha256(convert_to('order-' || n, 'UTF8')), sha256(convert_to('fingerprint ' || n, 'UTF8')), id,
           gen_random_uuid(), true, 'payment', created_at + interval '400 ms'
      FROM slice ORDER BY created_at
    """,
    """
    INSERT INTO charges (reference, payment_id, mode, provider_id, amount_minor, requested_minor, fees_minor, currency,
                         channel, paid_at, source, recorded_at)
    SELECT reference, id, 'test', 4000000000 + n, charged_minor, amount_minor, charged_minor * 15 / 1000, 'NGN', 'card',
           ended_at, 'webhook', ended_at + interval '1 s'
      FROM slice WHERE charged_minor > 0 ORDER BY ended_at
    """,
    """
    INSERT INTO refunds (id, charge_reference, payment_id, mode, provider_id, amount_minor, currency, status, origin,
                         made_by, reason, created_at, send_ended_at, processed_at)
    SELECT 'RF-' || upper(left(md5('refund ' || n), 26)), reference, id, 'test', 20000000 + n, refunded_minor, 'NGN',
           'processed', 'paygate', 'operator:anna', 'sent back', ended_at, ended_at, changed_at
      FROM slice WHERE refunded_minor > 0 ORDER BY ended_at
    """,
    """
    INSERT INTO incidents (mode, kind, subject, payment_id, opened_at, closed_at, closed_by, close_reason)
    SELECT 'test', 'mismatch', reference, id, ended_at, changed_at,
           CASE WHEN changed_at IS NOT NULL THEN 'operator:anna' END, 'the rest was paid in cash'
      FROM slice WHERE first_status = 'review' ORDER BY ended_at
    """,
    """
    INSERT INTO provider_events (mode, digest, name, reference, payment_id, body, outcome, received_at)
    SELECT 'test', sha256(convert_to(name || n, 'UTF8')), name, told.reference, payment_id,
           CASE WHEN at > %(now)s - make_interval(days => %(retention_days)s)
                THEN replace(%(body)s, 'EXAMPLE', told.reference) END,
           outcome, at
      FROM slice CROSS JOIN LATERAL (VALUES
           ('charge.success', reference, id, 'applied', CASE WHEN charged_minor > 0 THEN ended_at END),
           ('refund.processed', reference, id, 'noted', CASE WHEN refunded_minor > 0 THEN changed_at END)
      ) AS told (name, reference, payment_id, outcome, at)
     WHERE at IS NOT NULL ORDER BY at
    """,
    """
    INSERT INTO notifications (mode, type, payment_id, sequence, facts, made_at, tries, delivered_at, last_outcome)
    SELECT 'test', 'payment.' || status, id, sequence,
           jsonb_build_object(
               'status', status, 'status_reason', NULL, 'attempt', 1, 'checkout_url', checkout_url,
               'charge_reference', reference, 'charged_minor', charged_minor, 'refunded_minor', refunded,
               'paid_at', ended_at),
           at, 1, at + interval '1 s', '200'
      FROM slice CROSS JOIN LATERAL (VALUES
           (1, first_status, ended_at, 0), (2, last_status, changed_at, refunded_minor)
      ) AS told (sequence, status, at, refunded)
     WHERE at > %(now)s - make_interval(days => %(retention_days)s) ORDER BY at
    """,
    """
    INSERT INTO payment_events (payment_id, n, at, actor, why, from_status, to_status, amount_minor, currency, mode,
                                reference, charged_minor, refunded_minor, digest, hash)
    SELECT (event).payment_id, (event).n, (event).at, (event).actor, (event).why, (event).from_status,
           (event).to_status, (event).amount_minor, (event).currency, (event).mode, (event).reference,
           (event).charged_minor, (event).refunded_minor, (event).digest, hash
      FROM (
        SELECT event, pg_temp.chain(event) OVER (PARTITION BY (event).payment_id ORDER BY (event).n) AS hash
          FROM (
            SELECT ROW(NULL, id, step.n, at, actor, why, from_status, to_status, amount_minor, 'NGN', 'test', reference,
                       step.charged_minor, step.refunded_minor, digest, NULL)::payment_events AS event
              FROM slice JOIN (
                   SELECT p.id, payment_digest(p) AS digest FROM payments p JOIN slice USING (id)
              ) AS proved USING (id) CROSS JOIN LATERAL (VALUES
                   (1, created_at, 'api', 'reserved', NULL, 'pending', 0, 0),
                   (2, created_at + interval '400 ms', 'api', 'opened', 'pending', 'pending', 0, 0),
                   (3, ended_at, CASE WHEN charged_minor > 0 THEN 'webhook' ELSE 'worker' END,
                    CASE first_status WHEN 'completed' THEN 'charge' WHEN 'review' THEN 'mismatch' ELSE 'time_over' END,
                    'pending', first_status, charged_minor, 0),
                   (4, changed_at, 'operator:anna', CASE WHEN refunded_minor > 0 THEN 'refund' ELSE 'accepted' END,
                    first_status, last_status, charged_minor, refunded_minor)
              ) AS step (n, at, actor, why, from_status, to_status, charged_minor, refunded_minor)
             WHERE at IS NOT NULL
          ) AS steps
      ) AS chained
     ORDER BY (event).at, (event).payment_id
    """,
)


def fill(url: str, payments: int, *, today: int, body: str, retention_days: int = 90) -> Iterator[int]:
    """Write a history of so many payments into an empty database, and yield how many there are after each slice.

    The last `today` of them were made today, the others in the two years before. `body` is a webhook about the
    reference EXAMPLE. At the end the tables are vacuumed and analyzed. The database's user must be a superuser.
    """
    values = {
        "payments": payments,
        "today": today,
        "now": datetime.now(UTC),
        "payments_of_a_customer": PAYMENTS_OF_A_CUSTOMER,
        "retention_days": retention_days,
        "body": body,
    }
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(
            """
            SELECT set_config('session_replication_role', 'replica', false),
                   set_config('synchronous_commit', 'off', false), set_config('work_mem', '256MB', false)
            """
        )
        # The function that makes a hash of an audit row and the hash before it is just what an aggregate goes on by.
        conn.execute("CREATE AGGREGATE pg_temp.chain (payment_events) (SFUNC = payment_event_hash, STYPE = bytea)")
        conn.execute("UPDATE secrets SET value = %(secret)s", {"secret": SECRET})
        conn.execute("CREATE TEMPORARY TABLE names (n bigint, id text, reference text) ON COMMIT DELETE ROWS")
        for first in range(1, payments + 1, SLICE):
            last = min(first + SLICE - 1, payments)
            with conn.transaction():
                with conn.cursor().copy("COPY names FROM STDIN") as copy:
                    for n in range(first, last + 1):
                        copy.write_row((n, payment_id(n), reference(n)))
                for statement in (PLAN, *STATEMENTS):
                    conn.execute(statement.encode(), {**values, "first": first, "last": last})
            yield last
        conn.execute("VACUUM (ANALYZE)")


def key(n: int) -> bytes:
    """As it is stored, of the n-th payment of any history."""
    return hashlib.sha256(f"order-{n}".encode()).digest()


def payment_id(n: int) -> str:
    return db.derived_name("PAY", SECRET, "test", key(n))


def reference(n: int) -> str:
    return db.derived_name("PG", SECRET, "test", key(n))


def email(n: int, payments: int) -> str:
    """The address of the customer of the n-th payment in a history of so many."""
    return f"customer-{n % max(1, payments // PAYMENTS_OF_A_CUSTOMER)}@example.com"
