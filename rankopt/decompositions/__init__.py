"""Decompositions: how one layer becomes a chain, one method per file."""

from rankopt.decompositions.base import Basis, Decomposition, RankAxis
from rankopt.decompositions.branched_tucker import BranchedTucker
from rankopt.decompositions.cp import CP
from rankopt.decompositions.spatial_svd import SpatialSVD
from rankopt.decompositions.svd import SVD
from rankopt.decompositions.tt import TT
from rankopt.decompositions.tucker2 import Tucker2

__all__ = [
    "CP",
    "SVD",
    "TT",
    "Basis",
    "BranchedTucker",
    "Decomposition",
    "RankAxis",
    "SpatialSVD",
    "Tucker2",
]
