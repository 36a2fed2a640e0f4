-- paygate's tables, the state machine and the audit trail. Each numbered block is a migration: `manage.py migrate` runs
-- the missing blocks in order, each in a transaction of its own. A released block never changes; the next block adds to
-- it. The rules here hold for every caller: the service, an operator's psql, a future version with a bug. Amounts
-- (`…_minor`) are always in hundredths of the currency.
--
-- `migrate` runs a block with only this schema on the search_path, and temporary tables last. Each function keeps this
-- search_path, so a caller's temporary table with one of our names replaces nothing. A function whose body is a RETURN
-- needs no search_path: its names were looked up when it was made.

-- migration 1: payments, keys, charges, refunds, events, incidents, notifications, the audit trail

-- The secret from which ids, references and links are derived. One row, made by `migrate`.
CREATE TABLE secrets (
    the_only_row boolean PRIMARY KEY DEFAULT true CONSTRAINT secrets_is_one_row CHECK (the_only_row),
    value bytea NOT NULL CONSTRAINT secret_is_256_bits CHECK (octet_length(value) = 32)
);

-- The order in which a payment's state rises; steps may be skipped. An SQL function would be parsed for each row.
CREATE FUNCTION payment_rank(status text) RETURNS integer LANGUAGE plpgsql IMMUTABLE STRICT
    SET search_path FROM CURRENT AS $$
BEGIN
    RETURN CASE status
        WHEN 'pending' THEN 0
        WHEN 'failed' THEN 1
        WHEN 'expired' THEN 1
        WHEN 'review' THEN 2
        WHEN 'completed' THEN 3
        WHEN 'partially_refunded' THEN 4
        WHEN 'refunded' THEN 5
    END;
END
$$;

-- A claim walks over the index entries of all rows that were due since the last vacuum: 0.006 ms with nothing due, 1.5
-- ms after 100,000 polls. By default a vacuum comes when a fifth of the table has changed, and skips the indexes while
-- fewer than 2 % of the pages have dead rows. In a large table it would skip them for ever. So this table,
-- provider_events and notifications have their own settings.
CREATE TABLE payments (
    id text PRIMARY KEY CONSTRAINT id_is_pay_and_26_of_base32 CHECK (id ~ '^PAY-[0-9A-HJKMNP-TV-Z]{26}$'),
    mode text NOT NULL CONSTRAINT mode_is_test_or_live CHECK (mode IN ('test', 'live')),
    status text NOT NULL DEFAULT 'pending' CONSTRAINT status_is_known CHECK (payment_rank(status) IS NOT NULL),
    status_reason text,
    amount_minor bigint NOT NULL CONSTRAINT amount_is_positive CHECK (amount_minor > 0),
    currency text NOT NULL CONSTRAINT currency_is_three_letters CHECK (currency ~ '^[A-Z]{3}$'),

    -- The first reference at the provider, `PG-…`. Attempts 2 to 9 have `PG-…-2` to `PG-…-9`.
    reference text NOT NULL CONSTRAINT reference_is_used_once UNIQUE
        CONSTRAINT reference_is_pg_and_26_of_base32 CHECK (reference ~ '^PG-[0-9A-HJKMNP-TV-Z]{26}$'),
    attempt smallint NOT NULL DEFAULT 1 CONSTRAINT attempt_is_1_to_9 CHECK (attempt BETWEEN 1 AND 9),
    checkout_url text,

    -- The charge that this payment follows: the first success that the provider reported for one of its references.
    charge_reference text,
    -- Its sum, and the part that was given back, in its own currency, which may differ from the price's.
    charged_minor bigint NOT NULL DEFAULT 0,
    charged_currency text,
    refunded_minor bigint NOT NULL DEFAULT 0 CONSTRAINT refunded_is_not_negative CHECK (refunded_minor >= 0),
    accepted_by text,

    customer_name text NOT NULL,
    customer_email text NOT NULL,
    customer_phone text NOT NULL,
    location text NOT NULL,
    description text,
    metadata jsonb,
    return_url text,
    source text NOT NULL CONSTRAINT source_is_known CHECK (source IN ('api', 'form', 'link')),

    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL,
    paid_at timestamptz,
    -- When the personal data were overwritten; bodies of later events are not kept.
    erased_at timestamptz,
    -- In each digest of the trail, so that nobody can guess a person's data from an old digest. `erase` replaces it.
    salt uuid NOT NULL DEFAULT gen_random_uuid(),
    -- When the order was given up: its checkout is not given out any more, and money that still comes is an incident.
    cancelled_at timestamptz,

    -- When the next poll is due (null if nothing is left to learn), and its turn if somebody waits for the payment.
    poll_at timestamptz,
    wanted_at timestamptz,
    polled_at timestamptz,
    -- While a worker polls it: until when no other worker does.
    poll_leased_until timestamptz,
    -- When the provider spoke of refunds that it has not listed yet; when it said that the charge goes back.
    refunds_awaited_since timestamptz,
    reversed_at timestamptz,
    -- How many notifications were made for it, and how many of them were pruned.
    notified integer NOT NULL DEFAULT 0,
    pruned integer NOT NULL DEFAULT 0,

    CONSTRAINT completed_has_paid_at CHECK (
        (status IN ('completed', 'partially_refunded', 'refunded')) = (paid_at IS NOT NULL)),
    CONSTRAINT money_came_has_a_charge CHECK (
        (payment_rank(status) >= 2) = (charge_reference IS NOT NULL)),
    CONSTRAINT charged_is_of_a_charge CHECK (
        charged_minor = 0 OR (charged_minor > 0 AND charge_reference IS NOT NULL)),
    CONSTRAINT refunded_is_of_a_charge CHECK (refunded_minor = 0 OR charge_reference IS NOT NULL)
) WITH (autovacuum_vacuum_scale_factor = 0.01, vacuum_index_cleanup = on);

