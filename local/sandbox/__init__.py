"""A stand-in for Paystack. `python -m local.sandbox --help` says what it can do; it imports nothing of paygate's.

Each file imports from those before it: wire, fees, ledger, shapes, settings, faults, background, webhooks, controls,
endpoints, page, server.
"""

from local.sandbox.ledger import SandboxError
from local.sandbox.server import Sandbox
from local.sandbox.webhooks import sign

__all__ = ["Sandbox", "SandboxError", "sign"]
