"""CALM against an independent float64 computation from the written method (tests/golden/calm)."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from calmerge import Run, add, task_vectors
from calmerge.fitting.samplers import credible, entropies
from calmerge.methods.calm import calm
from calmerge.tasks.base import Batch, Batches, Task, Tasks
from calmerge.tasks.module import ModuleModel

GOLDEN = Path(__file__).parents[1] / "golden" / "calm"
TOLERANCE = {"merged": 5e-7, "loss": 3e-5}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(12, 24), nn.LayerNorm(24), nn.Linear(24, 16)
        self.text_projection = nn.Parameter(torch.zeros(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(torch.relu(self.norm(self.fc1(x))))
        return out


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return load_file(GOLDEN / "inputs.safetensors")


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def problem(inputs: dict[str, Tensor]) -> Tasks:
    heads = {}
    for t in "1234":
        heads[t] = nn.Linear(16, len(inputs[f"head_{t}"]), bias=False)
        heads[t].weight.data = inputs[f"head_{t}"]
    pools = {t: DataLoader(TensorDataset(inputs[f"inputs_{t}"])) for t in "1234"}
    return Tasks(ModuleModel(Encoder(), heads), {t: Task(pool) for t, pool in pools.items()})


def recorded(inputs: dict[str, Tensor], stage: int, seen: list[str]) -> Batches:
    def of(step: int) -> Iterator[Batch]:
        for t in seen:
            for row in inputs[f"order/stage_{stage}/task_{t}"][step].long():
                chosen = inputs[f"pool_{t}"][row[row >= 0]]
                if len(chosen):
                    yield Batch(t, chosen, inputs[f"pseudo_label_{t}"][chosen])

    return of


@pytest.mark.parametrize("case", ["binarise", "l1", "pair_first_binarise", "reversed_roles_l1"])
def test_reproduces_the_reference(case: str, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    options = json.loads((GOLDEN / case / "case.json").read_text())["hyper_parameters"]
    expected = load_file(GOLDEN / case / "output.safetensors")
    groups = [[str(t) for t in group] for group in options["groups"]]
    named = [t for group in groups for t in group]
    first = 1 if len(groups[0]) == 2 else len(groups[0])
    tvs = task_vectors(part(inputs, "base/"), {t: part(inputs, f"expert_{t}/") for t in named})
    run = Run()
    delta = calm(
        tvs,
        tasks=problem(inputs),
        groups=groups,
        lr=options["learning_rate"],
        alpha=options["alpha"],
        regulariser=options["regulariser"],
        top=options["top_fraction"],
        steps=options["updates"],
        frozen=options["frozen"],
        ratio=options["pool_ratio"],
        order=lambda stage: recorded(inputs, stage, named[: first + stage + 1]),
        masks=tmp_path,
        run=run,
    )
    merged = add(tvs.base, delta)
    for name, tensor in part(expected, "merged/").items():
        torch.testing.assert_close(merged[name], tensor.float(), rtol=0, atol=TOLERANCE["merged"])
    for j, stage in enumerate(run.trace["calm"].stages):
        loss = torch.tensor([stage.loss[t] for t in stage.seen]).sum(0)
        torch.testing.assert_close(loss.double(), expected[f"stage_{j}/loss"].double(), rtol=0, atol=TOLERANCE["loss"])
        taken = sum(int(m.sum()) for m in part(expected, f"stage_{j}/mask/").values())
        assert round(stage.taken * stage.entries) == taken


@pytest.mark.parametrize("task", ["1", "2", "3", "4"])
def test_credible_samples_are_the_reference_s(task: str, inputs: dict[str, Tensor]) -> None:
    logits = inputs[f"expert_logits_{task}"]
    torch.testing.assert_close(entropies(logits), inputs[f"entropy_{task}"], rtol=0, atol=1e-9)
    balanced = credible(logits, ratio=0.9)
    assert balanced.indices.tolist() == sorted(inputs[f"pool_{task}"].tolist())
    assert balanced.labels.tolist() == inputs[f"pseudo_label_{task}"][balanced.indices].tolist()
    assert credible(logits, ratio=0.9, sampling="plain").indices.tolist() == sorted(
        inputs[f"pool_plain_{task}"].tolist()
    )
