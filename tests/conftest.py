"""A toy problem for methods that learn, golden data, and checkpoints on disk cut in any way."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from calmerge import TaskVectors, task_vectors
from calmerge._random import uniform
from calmerge.tasks.base import Task, Tasks
from calmerge.tasks.module import ModuleModel

CLASSES = {"a": 2, "b": 3, "c": 2, "d": 4}


class Net(nn.Module):
    """A matrix, a norm, a bias, a number without dimensions, a buffer of indices, and a tensor no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 6, bias=False)
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.unused = nn.Parameter(torch.zeros(3))
        self.register_buffer("order", torch.tensor([4, 3, 2, 1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(torch.relu(self.norm(self.fc1(x[:, self.order]))))
        return out * self.gain


@dataclass
class Toy:
    """A base, four experts that differ from it by noise on a grid of 1/64, and their tasks."""

    base: dict[str, Tensor]
    experts: dict[str, dict[str, Tensor]]
    heads: dict[str, nn.Linear]
    module: nn.Module
    tasks: Tasks

    @property
    def tvs(self) -> TaskVectors:
        return task_vectors(self.base, self.experts)


def on_grid(shape: tuple[int, ...], size: float, *key: object) -> Tensor:
    """Multiples of 1/64 in [-size, size): sums of a few are exact in float32 and, for small ones, in bfloat16."""
    return ((2 * uniform(shape, *key) - 1) * size * 64).floor() / 64


@pytest.fixture
def toy() -> Toy:
    module = Net()
    base = {
        name: t.clone() if not t.is_floating_point() else on_grid(tuple(t.shape), 1.0, "base", name)
        for name, t in module.state_dict().items()
    }
    experts = {
        task: {
            name: t.clone() if not t.is_floating_point() else t + on_grid(tuple(t.shape), 0.5, task, name)
            for name, t in base.items()
        }
        for task in CLASSES
    }
    module.load_state_dict(base)
    heads, tasks = {}, {}
    for task, classes in CLASSES.items():
        heads[task] = nn.Linear(6, classes, bias=False)
        heads[task].weight.data = on_grid((classes, 6), 2.0, "head", task)
        x = {split: 4 * uniform((n, 5), task, split) - 2 for split, n in {"pool": 30, "test": 12}.items()}
        labels = (uniform((12,), task, "label") * classes).long()
        tasks[task] = Task(DataLoader(TensorDataset(x["pool"])), DataLoader(TensorDataset(x["test"], labels)))
    return Toy(base, experts, heads, module, Tasks(ModuleModel(module, heads), tasks))


@pytest.fixture
def save_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of a fit is saved after every update, not every so many seconds."""
    monkeypatch.setattr(import_module("calmerge.fitting.fit"), "SAVE_EVERY", -1.0)


@pytest.fixture
def write_folder() -> Callable[..., Path]:
    """Writes tensors as a checkpoint folder of one file, or of several shards with an index."""

    def write(folder: Path, tensors: Mapping[str, Tensor], shards: int = 1) -> Path:
        folder.mkdir(parents=True)
        tensors = {name: t.contiguous() for name, t in tensors.items()}
        if shards == 1:
            save_file(tensors, folder / "model.safetensors")
            return folder
        files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
        for file in set(files.values()):
            save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
        return folder

    return write


@pytest.fixture(scope="session")
def golden() -> Callable[[str], tuple[dict, dict[str, Tensor]]]:
    """One FusionBench case: what `case.json` says, and the stored output."""

    def read(case: str) -> tuple[dict, dict[str, Tensor]]:
        folder = Path(__file__).parent / "golden" / "fusion_bench" / case
        return json.loads((folder / "case.json").read_text()), load_file(folder / "output.safetensors")

    return read
