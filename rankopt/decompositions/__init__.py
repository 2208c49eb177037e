"""Decompositions: how one layer becomes a chain, one method per file."""

from rankopt.decompositions.base import Basis, Decomposition, RankAxis
from rankopt.decompositions.spatial_svd import SpatialSVD
from rankopt.decompositions.svd import SVD
from rankopt.decompositions.tucker2 import Tucker2

__all__ = ["SVD", "Basis", "Decomposition", "RankAxis", "SpatialSVD", "Tucker2"]
