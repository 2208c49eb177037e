"""What a strategy must be, what it sees, and what it may choose by."""

from rankopt.strategy.base import Strategy, Tags, check_share, check_timeout
from rankopt.strategy.problem import Problem
from rankopt.strategy.sites import LATENCY, Frontier, Option, Site, decide

__all__ = [
    "LATENCY",
    "Frontier",
    "Option",
    "Problem",
    "Site",
    "Strategy",
    "Tags",
    "check_share",
    "check_timeout",
    "decide",
]
