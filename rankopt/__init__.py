"""rankopt: make a trained PyTorch model smaller and really faster, by low rank."""

from rankopt._apply import apply, apply_
from rankopt._compare import Comparison, compare
from rankopt._merge import merge, merge_plan
from rankopt._recover import Recovery, recover
from rankopt._search import search
from rankopt._version import __version__
from rankopt.budget import Budget
from rankopt.calibration import recalibrate
from rankopt.checkpoint import load, load_plan, save
from rankopt.plan import Decision, RankPlan
from rankopt.registry import decompositions, strategies
from rankopt.strategy import Option, Problem, Site, Strategy, Tags

__all__ = [
    "Budget",
    "Comparison",
    "Decision",
    "Option",
    "Problem",
    "RankPlan",
    "Recovery",
    "Site",
    "Strategy",
    "Tags",
    "__version__",
    "apply",
    "apply_",
    "compare",
    "decompositions",
    "load",
    "load_plan",
    "merge",
    "merge_plan",
    "recalibrate",
    "recover",
    "save",
    "search",
    "strategies",
]
