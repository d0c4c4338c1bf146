"""Singular gates: which singular components of each task vector take part, learned through straight-through masks."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from calmerge._checkpoint import open_checkpoint
from calmerge._task_vectors import TaskVectors
from calmerge._weights import Site, Weights
from calmerge.fitting.fit import Params
from calmerge.fitting.parametrise import Parametrisation
from calmerge.pieces.matrices import TABLES, is_matrix
from calmerge.pieces.spectral import full_svd


def straight_through(logits: Tensor, *, temperature: float = 10.0) -> Tensor:
    """A mask of 0 and 1 whose gradient is that of p = sigma(logits / temperature): 1[p > 0.5] forward, p backward.

    >>> straight_through(torch.tensor([0.1, -0.1]))
    tensor([1., 0.])
    """
    p = (logits / temperature).sigmoid()
    return (p > 0.5).to(p) + p - p.detach()


def singular_gates(
    start: Weights,
    tvs: TaskVectors,
    folder: Path,
    *,
    keep: float,
    coefficient: float,
    logit: float = 0.1,
    temperature: float = 10.0,
    skip: Sequence[str] = TABLES,
) -> Parametrisation:
    """A start plus each task's vector with gated singular components and one coefficient per task and tensor.

    delta(l) = start(l) + sum_t lambda[t, l] U_t diag(g_t s_t) V_t^T,  tau_t(l) = U_t diag(s_t) V_t^T;  for tensors that
    are no matrices, start(l) + sum_t lambda[t, l] tau_t(l).

    The triples are computed once and lie in a file of `folder` (T (m + n) r numbers a matrix); one matrix's are in
    memory at a time.

    Args:
        start: a delta; 0 for Task Arithmetic, the average for CART.
        tvs: task vectors, measured from the start.
        folder: an existing folder.
        keep: share of the components, the largest, that are open at first.
        coefficient: lambda at first.
        logit: of the open gates at first; the negative for the closed ones.
        temperature: of the gates.
        skip: shell patterns of matrices that are treated like other tensors.
    """
    matrices = [n for n, spec in tvs.specs.items() if is_matrix(n, len(spec.shape), skip) and spec.numel]
    files, ranks = [], {}
    for i, name in enumerate(matrices):
        triples = [full_svd(tau) for tau in tvs.read(name)]
        ranks[name] = len(triples[0].s)
        files.append(folder / f"{i}.safetensors")
        save_file(
            {
                part: torch.stack([getattr(one, part) for one in triples]).float().cpu().contiguous()
                for part in ("u", "s", "v")
            },
            files[-1],
        )
    factors = {name: open_checkpoint(file) for name, file in zip(matrices, files, strict=True)}
    n = len(tvs.tasks)
    opened: dict[str, Tensor] = {}
    for name, r in ranks.items():
        gates = torch.full((n, r), -logit)
        gates[:, : int(keep * r)] = logit
        opened[f"gates/{name}"] = gates
    opened |= {f"coefficients/{name}": torch.full((n,), coefficient) for name in tvs}

    def merged(params: Params) -> Weights:
        def gated(s: Tensor, tau: Tensor, site: Site) -> Tensor:
            lam = params[f"coefficients/{site.name}"]
            if site.name not in factors:
                rest: Tensor = s + torch.tensordot(lam, tau, dims=1)
                return rest
            u, values, v = (factors[site.name].read(part).to(tau.device) for part in ("u", "s", "v"))
            weights = lam[:, None] * straight_through(params[f"gates/{site.name}"], temperature=temperature) * values
            left = (u * weights[:, None, :]).transpose(0, 1).reshape(u.shape[1], -1)  # [m, T r]
            low: Tensor = left @ v.transpose(1, 2).reshape(-1, v.shape[1])
            return s + low

        return _whole(gated, start, tvs)

    return Parametrisation(opened, merged)


def _whole(fn: Callable[..., Tensor], start: Weights, tvs: TaskVectors) -> Weights:
    return start.map(fn, tvs, elementwise=False)
