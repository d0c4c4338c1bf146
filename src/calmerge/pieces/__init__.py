"""Single steps from which methods are composed: each takes task vectors, or what came out of another piece."""

from calmerge.pieces.blend import blend
from calmerge.pieces.drop import drop_and_rescale
from calmerge.pieces.elect import disjoint, elect
from calmerge.pieces.mask import pack, top_fraction, unpack
from calmerge.pieces.spectral import by_matrix, polar, svd
from calmerge.pieces.trim import trim

__all__ = [
    "blend",
    "by_matrix",
    "disjoint",
    "drop_and_rescale",
    "elect",
    "pack",
    "polar",
    "svd",
    "top_fraction",
    "trim",
    "unpack",
]
