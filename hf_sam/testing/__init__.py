"""`check_method`: the conformance suite for built-in and custom methods."""

from .conformance import Report, check_method, check_on_processes

__all__ = ["Report", "check_method", "check_on_processes"]
