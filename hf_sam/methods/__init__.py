"""What a method is: where to perturb, what to step along, and the table of the published ones."""

from .table import METHODS, Method

__all__ = ["METHODS", "Method"]
