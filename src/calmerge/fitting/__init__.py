"""Fitting: one loop, objectives, and samplers in front; a data-driven method is a point in these axes."""

from calmerge.fitting.fit import Fitted, fit
from calmerge.fitting.objectives import entropy, pseudo_label
from calmerge.fitting.samplers import Credible, credible, shuffled

__all__ = ["Credible", "Fitted", "credible", "entropy", "fit", "pseudo_label", "shuffled"]
