"""GET /metrics."""

from typing import Any

import falcon

from web.errors import Problem
from web.office import Office


class Metrics:
    """GET /metrics: figures from the database, in Prometheus' text format, so every process reports the same."""

    def __init__(self, office: Office) -> None:
        self.office = office

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        token = self.office.settings.metrics_token
        if token is None:
            raise Problem("not_found")
        self.office.guard.check_bearer(req, token)
        resp.content_type = "text/plain; version=0.0.4; charset=utf-8"
        resp.text = render_metrics(self.office.rows(FIGURES))


METRICS = {
    "paygate_incidents_open": "Incidents that wait for a person, by kind.",
    "paygate_last_answered_poll_timestamp_seconds": "When the provider last answered a poll.",
    "paygate_notifications_dead": "Notifications that the merchant's receiver never took.",
    "paygate_oldest_due_poll_seconds": "How long the most overdue poll has been due.",
    "paygate_oldest_due_notification_seconds": "How long the most overdue notification has been due.",
    "paygate_payments": "Payments by status: open ones, and those that came to their status in the last day.",
    "paygate_payments_found_late": "Payments of the last day that a poll found, over a minute after they were paid.",
}


def render_metrics(rows: list[dict[str, Any]]) -> str:
    """Prometheus' text exposition format; the rows of one name stand together."""
    lines: list[str] = []
    for name, text in METRICS.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
        for row in rows:
            if row["name"] == name:
                label = f',{"kind" if name == "paygate_incidents_open" else "status"}="{row["status"]}"'
                lines.append(f'{name}{{mode="{row["mode"]}"{label if row["status"] else ""}}} {row["value"]:.15g}')
    return "\n".join(lines) + "\n"


FIGURES = """
    WITH today AS (
        SELECT * FROM payment_events WHERE at > now() - interval '1 day' AND mode = %(mode)s
    ), named AS (
        SELECT 'paygate_payments' AS name, status, count(*)::float8 AS value
          FROM payments WHERE mode = %(mode)s AND status IN ('pending', 'review') GROUP BY status
        UNION ALL
        SELECT 'paygate_payments', to_status, count(*)
          FROM today
         WHERE to_status NOT IN ('pending', 'review') AND to_status IS DISTINCT FROM from_status
         GROUP BY to_status
        UNION ALL
        SELECT 'paygate_payments_found_late', NULL, count(*)
          FROM today e JOIN charges c USING (reference)
         WHERE e.why = 'charge' AND e.actor = 'worker' AND c.recorded_at - c.paid_at > interval '1 min'
        UNION ALL
        SELECT 'paygate_oldest_due_poll_seconds', NULL, coalesce(extract(epoch FROM now() - min(poll_at)), 0)
          FROM payments WHERE mode = %(mode)s AND poll_at <= now()
        UNION ALL
        SELECT 'paygate_oldest_due_notification_seconds', NULL,
               coalesce(extract(epoch FROM now() - min(due_at)), 0)
          FROM notifications WHERE mode = %(mode)s AND due_at <= now()
        UNION ALL
        SELECT 'paygate_notifications_dead', NULL, count(*)
          FROM notifications WHERE mode = %(mode)s AND dead_at IS NOT NULL
        UNION ALL
        SELECT 'paygate_incidents_open', kind, count(*)
          FROM incidents WHERE mode = %(mode)s AND closed_at IS NULL GROUP BY kind
        UNION ALL
        SELECT 'paygate_last_answered_poll_timestamp_seconds', NULL, extract(epoch FROM done_at)
          FROM jobs WHERE mode = %(mode)s AND name = 'poll' AND done_at IS NOT NULL
    )
    SELECT name, %(mode)s::text AS mode, status, value FROM named ORDER BY name, status
    """
"""Rows of `name`, `mode`, `status` (or null) and `value`, of this mode alone: no worker polls the other mode's
payments, so they would be overdue for ever."""
