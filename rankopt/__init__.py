"""rankopt: low-rank compression of trained PyTorch models under budgets."""

from rankopt import export, training
from rankopt._build.apply import apply, apply_
from rankopt._build.compare import Comparison, compare
from rankopt._build.fold import fold
from rankopt._calibration.batchnorm import recalibrate
from rankopt._decompositions import (
    CP,
    SVD,
    TT,
    Basis,
    BranchedTucker,
    Decomposition,
    DepthwiseSeparable,
    RankAxis,
    SpatialSVD,
    Tucker2,
)
from rankopt._decompositions.cache import clear_cache
from rankopt._model.metric import Evaluate
from rankopt._report.report import report
from rankopt._search.merge import merge, merge_plan
from rankopt._search.profile import profile
from rankopt._search.search import search
from rankopt._study import Point, Study, claim_device, study
from rankopt._timing.layer_profile import LayerProfile
from rankopt._timing.profile_table import ProfileTable
from rankopt._version import __version__
from rankopt.agreement import Agreement
from rankopt.budget import Budget
from rankopt.checkpoint import load, load_plan, save
from rankopt.pipeline import Compression, compress
from rankopt.plan import Decision, RankPlan
from rankopt.registry import decompositions, strategies
from rankopt.soft import SoftModel, soften
from rankopt.strategy import Option, Problem, Site, Strategy, Tags
from rankopt.training.finetune import Training, finetune
from rankopt.training.repair import Recovery, recover

__all__ = [
    "CP",
    "SVD",
    "TT",
    "Agreement",
    "Basis",
    "BranchedTucker",
    "Budget",
    "Comparison",
    "Compression",
    "Decision",
    "Decomposition",
    "DepthwiseSeparable",
    "Evaluate",
    "LayerProfile",
    "Option",
    "Point",
    "Problem",
    "ProfileTable",
    "RankAxis",
    "RankPlan",
    "Recovery",
    "Site",
    "SoftModel",
    "SpatialSVD",
    "Strategy",
    "Study",
    "Tags",
    "Training",
    "Tucker2",
    "__version__",
    "apply",
    "apply_",
    "claim_device",
    "clear_cache",
    "compare",
    "compress",
    "decompositions",
    "export",
    "finetune",
    "fold",
    "load",
    "load_plan",
    "merge",
    "merge_plan",
    "profile",
    "recalibrate",
    "recover",
    "report",
    "save",
    "search",
    "soften",
    "strategies",
    "study",
    "training",
]
