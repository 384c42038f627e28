"""The conformance suite for methods, the package's own and users': `check_method`."""

from .conformance import Report, check_method, check_on_processes

__all__ = ["Report", "check_method", "check_on_processes"]
