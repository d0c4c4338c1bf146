"""FW-Merging: the sheet's checks and traps, and FusionBench's selection."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from calmerge import (
    Run,
    StateDict,
    TaskVectors,
    UsageError,
    frank_wolfe,
    frank_wolfe_soft,
    task_arithmetic,
    task_vectors,
    ties,
)
from calmerge._memory import private_memory
from calmerge._random import uniform
from calmerge._task_vectors import materialise
from calmerge.methods.frank_wolfe import _in_turn, _scores, _vertices
from calmerge.tasks.base import Batch, Task, Tasks

GOLDEN = Path(__file__).parents[1] / "golden" / "fusion_bench" / "frank_wolfe_selection"


class Linear:
    """Logits (w . x, 0): for one input x and label 0 the gradient is -x / 2 at w . x = 0."""

    def logits(self, weights: Mapping[str, Tensor], inputs: Tensor, task: str) -> Tensor:
        z = inputs @ weights["w"]
        return torch.stack([z, torch.zeros_like(z)], 1)


def towards(x: list[float], base: list[float] | None = None, **experts: list[float]) -> tuple[TaskVectors, Tasks, Any]:
    """A problem whose only example pulls w towards `x`."""
    tvs = task_vectors({"w": torch.tensor(base or [0.0, 0.0])}, {n: {"w": torch.tensor(w)} for n, w in experts.items()})
    tasks = Tasks(Linear(), {n: Task(DataLoader(TensorDataset(torch.tensor([x])))) for n in experts})
    order = lambda step: iter([Batch(next(iter(experts)), torch.tensor([0]), torch.tensor([0]))])  # noqa: E731
    return tvs, tasks, order


def test_the_step_is_measured_from_the_present_model_and_not_from_the_base() -> None:
    """Gradient direction (-1, 2): cosines -0.447, 0.894 and, of the start (0.3, 0.3), 0.316."""
    tvs, tasks, order = towards([1.0, -2.0], one=[1.0, 0.0], two=[0.0, 1.0])
    delta = frank_wolfe(tvs, tasks=tasks, steps=1, on=["one"], order=order)
    torch.testing.assert_close(delta["w"], torch.tensor([0.321, 0.291]))


def test_cosines_of_the_worked_example() -> None:
    tvs, _, _ = towards([1.0, 0.0], one=[1.0, 0.0], two=[0.0, 1.0])
    start = materialise(task_arithmetic(tvs))
    theta = {"w": start["w"].clone().requires_grad_()}
    theta["w"].grad = torch.tensor([-1.0, 2.0])
    found = _scores(theta, tvs, start, start, centred=False)["w"]
    torch.testing.assert_close(found, torch.tensor([-0.4472, 0.8944, 0.3162], dtype=torch.float64), atol=1e-4, rtol=0)


def test_the_step_size_falls_as_two_over_i_plus_two() -> None:
    """0.1, 0.0667, 0.05 times 0.3 of the way to the same vertex, from the start (0.3, 0.3)."""
    tvs, tasks, order = towards([1.0, -2.0], one=[1.0, 0.0], two=[0.0, 1.0])
    left = torch.tensor([0.3, 0.3]) - torch.tensor([1.0, 0.0])
    for steps, gammas in {1: [0.1], 2: [0.1, 2 / 30], 3: [0.1, 2 / 30, 0.05]}.items():
        delta = frank_wolfe(tvs, tasks=tasks, steps=steps, on=["one"], order=order)
        share = torch.tensor([1 - 0.3 * g for g in gammas]).prod()
        torch.testing.assert_close(delta["w"], torch.tensor([1.0, 0.0]) + share * left)


def test_the_start_is_a_candidate_too() -> None:
    """Where every expert points uphill the model stays at its start, here a third of the one good direction."""
    tvs, tasks, order = towards([1.0, 0.0], one=[-1.0, 0.0], two=[0.0, 1.0])
    start = StateDict({"w": torch.tensor([0.5, 0.0])})
    delta = frank_wolfe(tvs, tasks=tasks, steps=3, on=["one"], order=order, start=lambda _: start)
    torch.testing.assert_close(delta["w"], torch.tensor([0.5, 0.0]))


def test_a_zero_norm_gives_cosine_zero_and_not_nan() -> None:
    theta = {"w": torch.zeros(2).requires_grad_()}
    theta["w"].grad = torch.tensor([1.0, 0.0])
    tvs = task_vectors({"w": torch.zeros(2)}, {"zero": {"w": torch.zeros(2)}, "one": {"w": torch.tensor([1.0, 0.0])}})
    assert _scores(theta, tvs, None, StateDict({"w": torch.zeros(2)}), centred=False)["w"].tolist() == [0.0, 1.0]


def test_a_tensor_without_gradient_does_not_decide() -> None:
    theta = {"w": torch.ones(2).requires_grad_()}
    tvs = task_vectors({"w": torch.zeros(2)}, {"one": {"w": torch.ones(2)}})
    assert _scores(theta, tvs, None, StateDict({"w": torch.zeros(2)}), centred=False)["w"].tolist() == [0.0]


def test_centred_cosines_do_not_see_the_common_base() -> None:
    """Over a base of 100 both full tensors point the same way; the directions from the model are opposite."""
    tvs, tasks, order = towards([1.0, -1.0], base=[100.0, 100.0], up=[101.0, 99.0], down=[99.0, 101.0])
    origin = StateDict({"w": torch.zeros(2)})
    options = {"tasks": tasks, "steps": 1, "on": ["up"], "order": order, "start": lambda _: origin}
    moved = frank_wolfe(tvs, **options, centred=True)["w"]
    torch.testing.assert_close(moved, torch.tensor([0.03, -0.03]))


def test_layer_wise_vertices_mix_experts() -> None:
    scores = {"a": torch.tensor([0.1, -0.5]), "b": torch.tensor([-0.2, 0.3])}
    assert _in_turn([scores], "tensor") == {"a": [1], "b": [0]}
    assert _in_turn([scores], "task") == {"a": [1], "b": [1]}


def test_a_checkpoint_is_picked_once_in_an_iteration() -> None:
    scores = {"a": torch.tensor([0.1, -0.5, 0.0])}
    assert _in_turn([scores, scores, scores, scores], "tensor") == {"a": [1, 2, 0]}


def test_a_checkpoint_that_is_never_picked_changes_nothing_from_a_fixed_start() -> None:
    origin = StateDict({"w": torch.tensor([0.1, 0.1])})
    found = []
    for more in ({}, {"far": [-1.0, 5.0]}):
        tvs, tasks, order = towards([1.0, -2.0], one=[1.0, 0.0], two=[0.0, 1.0], **more)
        options = {"steps": 4, "on": ["one"], "order": order, "start": lambda _: origin}
        found.append(frank_wolfe(tvs, tasks=tasks, **options)["w"])
    assert torch.equal(found[0], found[1])


def test_a_step_may_be_any_merge() -> None:
    """TIES of one vector keeps its largest entries, 0.1 of the way."""
    tvs, tasks, order = towards([1.0, -0.5], one=[1.0, 0.25], two=[0.0, 1.0])
    origin = StateDict({"w": torch.zeros(2)})
    options = {"tasks": tasks, "steps": 1, "on": ["one"], "order": order, "start": lambda _: origin}
    moved = frank_wolfe(tvs, **options, inner=partial(ties, keep=0.5))["w"]
    torch.testing.assert_close(moved, torch.tensor([0.1, 0.025]))
    moved = frank_wolfe(tvs, **options, inner=partial(ties, keep=0.01))["w"]
    torch.testing.assert_close(moved, torch.tensor([0.1, 0.0]))


PEAK = """
import sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from calmerge import ModuleModel, Task, Tasks, frank_wolfe, task_vectors
from calmerge._memory import peak_memory, private_memory

