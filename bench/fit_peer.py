"""AdaMerging with all experts in memory: written the plain way, or by FusionBench. Part of `fit.py`; needs no calmerge.

peer/bin/python bench/fit_peer.py FOLDER EXPERTS WIDTH LAYERS TOKENS BATCH UPDATES THREADS
"""

import copy
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call

CLASSES = 8


class Encoder(nn.Module):
    """A transformer over random token embeddings: [n, tokens, width] to the mean of its states."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, width // 32, 4 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x).mean(1)
        return out


def inputs_of(task: int, n: int, tokens: int, width: int) -> Tensor:
    return torch.randn(n, tokens, width, generator=torch.Generator().manual_seed(task))


def run_plain(
    folder: Path, experts: int, width: int, layers: int, tokens: int, batch: int, updates: int
) -> list[float]:
    """Seconds of each update; theta_0 + sum_t lambda tau_t as one autograd graph."""
    base = load_file(folder / "base" / "model.safetensors")
    taus = [
        {n: w - base[n] for n, w in load_file(folder / f"t{t}" / "model.safetensors").items()} for t in range(experts)
    ]
    encoder = Encoder(width, layers).eval()
    names = list(base)
    lam = torch.full((experts, len(names)), 0.3, requires_grad=True)

    def model() -> Callable[[Tensor], Tensor]:
        clamped = lam.clamp(0, 1)
        theta = {}
        for i, name in enumerate(names):
            theta[name] = base[name]
            for t in range(experts):
                theta[name] = theta[name] + clamped[t, i] * taus[t][name]
        return lambda x: functional_call(encoder, theta, x)

    return timed(model, [lam], experts, width, tokens, batch, updates)


def run_fusion_bench(
    folder: Path, experts: int, width: int, layers: int, tokens: int, batch: int, updates: int
) -> list[float]:
    """Seconds of each update of FusionBench's layer-wise merged model."""
    from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel, get_layer_wise_weights

    base = Encoder(width, layers).eval()
    base.load_state_dict(load_file(folder / "base" / "model.safetensors"))
    tuned = []
    for t in range(experts):
        tuned.append(copy.deepcopy(base))
        tuned[-1].load_state_dict(load_file(folder / f"t{t}" / "model.safetensors"))
    merged = LayerWiseMergedModel(
        layer_wise_weight=get_layer_wise_weights(experts, len(list(base.parameters())), 0.3),
        pretrained_model=base,
        finetuned_models=tuned,
        clamp_weights=True,
    )

    def model() -> Callable[[Tensor], Tensor]:
        merged.merge_weights()
        return merged

    return timed(model, [merged.merge_weight], experts, width, tokens, batch, updates)


def timed(
    model: Callable[[], Callable[[Tensor], Tensor]],
    params: list[Tensor],
    experts: int,
    width: int,
    tokens: int,
    batch: int,
    updates: int,
) -> list[float]:
    heads = [nn.Linear(width, CLASSES).requires_grad_(False) for _ in range(experts)]
    data = [inputs_of(t, batch, tokens, width) for t in range(experts)]
    adam = torch.optim.Adam(params, lr=1e-3)
    seconds = []
    for _ in range(updates):
        started = time.perf_counter()
        encoder = model()
        loss = torch.zeros(())
        for head, x in zip(heads, data, strict=True):
            log_p = head(encoder(x)).log_softmax(1)
            loss = loss - (log_p.exp() * log_p).sum(1).mean()
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
        seconds.append(time.perf_counter() - started)
    return seconds


def private() -> int:
    """Private memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def main() -> None:
    folder, (experts, width, layers, tokens, batch, updates, threads) = Path(sys.argv[1]), map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    import fusion_bench.models.wrappers.layer_wise_fusion  # noqa: F401 (its memory is not the algorithm's)

    start = peak = private()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, private())

    threading.Thread(target=watch, daemon=True).start()
    seconds = run_fusion_bench(folder, experts, width, layers, tokens, batch, updates)
    done.set()
    print(json.dumps({"seconds": statistics.median(seconds), "peak": peak - start}))


if __name__ == "__main__":
    main()
