"""How state moves: what loading needs beyond torch, what is compared then, and the formats of other Muons."""

from distmuon.checkpoint.converting import convert
from distmuon.checkpoint.fitting import reset_changed
from distmuon.checkpoint.routing_table import differences, enumerate_differences, routing_table

__all__ = ["convert", "differences", "enumerate_differences", "reset_changed", "routing_table"]