names = [f"t{t}" for t in range(int(sys.argv[1]))]
encoder = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(8)))
pool = Task(DataLoader(TensorDataset(torch.randn(4, 512))))
tasks = Tasks(ModuleModel(encoder, dict.fromkeys(names, nn.Linear(512, 4))), dict.fromkeys(names, pool))
tvs = task_vectors("base", {name: name for name in names})
frank_wolfe(tvs, tasks=tasks, steps=1, samples=4, on=["t0"])  # what libraries take at their first call
before = private_memory()
with peak_memory() as peak:
    frank_wolfe(tvs, tasks=tasks, steps=2, samples=4, on=["t0"])
print(peak.bytes - before)
"""


@pytest.mark.skipif(private_memory() is None, reason="the system does not tell private memory")
def test_twenty_experts_take_the_memory_of_two(tmp_path: Path, write_folder: Callable[..., Path]) -> None:
    """Experts on disk, 8 MB each: eighteen more of them would be 151 MB.

    In processes of their own that give back at once what they free, so that only what is held counts.
    """
    for name in ("base", *(f"t{t}" for t in range(20))):
        write_folder(tmp_path / name, {f"{i}.weight": 0.1 * uniform((512, 512), name, i) for i in range(8)})

    def peak(experts: int) -> int:
        command, env = [sys.executable, "-c", PEAK, str(experts)], {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}
        return int(subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout)

    assert peak(20) < peak(2) + 20e6


def test_an_objective_task_that_is_no_expert_is_refused(toy: Any) -> None:
    with pytest.raises(UsageError, match=r"on: no expert 'aa'\. Did you mean 'a'\?"):
        frank_wolfe(toy.tvs, tasks=toy.tasks, on=["aa"])


def test_the_soft_variant_lowers_the_entropy(toy: Any) -> None:
    run = Run()
    frank_wolfe_soft(toy.tvs, tasks=toy.tasks, steps=2, samples=16, updates=30, batch=16, lr=0.05, run=run)
    loss = run.trace["frank_wolfe_soft"].loss
    assert loss[-1] < loss[0]


def test_soft_vectors_are_measured_from_the_present_model() -> None:
    tvs, _, _ = towards([1.0, 0.0], one=[1.0, 0.0], two=[0.0, 1.0])
    now = StateDict({"w": torch.tensor([0.25, 0.25])})
    vectors = _vertices(tvs, None, now, {"w": [1, 0]})
    assert vectors["w"].tolist() == [[-0.25, 0.75], [0.75, -0.25]]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(12, 24), nn.LayerNorm(24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(torch.relu(self.norm(self.fc1(x))))
        return out


def test_selection_and_step_are_those_of_fusion_bench() -> None:
    case = json.loads((GOLDEN / "case.json").read_text())
    given, stored = load_file(GOLDEN / "inputs.safetensors"), load_file(GOLDEN / "output.safetensors")
    part = lambda d, p: {n.removeprefix(p): w for n, w in d.items() if n.startswith(p)}  # noqa: E731
    tvs = task_vectors(part(given, "base/"), {f"task_{t}": part(given, f"expert_{t}/") for t in (1, 2, 3)})
    start = materialise(task_arithmetic(tvs, scale=0.3))
    theta = {n: (tvs.base[n] + start[n]).requires_grad_() for n in tvs}
    for name, gradient in part(stored, "gradient/").items():
        theta[name].grad = gradient.clone()
    scores = _scores(theta, tvs, start, start, centred=False)
    names = [*tvs.tasks, "initial"]
    whole = torch.stack(list(scores.values())).sum(0)
    expected = torch.tensor([case["scores"]["task"][n] for n in names], dtype=torch.float64)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    assert names[_in_turn([scores], "task")["norm.bias"][0]] == case["selected"]["task"]
    layer = _in_turn([scores], "tensor")
    assert {n: names[picked[0]] for n, picked in layer.items()} == case["selected"]["layer"]
    for per in ("task", "layer"):
        picks = _in_turn([scores], "task" if per == "task" else "tensor")
        moved = task_arithmetic(_vertices(tvs, start, start, picks), scale=0.3)
        for name, after in part(stored, f"{per}_after_one_step/").items():
            ours = tvs.base[name] + start[name] + moved[name]
            torch.testing.assert_close(ours, after, **case["tolerance"])


def test_the_golden_gradient_is_that_of_the_mean_cross_entropy() -> None:
    given, stored = load_file(GOLDEN / "inputs.safetensors"), load_file(GOLDEN / "output.safetensors")
    weights = {
        n.removeprefix("merged_start/"): w.requires_grad_() for n, w in stored.items() if n.startswith("merged_start/")
    }
    loss = sum(
        torch.nn.functional.cross_entropy(
            functional_call(Mlp(), weights, given[f"batches_{t}"][0]) @ given[f"head_{t}"].T, given[f"labels_{t}"]
        )
        for t in (1, 2, 3)
    )
    (loss / 3).backward()
    for name, w in weights.items():
        torch.testing.assert_close(w.grad, stored[f"gradient/{name}"], rtol=1e-3, atol=1e-6)
