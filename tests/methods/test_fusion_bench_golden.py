"""Against FusionBench 0.2.33: inputs and outputs stored as plain data (tests/golden/fusion_bench)."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from calmerge import (
    Run,
    TaskVectors,
    adamerging,
    add,
    average,
    dare,
    dare_ties,
    emr,
    magmax,
    slerp,
    tall_masks,
    task_arithmetic,
    task_vectors,
    ties,
    weighted_average,
)
from calmerge.methods.ties import ties_split
from calmerge.tasks.base import Batch, Task, Tasks
from calmerge.tasks.module import ModuleModel

FOLDER = Path(__file__).parents[1] / "golden" / "fusion_bench"
Golden = Callable[[str], tuple[dict[str, Any], dict[str, Tensor]]]


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def inputs(case: str, described: dict[str, Any], n: int) -> tuple[TaskVectors, dict[str, Tensor]]:
    tensors = load_file((FOLDER / case / described["inputs"]).resolve())
    return task_vectors(
        part(tensors, "base/"), {str(t): part(tensors, f"expert_{t}/") for t in range(1, n + 1)}
    ), tensors


def close(ours: Tensor, stored: Tensor, described: dict[str, Any]) -> None:
    torch.testing.assert_close(ours.float(), stored.float(), **described["tolerance"])


@pytest.mark.parametrize(
    ("case", "method"),
    [
        ("simple_average_T2", average),
        ("simple_average_T3", average),
        ("simple_average_T5", average),
        ("task_arithmetic_T2", partial(task_arithmetic, scale=0.3)),
        ("task_arithmetic_T3", partial(task_arithmetic, scale=0.3)),
        ("task_arithmetic_T5", partial(task_arithmetic, scale=0.3)),
        ("expo_T3", partial(task_arithmetic, scale=1.3 / 3)),  # the mean, moved on by 0.3 of its way from the base
        ("weighted_average_raw_T2", partial(weighted_average, weights={"1": 0.9, "2": -0.2}, normalise=False)),
        ("weighted_average_normalized_T3", partial(weighted_average, weights={"1": 0.6, "2": 0.3, "3": 0.45})),
        ("magmax_T2", partial(magmax, scale=0.5)),
        ("magmax_T3", partial(magmax, scale=0.5)),
        ("ties_mean_K20_T3", partial(ties, keep=0.2, scale=1.0)),
        ("ties_mean_K0p1_T5", partial(ties, keep=0.1, scale=1.0)),
        ("ties_sum_K20_T2", partial(ties, keep=0.2, scale=0.3, combine="sum")),
        ("ties_sum_K20_T3", partial(ties, keep=0.2, scale=0.3, combine="sum")),
        ("ties_sum_K20_T5", partial(ties, keep=0.2, scale=0.3, combine="sum")),
        ("ties_max_K30_T3", partial(ties, keep=0.3, scale=0.3, combine="max")),
        ("dare_task_arithmetic_ratio0_T3", partial(dare, rate=0.0, inner=partial(task_arithmetic, scale=0.3))),
        ("dare_ties_ratio0_T3", partial(dare_ties, rate=0.0, keep=0.2, scale=0.5, combine="sum")),
        ("dare_ties_ratio0_T3", partial(dare, rate=0.0, inner=partial(ties, keep=0.2, scale=0.5, combine="sum"))),
    ],
)
def test_merges_as_the_reference(case: str, method: Callable[..., Any], golden: Golden) -> None:
    described, stored = golden(case)
    tvs, _ = inputs(case, described, described["T"])
    merged = add(tvs.base, method(tvs))
    assert set(merged) == set(stored)
    for name, tensor in stored.items():
        close(merged[name], tensor, described)
    assert torch.equal(merged["vision_model.embeddings.position_ids"], tvs.base["vision_model.embeddings.position_ids"])


def test_a_buffer_that_is_counted_is_a_larger_share_and_nothing_else(golden: Golden) -> None:
    """There an integer buffer of 5 takes part in the count, with differences of 0; here only what is merged does."""
    described, stored = golden("ties_buffer_counted_T3")
    tvs, _ = inputs("ties_buffer_counted_T3", described, 3)
    counted = tvs.numel + 5
    merged = add(tvs.base, ties(tvs, keep=(int(counted * 0.2) + 0.5) / tvs.numel))
    for name, tensor in stored.items():
        close(merged[name], tensor, described)


@pytest.mark.parametrize(("case", "of"), [("slerp_T2", "weights"), ("slerp_task_vectors_T2", "deltas")])
def test_interpolates_as_the_reference(case: str, of: Any, golden: Golden) -> None:
    described, stored = golden(case)
    tvs, _ = inputs(case, described, 2)
    merged = add(tvs.base, slerp(tvs, t=described["hyper_parameters"]["t"], of=of))
    assert set(tvs) == set(stored)
    for name, tensor in stored.items():
        close(merged[name], tensor, described)


def test_splits_as_the_reference(golden: Golden) -> None:
    described, stored = golden("ties_split_T3")
    tvs, _ = inputs("ties_split_T3", described, 3)
    split = ties_split(tvs, keep=0.2)
    for t in range(3):
        for name, tensor in part(stored, f"selected_{t + 1}/").items():
            close(split[name][t], tensor, described)
    summed = ties(tvs, keep=0.2, combine="sum")
    for name, tensor in part(stored, "merged/").items():
        close(summed[name], tensor, described)


@pytest.mark.parametrize("n", [3, 5])
def test_masks_as_the_reference_s_function(n: int, golden: Golden) -> None:
    """All but entries where both sides of the inequality agree to the last bits."""
    described, stored = golden(f"tall_masks_T{n}")
    tvs, _ = inputs(f"tall_masks_T{n}", described, n)
    for threshold in described["hyper_parameters"]["lambdas"]:
        merged = tall_masks(tvs, threshold=threshold)
        wrong = entries = 0
        for t in range(1, n + 1):
            for name, tensor in part(stored, f"lambda_{threshold}/mask_{t}/").items():
                wrong += int((merged.patches[str(t)].mask[name] != tensor.bool()).sum())
                entries += tensor.numel()
        assert entries == n * tvs.numel
        assert wrong <= described["tolerance"]["max_mismatched_fraction"] * entries


def test_does_not_mask_as_the_reference_s_class(golden: Golden) -> None:
    """It compares the base's weights, not the task vectors, and turns nearly all bits on."""
    described, stored = golden("tall_mask_class_arguments_T3")
    tvs, _ = inputs("tall_mask_class_arguments_T3", described, 3)
    mask = tall_masks(tvs, threshold=0.4).patches["1"].mask
    theirs = part(stored, "mask_1/")
    assert sum(int(m.sum()) for m in theirs.values()) > 0.9 * tvs.numel
    assert sum(int((mask[name] != m.bool()).sum()) for name, m in theirs.items()) > 0.1 * tvs.numel


