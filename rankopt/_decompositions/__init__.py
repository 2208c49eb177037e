"""Decompositions: how one layer becomes a chain, one method per file."""

from rankopt._decompositions.base import Basis, Decomposition, RankAxis
from rankopt._decompositions.branched_tucker import BranchedTucker
from rankopt._decompositions.cp import CP
from rankopt._decompositions.depthwise_separable import DepthwiseSeparable
from rankopt._decompositions.spatial_svd import SpatialSVD
from rankopt._decompositions.svd import SVD
from rankopt._decompositions.tt import TT
from rankopt._decompositions.tucker2 import Tucker2

__all__ = [
    "CP",
    "SVD",
    "TT",
    "Basis",
    "BranchedTucker",
    "Decomposition",
    "DepthwiseSeparable",
    "RankAxis",
    "SpatialSVD",
    "Tucker2",
]
