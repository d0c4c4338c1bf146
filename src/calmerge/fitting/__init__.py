"""Learning from unlabelled data: which examples (`samplers`), what is good (`objectives`), what may move
(`parametrise`), and one loop (`fit`)."""

from calmerge.fitting.fit import Fitted, Params, Watch, fit
from calmerge.fitting.objectives import entropy, expert_kl, feature_distance, pseudo_label
from calmerge.fitting.parametrise import Parametrisation
from calmerge.fitting.samplers import Credible, Pool, credible, shuffled

__all__ = [
    "Credible",
    "Fitted",
    "Parametrisation",
    "Params",
    "Pool",
    "Watch",
    "credible",
    "entropy",
    "expert_kl",
    "feature_distance",
    "fit",
    "pseudo_label",
    "shuffled",
]