@pytest.mark.parametrize("n", [3, 5])
def test_unifies_and_rescales_as_the_reference(n: int, golden: Golden) -> None:
    described, stored = golden(f"emr_T{n}")
    tvs, _ = inputs(f"emr_T{n}", described, n)
    merged = emr(tvs)
    for name, tensor in part(stored, "unified/").items():
        close(merged.shared[name], tensor, described)
    for t in range(1, n + 1):
        model = add(tvs.base, merged.for_task(str(t)))
        for name, tensor in part(stored, f"model_{t}/").items():
            close(model[name], tensor, described)


def test_drops_with_the_reference_s_mean_and_spread(golden: Golden) -> None:
    described, stored = golden("dare_statistics_T3")
    tvs, _ = inputs("dare_statistics_T3", described, 3)
    rate, runs = described["hyper_parameters"]["sparsity_ratio"], 192
    for name in {n.rpartition("/")[0] for n in stored}:
        draws = torch.stack(
            [dare(tvs, rate=rate, inner=partial(task_arithmetic, scale=1.0), seed=s)[name] for s in range(runs)]
        )
        error = (stored[f"{name}/std"] ** 2 / described["hyper_parameters"]["runs"] + draws.var(0) / runs).sqrt()
        bound = described["tolerance"]["mean_standard_errors"] * error + 1e-7
        assert ((draws.mean(0) - stored[f"{name}/mean"]).abs() <= bound).all()
        exact = (rate / (1 - rate) * (tvs[name] ** 2).sum(0)).sqrt()
        torch.testing.assert_close(draws.std(0).mean(), exact.mean(), rtol=0.05, atol=0)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(12, 24), nn.LayerNorm(24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(torch.relu(self.norm(self.fc1(x))))
        return out


def adamerging_problem(tensors: dict[str, Tensor]) -> Tasks:
    heads = {}
    for t in "123":
        heads[t] = nn.Linear(16, len(tensors[f"head_{t}"]), bias=False)
        heads[t].weight.data = tensors[f"head_{t}"]
    pools = {t: DataLoader(TensorDataset(tensors[f"batches_{t}"].reshape(-1, 12))) for t in "123"}
    return Tasks(ModuleModel(Encoder(), heads), {t: Task(pool) for t, pool in pools.items()})


@pytest.mark.parametrize("clamped", ["", "_clamped"])
@pytest.mark.parametrize("wise", ["task", "layer"])
def test_adapts_as_the_reference(wise: str, clamped: str, golden: Golden) -> None:
    case = f"adamerging_{wise}_wise{clamped}"
    described, stored = golden(case)
    options = described["hyper_parameters"]
    tvs, tensors = inputs(case, described, 3)

    def recorded(step: int) -> Iterator[Batch]:
        for t in "123":
            yield Batch(t, torch.arange(step * 16, (step + 1) * 16))

    for steps in range(1, options["steps"] + 1):
        run = Run()
        delta = adamerging(
            tvs, tasks=adamerging_problem(tensors), per="tensor" if wise == "layer" else "task", init=options["init"],
            clamp=options["clamp"], lr=options["lr"], steps=steps, order=recorded, run=run,
        )  # fmt: skip
        trace = run.trace["adamerging"]
        ours = torch.tensor(trace.coefficients.values)  # [tensors, T]
        expected = stored[f"coefficients_{steps}"]
        if wise == "layer":
            rows = ["fc1.weight", "fc1.bias", "norm.weight", "norm.bias", "fc2.weight", "fc2.bias"]
            ours, expected = ours[[trace.coefficients.tensors.index(r) for r in rows]], expected.T
        close(ours, expected.reshape(ours.shape), described)
        assert trace.loss[-1] == pytest.approx(stored[f"loss_{steps}"].item(), rel=1e-3, abs=2e-5)
    merged = add(tvs.base, delta)
    for name, tensor in part(stored, "merged/").items():
        close(merged[name], tensor, described)