CREATE INDEX payments_due_for_a_poll ON payments (mode, poll_at) WHERE poll_at IS NOT NULL;
CREATE INDEX payments_wanted ON payments (mode, wanted_at) WHERE wanted_at IS NOT NULL AND charge_reference IS NULL;
CREATE INDEX payments_open ON payments (mode, status) WHERE status IN ('pending', 'review');
CREATE INDEX payments_rare ON payments (status, created_at)
    WHERE status IN ('failed', 'review', 'partially_refunded', 'refunded');
-- One column each: a B-tree packs rows that are appended at its right end, and stores equal values once.
CREATE INDEX payments_by_time ON payments (created_at);
CREATE INDEX payments_by_customer ON payments (lower(customer_email));
CREATE INDEX payments_by_order ON payments ((metadata ->> 'order')) WHERE metadata ->> 'order' IS NOT NULL;

-- A request with an Idempotency-Key, or with a random key. Kept for ever: an expired key could be paid twice.
CREATE TABLE idempotency_keys (
    mode text NOT NULL,
    key bytea NOT NULL CONSTRAINT key_is_a_sha256 CHECK (octet_length(key) = 32),
    fingerprint bytea NOT NULL CONSTRAINT fingerprint_is_a_sha256 CHECK (octet_length(fingerprint) = 32),
    payment_id text NOT NULL CONSTRAINT key_has_a_payment REFERENCES payments CONSTRAINT payment_has_one_key UNIQUE,

    -- The lease: the holder of `token` may open the checkout until `leased_until`; null after a release.
    token uuid NOT NULL,
    leased_until timestamptz,
    -- Whether the current reference exists at the provider: then it is verified and not initialized.
    reference_exists boolean NOT NULL DEFAULT false,

    -- The answer to the request and its repetitions: the payment as it stands, or why there is no payment.
    answer text CONSTRAINT answer_is_known CHECK (answer IN ('payment', 'payment_expired', 'customer_email', 'amount')),
    answered_at timestamptz,

    PRIMARY KEY (mode, key),
    CONSTRAINT an_answer_has_its_time CHECK ((answer IS NULL) = (answered_at IS NULL))
);

