"""Single steps from which methods are composed: each takes task vectors, or what came out of another piece."""

from calmerge.pieces.blend import blend
from calmerge.pieces.drop import drop_and_rescale
from calmerge.pieces.elect import disjoint, elect
from calmerge.pieces.mask import pack, top_fraction, unpack
from calmerge.pieces.matrices import reduce_matrices, transform_matrices
from calmerge.pieces.spectral import polar, svd
from calmerge.pieces.trim import trim

__all__ = [
    "blend",
    "disjoint",
    "drop_and_rescale",
    "elect",
    "pack",
    "polar",
    "reduce_matrices",
    "svd",
    "top_fraction",
    "transform_matrices",
    "trim",
    "unpack",
]
