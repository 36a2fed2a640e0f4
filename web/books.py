"""The books: lists of payments, and sums of the money that moved; for the operator's commands and the back office."""

import db

STATUSES = (*db.UNPAID, "review", *db.PAID, "paid")
"""The filters of a list: each status, and `paid` for all payments that were paid."""

PAYMENTS = """
SELECT * FROM payments
 WHERE mode = %(mode)s
   AND (coalesce(%(status)s, 'paid') = 'paid' OR status = %(status)s)
   AND (%(status)s IS DISTINCT FROM 'paid' OR status IN ('completed', 'partially_refunded', 'refunded'))
   AND (%(since)s::timestamptz IS NULL OR created_at >= %(since)s)
   AND (%(until)s::timestamptz IS NULL OR created_at < %(until)s)
   AND (%(email)s::text IS NULL OR lower(customer_email) = lower(%(email)s))
   AND (%(phone)s::text IS NULL OR right(customer_phone, 9) = %(phone)s)
   -- Found first: beside a LIMIT the planner would rather look through the newest payments for it.
   AND (%(order)s::text IS NULL
        OR id = ANY(ARRAY(SELECT id FROM payments WHERE metadata ->> 'order' = %(order)s)))
   AND (%(reference)s::text IS NULL OR reference = %(reference)s)
   AND (%(after)s::text IS NULL OR (created_at, id) < (SELECT created_at, id FROM payments WHERE id = %(after)s))
 ORDER BY created_at DESC, id DESC LIMIT %(limit)s
"""
"""The payments of a `mode`, newest first. `until` is exclusive. A null filter or `limit` leaves no payment out.
`after`: the last id of the page before."""

REPORT = """
WITH moved AS (
    SELECT (coalesce(c.paid_at, c.recorded_at) AT TIME ZONE %(zone)s)::date AS day, c.currency, c.payment_id,
           (c.reference = p.charge_reference)::int AS payments, c.amount_minor AS gross,
           coalesce(c.fees_minor, 0) AS fees, (c.fees_minor IS NULL)::int AS unknown_fees, 0::bigint AS refunds,
           p.location
      FROM charges c JOIN payments p ON p.id = c.payment_id
     WHERE c.mode = %(mode)s AND coalesce(c.paid_at, c.recorded_at) >= %(since)s
       AND coalesce(c.paid_at, c.recorded_at) < %(until)s
    UNION ALL
    SELECT (r.processed_at AT TIME ZONE %(zone)s)::date, r.currency, r.payment_id, 0, 0, 0, 0, r.amount_minor,
           p.location
      FROM refunds r JOIN payments p ON p.id = r.payment_id
     WHERE r.mode = %(mode)s AND r.status = 'processed'
       AND r.processed_at >= %(since)s AND r.processed_at < %(until)s
)
SELECT CASE WHEN GROUPING(day) = 0 THEN 'day' WHEN GROUPING(location) = 0 THEN 'location' ELSE 'total' END AS by,
       coalesce(day::text, location, 'total') AS key, currency,
       coalesce(sum(payments), 0)::bigint AS payments, coalesce(sum(gross), 0)::bigint AS gross,
       coalesce(sum(fees), 0)::bigint AS fees, coalesce(sum(refunds), 0)::bigint AS refunds,
       coalesce(sum(gross) - sum(fees) - sum(refunds), 0)::bigint AS net, sum(unknown_fees)::bigint AS unknown_fees
  FROM moved
 GROUP BY GROUPING SETS ((currency, day), (currency, location), (currency))
 ORDER BY currency, GROUPING(day), GROUPING(location), day, gross DESC, location
"""
"""Money by day (of the payment, of the refund), by location and in all, for each currency: sums in hundredths. Days are
those of `zone`. Gross is every charge, a second one too; refunds are the processed ones; `payments` are those whose
charge came; `unknown_fees` are charges whose fees the provider has not named yet, and which count as 0."""

SUMS = ("gross", "fees", "refunds", "net")
