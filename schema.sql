-- paygate's tables, the state machine and the audit trail.
--
-- Each numbered block below is a migration: `manage.py migrate` runs those that a database lacks, in order, each in a
-- transaction of its own. A block that has been released is never changed; the next one adds to it. What the database
-- refuses here, it refuses to every caller: the service, an operator's psql, a future version with a bug.
--
-- Amounts (`…_minor`) are in hundredths of the currency, always.

-- migration 1: payments, their keys, charges and events, the audit trail

-- The secret from which ids, references and links are derived. One row, made by `migrate`.
CREATE TABLE secrets (
    the_only_row boolean PRIMARY KEY DEFAULT true CONSTRAINT secrets_is_one_row CHECK (the_only_row),
    value bytea NOT NULL CONSTRAINT secret_is_256_bits CHECK (octet_length(value) = 32)
);

-- The line along which a payment's state rises. Any step may be skipped, none goes back.
CREATE FUNCTION payment_rank(status text) RETURNS integer LANGUAGE sql IMMUTABLE STRICT AS $$
    SELECT CASE status
        WHEN 'pending' THEN 0
        WHEN 'failed' THEN 1
        WHEN 'expired' THEN 1
        WHEN 'review' THEN 2
        WHEN 'completed' THEN 3
        WHEN 'partially_refunded' THEN 4
        WHEN 'refunded' THEN 5
    END
$$;

CREATE TABLE payments (
    id text PRIMARY KEY CONSTRAINT id_is_pay_and_26_of_base32 CHECK (id ~ '^PAY-[0-9A-HJKMNP-TV-Z]{26}$'),
    mode text NOT NULL CONSTRAINT mode_is_test_or_live CHECK (mode IN ('test', 'live')),
    status text NOT NULL DEFAULT 'pending' CONSTRAINT status_is_known CHECK (payment_rank(status) IS NOT NULL),
    status_reason text,
    amount_minor bigint NOT NULL CONSTRAINT amount_is_positive CHECK (amount_minor > 0),
    currency text NOT NULL CONSTRAINT currency_is_three_letters CHECK (currency ~ '^[A-Z]{3}$'),

    -- The first reference at the provider, `PG-…`. The one reached is this for attempt 1, else `PG-…-2` to `PG-…-9`.
    reference text NOT NULL CONSTRAINT reference_is_used_once UNIQUE
        CONSTRAINT reference_is_pg_and_26_of_base32 CHECK (reference ~ '^PG-[0-9A-HJKMNP-TV-Z]{26}$'),
    attempt smallint NOT NULL DEFAULT 1 CONSTRAINT attempt_is_1_to_9 CHECK (attempt BETWEEN 1 AND 9),
    checkout_url text,

    -- The charge that this payment follows: the first success that the provider reported for one of its references.
    charge_reference text,
    charged_minor bigint NOT NULL DEFAULT 0,
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
    -- When the personal data were overwritten; whatever comes later is stored without them.
    erased_at timestamptz,

    -- When the worker looks at the provider next; null once there is nothing left to learn.
    look_at timestamptz,
    looked_at timestamptz,
    -- While a worker asks about it, until when nobody else does.
    look_leased_until timestamptz,
    -- Since when a paid payment is looked at for refunds that its provider spoke of but has not listed yet; and whether
    -- it said that the whole charge is on its way back, which ends as a refund or as a chargeback.
    refunds_awaited_since timestamptz,
    is_reversed boolean NOT NULL DEFAULT false,
    -- How many notifications were made of it, also those that have been pruned.
    notified integer NOT NULL DEFAULT 0,

    CONSTRAINT completed_has_paid_at CHECK (
        (status IN ('completed', 'partially_refunded', 'refunded')) = (paid_at IS NOT NULL)),
    CONSTRAINT money_came_has_a_charge CHECK (
        (payment_rank(status) >= 2) = (charge_reference IS NOT NULL)),
    CONSTRAINT charged_is_of_a_charge CHECK (
        charged_minor = 0 OR (charged_minor > 0 AND charge_reference IS NOT NULL)),
    CONSTRAINT refunded_is_of_a_charge CHECK (refunded_minor = 0 OR charge_reference IS NOT NULL)
);

