"""Single steps from which methods are composed: each takes task vectors, or what came out of another piece."""

from calmerge.pieces.blend import blend
from calmerge.pieces.drop import drop_and_rescale
from calmerge.pieces.elect import disjoint, elect
from calmerge.pieces.mask import pack, top_fraction, unpack
from calmerge.pieces.trim import trim

__all__ = ["blend", "disjoint", "drop_and_rescale", "elect", "pack", "top_fraction", "trim", "unpack"]
