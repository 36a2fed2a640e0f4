"""The relay by the name that tests import."""

from local.relay import Moment, Relay

__all__ = ["Moment", "Relay"]