CREATE INDEX payments_due_for_a_look ON payments (mode, look_at) WHERE look_at IS NOT NULL;
CREATE INDEX payments_open ON payments (mode, status) WHERE status IN ('pending', 'review');
CREATE INDEX payments_newest_first ON payments (created_at DESC, id);
CREATE INDEX payments_by_email ON payments (lower(customer_email), id);

-- A request with an Idempotency-Key, or with the random key that a request without one is given. It is kept as long
-- as its payment: an expiring key is a double charge waiting to happen.
CREATE TABLE idempotency_keys (
    mode text NOT NULL,
    key bytea NOT NULL CONSTRAINT key_is_a_sha256 CHECK (octet_length(key) = 32),
    fingerprint bytea NOT NULL CONSTRAINT fingerprint_is_a_sha256 CHECK (octet_length(fingerprint) = 32),
    payment_id text NOT NULL CONSTRAINT key_has_a_payment REFERENCES payments CONSTRAINT payment_has_one_key UNIQUE,

    -- The lease: whoever holds `token` may open the checkout until `leased_until`; null when it was given back.
    token uuid NOT NULL,
    leased_until timestamptz,
    -- Whether the reference reached is known to exist at the provider, so that it is verified and not initialized.
    reference_exists boolean NOT NULL DEFAULT false,

    answer_status smallint,
    answer text,
    answered_at timestamptz,

    PRIMARY KEY (mode, key),
    CONSTRAINT an_answer_is_whole CHECK (num_nulls(answer_status, answer, answered_at) IN (0, 3)),
    CONSTRAINT an_answer_is_never_a_server_error CHECK (answer_status < 500)
);

-- Money that came, as the provider reported it. A row never changes.
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
    paid_at timestamptz,
    source text NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE INDEX charges_of_a_payment ON charges (payment_id);
CREATE INDEX charges_by_provider_id ON charges (provider_id);

-- Money that goes back. Ours are committed before they are asked for, with our id as the provider's merchant note, and
-- asked for once; those made in the provider's dashboard are adopted from its list.
--
--   unanswered          asked for, or about to be; nobody knows; counts as spent
--   pending … processed  the provider's words
--   refused             the provider did not take it; the amount is free
--   not_made            it is not on the provider's list, 30 minutes after it was asked for; the amount is free
CREATE TABLE refunds (
    id text PRIMARY KEY CONSTRAINT refund_id_is_rf_and_26_of_base32 CHECK (id ~ '^RF-[0-9A-HJKMNP-TV-Z]{26}$'),
    charge_reference text NOT NULL CONSTRAINT refund_has_a_charge REFERENCES charges,
    payment_id text NOT NULL CONSTRAINT refund_has_a_payment REFERENCES payments,
    mode text NOT NULL,
    provider_id bigint,
    amount_minor bigint NOT NULL CONSTRAINT refunded_amount_is_positive CHECK (amount_minor > 0),
    currency text NOT NULL,
    status text NOT NULL CONSTRAINT refund_status_is_known CHECK (status IN (
        'unanswered', 'pending', 'processing', 'needs-attention', 'processed', 'failed', 'refused', 'not_made')),
    origin text NOT NULL CONSTRAINT refund_origin_is_known CHECK (origin IN ('paygate', 'dashboard')),
    made_by text NOT NULL,
    reason text,
    refused_because text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- When our one call ended, answered or not. A command that was killed has none.
    send_ended_at timestamptz,
    processed_at timestamptz,
    look_at timestamptz,
    CONSTRAINT refund_is_recorded_once UNIQUE (mode, provider_id),
    CONSTRAINT the_provider_names_what_it_took CHECK (
        provider_id IS NOT NULL OR status IN ('unanswered', 'refused', 'not_made')),
    CONSTRAINT processed_has_its_time CHECK (status <> 'processed' OR processed_at IS NOT NULL)
);

CREATE INDEX refunds_of_a_charge ON refunds (charge_reference);
CREATE INDEX refunds_of_a_payment ON refunds (payment_id);
CREATE INDEX refunds_due_for_a_look ON refunds (mode, look_at) WHERE look_at IS NOT NULL;

