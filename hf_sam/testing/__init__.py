"""The conformance suite for the package's and custom methods: `check_method`."""

from .conformance import Report, check_method, check_on_processes

__all__ = ["Report", "check_method", "check_on_processes"]