-- Money that came, as the provider reported it. A row never changes, except that unknown fees are learned once.
CREATE TABLE charges (
    reference text PRIMARY KEY CONSTRAINT charge_reference_is_ours CHECK (reference ~ '^PG-[0-9A-HJKMNP-TV-Z]{26}(-[2-9])?$'),
    payment_id text NOT NULL CONSTRAINT charge_has_a_payment REFERENCES payments,
    mode text NOT NULL CONSTRAINT charge_mode_is_test_or_live CHECK (mode IN ('test', 'live')),
    provider_id bigint,
    amount_minor bigint NOT NULL CONSTRAINT charged_amount_is_not_negative CHECK (amount_minor >= 0),
    requested_minor bigint,
    fees_minor bigint,
    currency text NOT NULL,
    channel text,
    -- The provider's word; null if impossible: over a day before the payment was made, or over 10 minutes ahead.
    paid_at timestamptz,
    source text NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE INDEX charges_by_provider_id ON charges (provider_id);

-- Money that goes back. refunds.py describes the life of a row.
CREATE TABLE refunds (
    id text PRIMARY KEY CONSTRAINT refund_id_is_rf_and_26_of_base32 CHECK (id ~ '^RF-[0-9A-HJKMNP-TV-Z]{26}$'),
    charge_reference text NOT NULL CONSTRAINT refund_has_a_charge REFERENCES charges,
    payment_id text NOT NULL CONSTRAINT refund_has_a_payment REFERENCES payments,
    mode text NOT NULL,
    provider_id numeric(20),  -- 64 bits without a sign
    amount_minor bigint NOT NULL CONSTRAINT refunded_amount_is_positive CHECK (amount_minor > 0),
    currency text NOT NULL,
    status text NOT NULL CONSTRAINT refund_status_is_known CHECK (status IN (
        'unanswered', 'pending', 'processing', 'needs-attention', 'processed', 'failed', 'refused', 'not_made')),
    origin text NOT NULL CONSTRAINT refund_origin_is_known CHECK (origin IN ('paygate', 'dashboard')),
    made_by text NOT NULL,
    reason text,
    refused_because text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- When our one call began, and when it ended, refused or without an answer.
    sent_at timestamptz,
    send_ended_at timestamptz,
    processed_at timestamptz,
    poll_at timestamptz,
    CONSTRAINT refund_is_recorded_once UNIQUE (mode, provider_id),
    CONSTRAINT the_provider_names_what_it_took CHECK (
        provider_id IS NOT NULL OR status IN ('unanswered', 'refused', 'not_made')),
    CONSTRAINT processed_has_its_time CHECK (status <> 'processed' OR processed_at IS NOT NULL)
);

CREATE INDEX refunds_of_a_charge ON refunds (charge_reference);
CREATE INDEX refunds_of_a_payment ON refunds (payment_id);
CREATE INDEX refunds_due_for_a_poll ON refunds (mode, poll_at) WHERE poll_at IS NOT NULL;

-- Events of the provider's webhook, one row for each different body. `body` is null if not ours, pruned or unreadable.
CREATE TABLE provider_events (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    mode text NOT NULL,
    digest bytea NOT NULL CONSTRAINT digest_is_a_sha256 CHECK (octet_length(digest) = 32),
    name text,
    reference text,
    payment_id text REFERENCES payments,
    body text,
    outcome text NOT NULL CONSTRAINT outcome_is_known
        CHECK (outcome IN ('received', 'applied', 'noted', 'foreign', 'other_mode', 'no_event')),
    deliveries integer NOT NULL DEFAULT 1,
    received_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    retry_at timestamptz,
    CONSTRAINT an_event_is_stored_once UNIQUE (mode, digest),
    CONSTRAINT only_a_received_event_is_retried CHECK ((outcome = 'received') = (retry_at IS NOT NULL))
) WITH (autovacuum_vacuum_scale_factor = 0.01, vacuum_index_cleanup = on);

CREATE INDEX provider_events_to_apply ON provider_events (mode, retry_at) WHERE retry_at IS NOT NULL;
CREATE INDEX provider_events_of_a_reference ON provider_events USING hash (reference);
CREATE INDEX provider_events_of_a_payment ON provider_events (payment_id) WHERE outcome = 'received';
CREATE INDEX provider_events_to_prune ON provider_events (received_at) WHERE body IS NOT NULL;

-- Things that a person must look at. `cause` tells one case of a `subject` from the next, such as a dispute's id. Each
-- pair has one open row at most. A case that happens again opens another row; a message that comes again does not.
CREATE TABLE incidents (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    mode text NOT NULL,
    kind text NOT NULL CONSTRAINT incident_kind_is_known CHECK (kind IN (
        'second_charge', 'unknown_reference', 'mismatch', 'references_used_up', 'dispute', 'chargeback',
        'refund_failed', 'refund_needs_attention', 'refund_not_final', 'refund_not_made', 'refund_revived',
        'refunded_too_much', 'unreadable_refund', 'unreadable_event', 'never_ended', 'paid_after_cancel')),
    subject text NOT NULL,
    cause text NOT NULL DEFAULT '',
    payment_id text REFERENCES payments,
    opened_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    closed_at timestamptz,
    closed_by text,
    close_reason text,
    CONSTRAINT a_closed_incident_names_who CHECK ((closed_at IS NULL) = (closed_by IS NULL) AND closed_by <> '')
);

CREATE INDEX incidents_of_a_subject ON incidents (subject, kind);
CREATE UNIQUE INDEX a_thing_opens_one_incident ON incidents (kind, subject, cause) WHERE closed_at IS NULL;
CREATE INDEX incidents_open ON incidents (mode, opened_at) WHERE closed_at IS NULL;
CREATE INDEX incidents_of_a_payment ON incidents (payment_id) WHERE payment_id IS NOT NULL;

-- Messages to the merchant's own system. The triggers below write them in the same commit as the change. `facts` holds
-- the payment's changing columns at that moment.
CREATE TABLE notifications (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    mode text NOT NULL,
    type text NOT NULL,
    payment_id text REFERENCES payments,
    incident_id bigint REFERENCES incidents,
    -- The order within a payment: the next notification waits, with due_at null, until this one is delivered or dead.
    sequence integer NOT NULL,
    facts jsonb NOT NULL,
    made_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    tries smallint NOT NULL DEFAULT 0,
    due_at timestamptz,
    delivered_at timestamptz,
    dead_at timestamptz,
    last_outcome text,
    CONSTRAINT notifications_are_numbered UNIQUE (payment_id, sequence),
    CONSTRAINT an_ended_notification_is_not_due CHECK (due_at IS NULL OR (delivered_at IS NULL AND dead_at IS NULL))
) WITH (autovacuum_vacuum_scale_factor = 0.01, vacuum_index_cleanup = on);

CREATE INDEX notifications_due ON notifications (mode, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX notifications_dead ON notifications (mode, dead_at) WHERE dead_at IS NOT NULL;
CREATE INDEX notifications_delivered ON notifications (delivered_at) WHERE delivered_at IS NOT NULL;

-- Work that one process does for all of them: the process that moves `due_at` on does it.
CREATE TABLE jobs (
    mode text NOT NULL,
    name text NOT NULL,
    due_at timestamptz,
    done_at timestamptz,
    PRIMARY KEY (mode, name)
);

-- Orders whose links were sent in error: these links start no payment any more.
CREATE TABLE withdrawn_orders (
    mode text NOT NULL,
    digest bytea NOT NULL CONSTRAINT order_is_a_sha256 CHECK (octet_length(digest) = 32),
    withdrawn_by text NOT NULL,
    withdrawn_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (mode, digest)
);

-- The audit trail: one row for each change of a payment, and (`noted`) of its charges, refunds, incidents, kept events
-- and order. The triggers below write it under the payment's row lock. `digest` covers all of these rows at that
-- moment; `hash` covers this row, with its digest, and the hash of the payment's row before it.
CREATE TABLE payment_events (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    payment_id text NOT NULL REFERENCES payments,
    n integer NOT NULL,
    at timestamptz NOT NULL,
    actor text NOT NULL CONSTRAINT actor_is_known
        CHECK (actor IN ('api', 'form', 'link', 'webhook', 'worker', 'paygate') OR actor ~ '^operator:[^[:cntrl:]]{1,100}$'),
    why text NOT NULL CONSTRAINT why_is_known CHECK (why IN (
        'reserved', 'opened', 'next_reference', 'refused', 'declined', 'time_over', 'charge', 'mismatch',
        'refund', 'refund_failed', 'accepted', 'cancelled', 'erased', 'noted', 'by_hand')),
    from_status text,
    to_status text NOT NULL,
    amount_minor bigint NOT NULL,
    currency text NOT NULL,
    mode text NOT NULL,
    reference text NOT NULL,
    charged_minor bigint NOT NULL,
    refunded_minor bigint NOT NULL,
    digest bytea NOT NULL CONSTRAINT digest_is_of_256_bits CHECK (octet_length(digest) = 32),
    hash bytea NOT NULL CONSTRAINT hash_is_a_sha256 CHECK (octet_length(hash) = 32),
    CONSTRAINT payment_events_are_numbered UNIQUE (payment_id, n)
) WITH (autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 10000);

-- Rows come in the order of time, so the smallest kind of index finds the last day. /metrics reads all rows that it has
-- not summarized. Only VACUUM summarizes, at little cost after 10,000 rows.
CREATE INDEX payment_events_by_time ON payment_events USING brin (at) WITH (pages_per_range = 32);

-- The hash of an audit row. Line breaks join the fields; no field can hold a line break.
CREATE FUNCTION payment_event_hash(previous_hash bytea, event payment_events) RETURNS bytea LANGUAGE sql STABLE
    RETURN sha256(convert_to(concat_ws(E'\n',
        coalesce(encode(previous_hash, 'hex'), ''), event.payment_id, event.n,
        to_char(event.at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
        event.actor, event.why, coalesce(event.from_status, ''), event.to_status,
        event.amount_minor, event.currency, event.mode, event.reference,
        event.charged_minor, event.refunded_minor, encode(event.digest, 'hex')), 'UTF8'));

-- The columns of a row that the digest covers: not the columns about the next poll, a call or a list. Nulls are left
-- out, so a later migration's new column changes no digest while it is empty.
CREATE FUNCTION proved(columns jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE
    RETURN jsonb_strip_nulls(columns - ARRAY[
        'poll_at', 'polled_at', 'poll_leased_until', 'refunds_awaited_since', 'reversed_at', 'wanted_at', 'notified',
        'pruned', 'sent_at', 'send_ended_at']);

-- A digest over a payment's own row, its order's fingerprint, its charges and refunds once money has come, its
-- incidents, and its events that wait to be applied. A charge is found by its reference: there is no index by payment.
CREATE FUNCTION payment_digest(payment payments) RETURNS bytea LANGUAGE plpgsql STABLE
    SET search_path FROM CURRENT SET timezone = 'UTC' AS $$
DECLARE
    money jsonb;
BEGIN
    IF payment.charge_reference IS NOT NULL THEN
        money := jsonb_build_array(
            (SELECT jsonb_agg(proved(to_jsonb(c)) ORDER BY reference COLLATE "C") FROM charges c
              WHERE reference BETWEEN payment.reference AND payment.reference || '-9' AND payment_id = payment.id),
            (SELECT jsonb_agg(proved(to_jsonb(r)) ORDER BY id COLLATE "C") FROM refunds r
              WHERE payment_id = payment.id));
    END IF;
    RETURN sha256(convert_to(jsonb_build_array(
        proved(to_jsonb(payment)), money,
        (SELECT encode(fingerprint, 'hex') FROM idempotency_keys WHERE payment_id = payment.id),
        (SELECT jsonb_agg(proved(to_jsonb(i)) ORDER BY id) FROM incidents i WHERE payment_id = payment.id),
        (SELECT jsonb_agg(encode(e.digest, 'hex') ORDER BY id) FROM provider_events e
          WHERE payment_id = payment.id AND outcome = 'received'))::text, 'UTF8'));
END
$$;

-- Each change that the trail records names who makes it, and why, in its WHERE: … AND changed_by('worker', 'charge').
-- The names last until the end of the transaction: pgbouncer keeps no more than a transaction together.
CREATE FUNCTION changed_by(actor text, why text) RETURNS boolean LANGUAGE sql
    RETURN set_config('paygate.actor', actor, true) || set_config('paygate.why', why, true) IS NOT NULL;

-- Writes a row for a change of a payment, and (`noted`) for a change beside one. A payment's first charge needs no row:
-- the payment's own change follows.
CREATE FUNCTION write_payment_event() RETURNS trigger LANGUAGE plpgsql
    SET search_path FROM CURRENT AS $$
DECLARE
    payment payments;
    previous payment_events;
    event payment_events;
BEGIN
    IF TG_TABLE_NAME = 'payments' THEN
        payment := NEW;
        event.why := coalesce(nullif(current_setting('paygate.why', true), ''), 'by_hand');
    ELSE
        SELECT * INTO payment FROM payments WHERE id = NEW.payment_id FOR UPDATE;
        IF NOT FOUND OR (TG_TABLE_NAME = 'charges' AND payment.charge_reference IS NULL) THEN
            RETURN NULL;
        END IF;
        event.why := 'noted';
    END IF;
    SELECT * INTO previous FROM payment_events WHERE payment_id = payment.id ORDER BY n DESC LIMIT 1;
    event.payment_id := payment.id;
    event.n := coalesce(previous.n, 0) + 1;
    event.at := clock_timestamp();
    -- Rows beside a payment name their author themselves. A change in psql names the database user.
    event.actor := coalesce(nullif(current_setting('paygate.actor', true), ''),
        CASE WHEN current_setting('application_name') = 'paygate' THEN 'paygate' ELSE 'operator:' || session_user END);
    event.from_status := previous.to_status;
    event.to_status := payment.status;
    event.amount_minor := payment.amount_minor;
    event.currency := payment.currency;
    event.mode := payment.mode;
    event.reference := coalesce(payment.charge_reference,
        payment.reference || CASE WHEN payment.attempt > 1 THEN '-' || payment.attempt ELSE '' END);
    event.charged_minor := payment.charged_minor;
    event.refunded_minor := payment.refunded_minor;
    event.digest := payment_digest(payment);
    event.hash := payment_event_hash(previous.hash, event);
    INSERT INTO payment_events OVERRIDING USER VALUE VALUES (event.*);  -- the id is the sequence's next value
    RETURN NULL;
END
$$;

CREATE TRIGGER a_new_payment_is_audited AFTER INSERT ON payments
    FOR EACH ROW EXECUTE FUNCTION write_payment_event();

CREATE TRIGGER a_changed_payment_is_audited AFTER UPDATE ON payments
    FOR EACH ROW WHEN (proved(to_jsonb(OLD)) <> proved(to_jsonb(NEW))) EXECUTE FUNCTION write_payment_event();
CREATE TRIGGER a_charge_is_audited AFTER INSERT OR UPDATE ON charges
    FOR EACH ROW EXECUTE FUNCTION write_payment_event();
CREATE TRIGGER a_new_refund_is_audited AFTER INSERT ON refunds
    FOR EACH ROW EXECUTE FUNCTION write_payment_event();
CREATE TRIGGER a_changed_refund_is_audited AFTER UPDATE ON refunds
    FOR EACH ROW WHEN (proved(to_jsonb(OLD)) <> proved(to_jsonb(NEW))) EXECUTE FUNCTION write_payment_event();
CREATE TRIGGER an_incident_is_audited AFTER INSERT OR UPDATE ON incidents
    FOR EACH ROW WHEN (NEW.payment_id IS NOT NULL) EXECUTE FUNCTION write_payment_event();
CREATE TRIGGER a_changed_order_is_audited AFTER UPDATE OF fingerprint ON idempotency_keys
    FOR EACH ROW EXECUTE FUNCTION write_payment_event();
CREATE TRIGGER a_kept_event_is_audited AFTER INSERT ON provider_events
    FOR EACH ROW WHEN (NEW.outcome = 'received' AND NEW.payment_id IS NOT NULL) EXECUTE FUNCTION write_payment_event();
CREATE TRIGGER an_event_that_is_kept_no_more_is_audited AFTER UPDATE OF outcome ON provider_events
    FOR EACH ROW WHEN (OLD.outcome <> NEW.outcome AND 'received' IN (OLD.outcome, NEW.outcome)
                       AND NEW.payment_id IS NOT NULL)
    EXECUTE FUNCTION write_payment_event();

-- Writes a notification of a payment's change or of an incident. `paygate.notify` is on in every transaction of a
-- service that has NOTIFY_URL set. The payment is locked, so the numbers have no gap and the order is certain.
CREATE FUNCTION notify_merchant() RETURNS trigger LANGUAGE plpgsql
    SET search_path FROM CURRENT AS $$
DECLARE
    payment payments;
    type text := 'incident.opened';
    incident_id bigint;
BEGIN
    IF TG_TABLE_NAME = 'payments' THEN
        payment := NEW;
        type := 'payment.' || NEW.status;
    ELSE
        SELECT * INTO payment FROM payments WHERE id = NEW.payment_id FOR UPDATE;
        payment.mode := NEW.mode;
        incident_id := NEW.id;
    END IF;
    UPDATE payments SET notified = notified + 1 WHERE id = payment.id RETURNING notified INTO payment.notified;
    INSERT INTO notifications (mode, type, payment_id, incident_id, sequence, due_at, facts)
    VALUES (payment.mode, type, payment.id, incident_id, coalesce(payment.notified, 1),
            CASE WHEN NOT EXISTS (SELECT FROM notifications
                                   WHERE payment_id = payment.id AND delivered_at IS NULL AND dead_at IS NULL)
                 THEN clock_timestamp() END,
            (SELECT jsonb_object_agg(key, value) FROM jsonb_each(to_jsonb(payment))
              WHERE key IN ('status', 'status_reason', 'attempt', 'checkout_url', 'charge_reference', 'charged_minor',
                            'charged_currency', 'refunded_minor', 'paid_at')));
    RETURN NULL;
END
$$;

CREATE TRIGGER a_changed_payment_is_notified AFTER UPDATE ON payments
    FOR EACH ROW
    WHEN ((OLD.status, OLD.refunded_minor) IS DISTINCT FROM (NEW.status, NEW.refunded_minor)
          AND current_setting('paygate.notify', true) = 'on')
    EXECUTE FUNCTION notify_merchant();
CREATE TRIGGER a_new_incident_is_notified AFTER INSERT ON incidents
    FOR EACH ROW WHEN (current_setting('paygate.notify', true) = 'on') EXECUTE FUNCTION notify_merchant();

-- A payment is paid only by a charge in its mode and currency, asked at its amount and paid in full, or by an
-- operator's recorded acceptance. In review, a wholly refunded charge also leads to `refunded`, whatever its amount.
CREATE FUNCTION guard_completion() RETURNS trigger LANGUAGE plpgsql
    SET search_path FROM CURRENT AS $$
BEGIN
    IF NEW.accepted_by IS NULL
       AND NOT (TG_OP = 'UPDATE' AND OLD.status = NEW.status)
       AND NOT (TG_OP = 'UPDATE' AND OLD.status = 'review' AND NEW.status = 'refunded' AND EXISTS (
           SELECT FROM refunds WHERE charge_reference = NEW.charge_reference AND status = 'processed'
           HAVING sum(amount_minor) >= NEW.charged_minor))
       AND NOT EXISTS (
           SELECT FROM charges
            WHERE reference = NEW.charge_reference AND payment_id = NEW.id
              AND mode = NEW.mode AND currency = NEW.currency
              AND coalesce(requested_minor, NEW.amount_minor) = NEW.amount_minor
              AND amount_minor >= NEW.amount_minor AND amount_minor = NEW.charged_minor) THEN
        RAISE EXCEPTION 'payment % has no charge that pays it', NEW.id USING ERRCODE = 'check_violation';
    END IF;
    -- By the provider's word, else when we recorded the charge.
    NEW.paid_at := coalesce(NEW.paid_at, (SELECT coalesce(paid_at, recorded_at) FROM charges
                                           WHERE reference = NEW.charge_reference));
    RETURN NEW;
END
$$;

CREATE TRIGGER a_completed_payment_is_paid BEFORE INSERT OR UPDATE OF status ON payments
    FOR EACH ROW WHEN (NEW.status IN ('completed', 'partially_refunded', 'refunded'))
    EXECUTE FUNCTION guard_completion();

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql
    SET search_path FROM CURRENT AS $$
BEGIN
    RAISE EXCEPTION '% of % is refused: %', TG_OP, TG_TABLE_NAME, replace(TG_NAME, '_', ' ')
        USING ERRCODE = 'check_violation', CONSTRAINT = TG_NAME;
END
$$;

CREATE TRIGGER what_a_payment_asks_for_never_changes BEFORE UPDATE ON payments FOR EACH ROW
    WHEN ((OLD.id, OLD.mode, OLD.amount_minor, OLD.currency, OLD.reference, OLD.source, OLD.created_at)
          IS DISTINCT FROM
          (NEW.id, NEW.mode, NEW.amount_minor, NEW.currency, NEW.reference, NEW.source, NEW.created_at))
    EXECUTE FUNCTION refuse_change();
-- From review only the whole charge given back, or an acceptance, leads on.
CREATE TRIGGER a_payment_only_rises BEFORE UPDATE ON payments FOR EACH ROW
    WHEN ((NEW.status <> OLD.status AND payment_rank(NEW.status) <= payment_rank(OLD.status))
          OR (OLD.status = 'review' AND NEW.status = 'partially_refunded')
          OR NEW.attempt < OLD.attempt)
    EXECUTE FUNCTION refuse_change();
CREATE TRIGGER a_payment_keeps_its_page_its_charge_and_its_erasure BEFORE UPDATE ON payments FOR EACH ROW
    WHEN ((OLD.checkout_url IS NOT NULL AND NEW.checkout_url IS DISTINCT FROM OLD.checkout_url)
          OR (OLD.charge_reference IS NOT NULL AND (OLD.charge_reference, OLD.charged_minor, OLD.charged_currency)
              IS DISTINCT FROM (NEW.charge_reference, NEW.charged_minor, NEW.charged_currency))
          OR (OLD.erased_at IS NOT NULL AND NEW.erased_at IS DISTINCT FROM OLD.erased_at))
    EXECUTE FUNCTION refuse_change();

CREATE TRIGGER incidents_are_never_removed BEFORE DELETE OR TRUNCATE ON incidents EXECUTE FUNCTION refuse_change();

-- A refund belongs to one charge and one request for ever. Its amount is the amount that the provider took first.
CREATE TRIGGER a_refund_stays_what_it_is BEFORE UPDATE ON refunds FOR EACH ROW
    WHEN ((OLD.id, OLD.charge_reference, OLD.payment_id, OLD.mode, OLD.origin, OLD.created_at)
          IS DISTINCT FROM (NEW.id, NEW.charge_reference, NEW.payment_id, NEW.mode, NEW.origin, NEW.created_at)
          OR (OLD.provider_id IS NOT NULL AND (OLD.provider_id, OLD.amount_minor, OLD.currency)
                                               IS DISTINCT FROM (NEW.provider_id, NEW.amount_minor, NEW.currency))
          OR (OLD.status <> 'unanswered' AND NEW.status = 'unanswered'))
    EXECUTE FUNCTION refuse_change();
CREATE TRIGGER refunds_are_never_removed BEFORE DELETE OR TRUNCATE ON refunds EXECUTE FUNCTION refuse_change();
CREATE TRIGGER payments_are_never_removed BEFORE DELETE OR TRUNCATE ON payments EXECUTE FUNCTION refuse_change();
CREATE TRIGGER keys_are_never_removed BEFORE DELETE OR TRUNCATE ON idempotency_keys EXECUTE FUNCTION refuse_change();
CREATE TRIGGER charges_are_never_removed BEFORE DELETE OR TRUNCATE ON charges EXECUTE FUNCTION refuse_change();
CREATE TRIGGER a_charge_learns_its_fees_once BEFORE UPDATE ON charges
    FOR EACH ROW WHEN (OLD.fees_minor IS NOT NULL
                       OR to_jsonb(OLD) - 'fees_minor' IS DISTINCT FROM to_jsonb(NEW) - 'fees_minor')
    EXECUTE FUNCTION refuse_change();
CREATE TRIGGER payment_events_are_never_changed BEFORE UPDATE OR DELETE OR TRUNCATE ON payment_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER withdrawn_orders_stay_so BEFORE UPDATE OR DELETE OR TRUNCATE ON withdrawn_orders
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER the_secret_is_never_changed BEFORE UPDATE OR DELETE OR TRUNCATE ON secrets
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