-- What the provider's webhook delivered, once for each different body. `body` is null for what is not ours.
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
    applied_at timestamptz,
    retry_at timestamptz,
    CONSTRAINT an_event_is_stored_once UNIQUE (mode, digest),
    CONSTRAINT applied_has_its_time CHECK ((outcome = 'applied') = (applied_at IS NOT NULL)),
    CONSTRAINT only_a_received_event_is_retried CHECK ((outcome = 'received') = (retry_at IS NOT NULL))
);

CREATE INDEX provider_events_to_apply ON provider_events (mode, retry_at) WHERE retry_at IS NOT NULL;
CREATE INDEX provider_events_by_reference ON provider_events (reference) WHERE reference IS NOT NULL;
CREATE INDEX provider_events_to_prune ON provider_events (mode, received_at) WHERE body IS NOT NULL;

-- What a person must look at. `subject` names what it is about, so that each thing opens one row, ever.
CREATE TABLE incidents (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    mode text NOT NULL,
    kind text NOT NULL CONSTRAINT incident_kind_is_known CHECK (kind IN (
        'second_charge', 'unknown_reference', 'mismatch', 'references_used_up', 'dispute', 'chargeback',
        'refund_failed', 'refund_needs_attention', 'refund_not_final', 'refund_not_made', 'refund_revived',
        'refunded_too_much')),
    subject text NOT NULL,
    payment_id text REFERENCES payments,
    opened_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    closed_at timestamptz,
    closed_by text,
    close_reason text,
    CONSTRAINT a_thing_opens_one_incident UNIQUE (kind, subject),
    CONSTRAINT a_closed_incident_names_who CHECK ((closed_at IS NULL) = (closed_by IS NULL))
);

CREATE INDEX incidents_open ON incidents (mode, opened_at) WHERE closed_at IS NULL;
CREATE INDEX incidents_of_a_payment ON incidents (payment_id) WHERE payment_id IS NOT NULL;

-- What the merchant's own system is told, in the same commit as the change, by the triggers below. `facts` is the
-- payment as it stood then, in what can change of it.
CREATE TABLE notifications (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    mode text NOT NULL,
    type text NOT NULL,
    payment_id text REFERENCES payments,
    incident_id bigint REFERENCES incidents,
    -- The order within a payment: a later one waits, with due_at null, until the earlier one is delivered or dead.
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
);

CREATE INDEX notifications_due ON notifications (mode, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX notifications_dead ON notifications (mode, dead_at) WHERE dead_at IS NOT NULL;
CREATE INDEX notifications_delivered ON notifications (mode, delivered_at) WHERE delivered_at IS NOT NULL;

-- What runs once in a while for all processes: whoever moves `due_at` on does it.
CREATE TABLE jobs (
    mode text NOT NULL,
    name text NOT NULL,
    due_at timestamptz,
    done_at timestamptz,
    PRIMARY KEY (mode, name)
);

-- The audit trail: one row for each change of a payment, written by the trigger below under the payment's row lock,
-- each with a SHA-256 over itself and the row before it of that payment.
CREATE TABLE payment_events (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    payment_id text NOT NULL REFERENCES payments,
    n integer NOT NULL,
    at timestamptz NOT NULL,
    actor text NOT NULL CONSTRAINT actor_is_known
        CHECK (actor IN ('api', 'form', 'link', 'webhook', 'worker') OR actor ~ '^operator:[^[:cntrl:]]{1,100}$'),
    why text NOT NULL CONSTRAINT why_is_known CHECK (why IN (
        'reserved', 'opened', 'next_reference', 'refused', 'declined', 'time_over', 'charge', 'mismatch',
        'refund', 'refund_failed', 'accepted', 'erased', 'by_hand')),
    from_status text,
    to_status text NOT NULL,
    amount_minor bigint NOT NULL,
    currency text NOT NULL,
    mode text NOT NULL,
    reference text NOT NULL,
    charged_minor bigint NOT NULL,
    refunded_minor bigint NOT NULL,
    hash text NOT NULL CONSTRAINT hash_is_a_hex_sha256 CHECK (hash ~ '^[0-9a-f]{64}$'),
    CONSTRAINT payment_events_are_numbered UNIQUE (payment_id, n)
);

-- Rows are appended in the order of time, so that the smallest of indexes finds the last day.
CREATE INDEX payment_events_by_time ON payment_events USING brin (at) WITH (pages_per_range = 32);

-- The hash of an audit row. The fields are joined by line breaks, which none of them can hold.
CREATE FUNCTION payment_event_hash(previous_hash text, event payment_events) RETURNS text LANGUAGE sql STABLE AS $$
    SELECT encode(sha256(convert_to(concat_ws(E'\n',
        coalesce(previous_hash, ''), event.payment_id, event.n,
        to_char(event.at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'),
        event.actor, event.why, coalesce(event.from_status, ''), event.to_status,
        event.amount_minor, event.currency, event.mode, event.reference,
        event.charged_minor, event.refunded_minor), 'UTF8')), 'hex')
$$;

CREATE FUNCTION write_payment_event() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    previous payment_events;
    event payment_events;
BEGIN
    SELECT * INTO previous FROM payment_events WHERE payment_id = NEW.id ORDER BY n DESC LIMIT 1;
    event.payment_id := NEW.id;
    event.n := coalesce(previous.n, 0) + 1;
    event.at := clock_timestamp();
    -- Set with set_config(…, true) by whoever changes a payment; a change made in psql is the database user's.
    event.actor := coalesce(nullif(current_setting('paygate.actor', true), ''), 'operator:' || session_user);
    event.why := coalesce(nullif(current_setting('paygate.why', true), ''), 'by_hand');
    event.from_status := previous.to_status;
    event.to_status := NEW.status;
    event.amount_minor := NEW.amount_minor;
    event.currency := NEW.currency;
    event.mode := NEW.mode;
    event.reference := coalesce(NEW.charge_reference,
        NEW.reference || CASE WHEN NEW.attempt > 1 THEN '-' || NEW.attempt ELSE '' END);
    event.charged_minor := NEW.charged_minor;
    event.refunded_minor := NEW.refunded_minor;
    INSERT INTO payment_events (payment_id, n, at, actor, why, from_status, to_status, amount_minor, currency, mode,
                                reference, charged_minor, refunded_minor, hash)
    VALUES (event.payment_id, event.n, event.at, event.actor, event.why, event.from_status, event.to_status,
            event.amount_minor, event.currency, event.mode, event.reference, event.charged_minor, event.refunded_minor,
            payment_event_hash(previous.hash, event));
    RETURN NULL;
END
$$;

CREATE TRIGGER a_new_payment_is_audited AFTER INSERT ON payments
    FOR EACH ROW EXECUTE FUNCTION write_payment_event();

-- Everything but when to look next.
CREATE TRIGGER a_changed_payment_is_audited AFTER UPDATE ON payments
    FOR EACH ROW
    WHEN ((OLD.status, OLD.status_reason, OLD.attempt, OLD.checkout_url, OLD.charge_reference, OLD.charged_minor,
           OLD.refunded_minor, OLD.accepted_by, OLD.paid_at, OLD.expires_at, OLD.customer_name, OLD.customer_email,
           OLD.customer_phone, OLD.location, OLD.description, OLD.metadata, OLD.return_url, OLD.erased_at)
          IS DISTINCT FROM
          (NEW.status, NEW.status_reason, NEW.attempt, NEW.checkout_url, NEW.charge_reference, NEW.charged_minor,
           NEW.refunded_minor, NEW.accepted_by, NEW.paid_at, NEW.expires_at, NEW.customer_name, NEW.customer_email,
           NEW.customer_phone, NEW.location, NEW.description, NEW.metadata, NEW.return_url, NEW.erased_at))
    EXECUTE FUNCTION write_payment_event();

-- One notification, while `paygate.notify` is on, as it is in every transaction of a service that has NOTIFY_URL set.
-- The caller holds the payment's lock, so the numbers have no gap and the order no doubt.
CREATE FUNCTION notify_merchant(payment payments, type text, incident_id bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    next integer;
BEGIN
    UPDATE payments SET notified = notified + 1 WHERE id = payment.id RETURNING notified INTO next;
    INSERT INTO notifications (mode, type, payment_id, incident_id, sequence, due_at, facts)
    VALUES (payment.mode, type, payment.id, incident_id, coalesce(next, 1),
            CASE WHEN NOT EXISTS (SELECT FROM notifications
                                   WHERE payment_id = payment.id AND delivered_at IS NULL AND dead_at IS NULL)
                 THEN clock_timestamp() END,
            jsonb_build_object(
                'status', payment.status, 'status_reason', payment.status_reason, 'attempt', payment.attempt,
                'checkout_url', payment.checkout_url, 'charge_reference', payment.charge_reference,
                'charged_minor', payment.charged_minor, 'refunded_minor', payment.refunded_minor,
                'paid_at', payment.paid_at));
END
$$;

CREATE FUNCTION notify_of_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('paygate.notify', true) = 'on' THEN
        PERFORM notify_merchant(NEW, 'payment.' || NEW.status, NULL);
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER a_changed_payment_is_notified AFTER UPDATE ON payments
    FOR EACH ROW
    WHEN ((OLD.status, OLD.refunded_minor) IS DISTINCT FROM (NEW.status, NEW.refunded_minor))
    EXECUTE FUNCTION notify_of_change();

CREATE FUNCTION notify_of_incident() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    payment payments;
BEGIN
    IF current_setting('paygate.notify', true) = 'on' THEN
        SELECT * INTO payment FROM payments WHERE id = NEW.payment_id FOR UPDATE;
        payment.mode := NEW.mode;
        PERFORM notify_merchant(payment, 'incident.opened', NEW.id);
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER a_new_incident_is_notified AFTER INSERT ON incidents
    FOR EACH ROW EXECUTE FUNCTION notify_of_incident();

CREATE FUNCTION guard_payment() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (OLD.id, OLD.mode, OLD.amount_minor, OLD.currency, OLD.reference, OLD.source, OLD.created_at)
       IS DISTINCT FROM (NEW.id, NEW.mode, NEW.amount_minor, NEW.currency, NEW.reference, NEW.source, NEW.created_at) THEN
        RAISE EXCEPTION 'what payment % asks for never changes', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.status <> OLD.status AND payment_rank(NEW.status) <= payment_rank(OLD.status) THEN
        RAISE EXCEPTION 'payment % cannot fall from % to %', OLD.id, OLD.status, NEW.status
            USING ERRCODE = 'check_violation';
    END IF;
    IF OLD.status = 'review' AND NEW.status = 'partially_refunded' THEN
        RAISE EXCEPTION 'payment % leaves review only accepted or wholly refunded', OLD.id
            USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.attempt < OLD.attempt THEN
        RAISE EXCEPTION 'payment % cannot go back to an earlier reference', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.checkout_url IS DISTINCT FROM OLD.checkout_url AND OLD.checkout_url IS NOT NULL THEN
        RAISE EXCEPTION 'payment % has its checkout URL already', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    IF OLD.charge_reference IS NOT NULL AND (OLD.charge_reference, OLD.charged_minor)
       IS DISTINCT FROM (NEW.charge_reference, NEW.charged_minor) THEN
        RAISE EXCEPTION 'payment % follows its own charge only', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    IF OLD.erased_at IS NOT NULL AND NEW.erased_at IS DISTINCT FROM OLD.erased_at THEN
        RAISE EXCEPTION 'payment % has been erased', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER a_payment_only_rises BEFORE UPDATE ON payments
    FOR EACH ROW EXECUTE FUNCTION guard_payment();

-- A payment counts as paid only by a charge in its mode and currency, asked at exactly its amount and paid in full, or
-- by an operator's recorded acceptance. From review a wholly refunded charge leads on too, whatever its amount.
CREATE FUNCTION guard_completion() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.accepted_by IS NULL
       AND NOT (TG_OP = 'UPDATE' AND NEW.status = 'refunded' AND NEW.refunded_minor >= NEW.charged_minor)
       AND NOT EXISTS (
           SELECT FROM charges
            WHERE reference = NEW.charge_reference AND payment_id = NEW.id
              AND mode = NEW.mode AND currency = NEW.currency
              AND coalesce(requested_minor, NEW.amount_minor) = NEW.amount_minor
              AND amount_minor >= NEW.amount_minor AND amount_minor = NEW.charged_minor) THEN
        RAISE EXCEPTION 'payment % has no charge that pays it', NEW.id USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER a_completed_payment_is_paid BEFORE INSERT OR UPDATE OF status ON payments
    FOR EACH ROW WHEN (NEW.status IN ('completed', 'partially_refunded', 'refunded'))
    EXECUTE FUNCTION guard_completion();

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% of % is refused: its rows are kept as they are', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'check_violation';
END
$$;

-- A refund is of one charge and one request for ever; only what the provider lists may correct its amount.
CREATE FUNCTION guard_refund() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (OLD.id, OLD.charge_reference, OLD.payment_id, OLD.mode, OLD.origin, OLD.created_at)
       IS DISTINCT FROM (NEW.id, NEW.charge_reference, NEW.payment_id, NEW.mode, NEW.origin, NEW.created_at)
       OR (OLD.provider_id IS NOT NULL AND NEW.provider_id IS DISTINCT FROM OLD.provider_id) THEN
        RAISE EXCEPTION 'what refund % is of never changes', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    IF NEW.status = 'unanswered' AND OLD.status <> 'unanswered' THEN
        RAISE EXCEPTION 'refund % has been answered', OLD.id USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER a_refund_stays_what_it_is BEFORE UPDATE ON refunds
    FOR EACH ROW EXECUTE FUNCTION guard_refund();

CREATE TRIGGER refunds_are_never_removed BEFORE DELETE OR TRUNCATE ON refunds
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER payments_are_never_removed BEFORE DELETE OR TRUNCATE ON payments
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER keys_are_never_removed BEFORE DELETE OR TRUNCATE ON idempotency_keys
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER charges_are_never_changed BEFORE UPDATE OR DELETE OR TRUNCATE ON charges
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER payment_events_are_never_changed BEFORE UPDATE OR DELETE OR TRUNCATE ON payment_events
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER the_secret_is_never_changed BEFORE UPDATE OR DELETE OR TRUNCATE ON secrets
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();


-- migration 2: the same rules for less of the processor's time, fewer bytes, and queues that stay short

-- Checks call this for each row that is written. As SQL, and STRICT, it cannot be inlined and was parsed each time: a
-- tenth of what a payment costs the database.
CREATE OR REPLACE FUNCTION payment_rank(status text) RETURNS integer LANGUAGE plpgsql IMMUTABLE STRICT AS $$
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

-- A claim walks over the index entries of all that was due since the last vacuum: a page whose times have passed gets no
-- new entry, and so is cleaned by VACUUM alone. With nothing due a claim takes 0.006 ms, 1.5 ms after 100,000 looks, and
-- by default a vacuum comes when a fifth of the table has changed. Without index_cleanup it leaves the indexes alone
-- while fewer than 2 % of the pages have something dead, which in a large table is for ever.
ALTER TABLE payments SET (
    autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000, vacuum_index_cleanup = on);
ALTER TABLE provider_events SET (
    autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000, vacuum_index_cleanup = on);
ALTER TABLE notifications SET (
    autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000, vacuum_index_cleanup = on);

-- /metrics reads as a whole what payment_events_by_time has not summarized yet, and only VACUUM summarizes. One of a
-- table that only grows is cheap.
ALTER TABLE payment_events SET (
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 10000);

-- Of each payment 250 bytes less. A B-tree packs what is appended to its right end, and an incremental sort settles
-- equal times; of equal e-mail addresses it stores one; a payment is never removed, so nobody asks for the charges of
-- one; and an event's reference is looked up by equality alone. Built before the old ones go: so reads wait for an
-- instant only, and writes for a second or two a million payments.
CREATE INDEX payments_by_time ON payments (created_at);
CREATE INDEX payments_by_customer ON payments (lower(customer_email));
CREATE INDEX provider_events_of_a_reference ON provider_events USING hash (reference);
DROP INDEX payments_newest_first, payments_by_email, provider_events_by_reference, charges_of_a_payment;
