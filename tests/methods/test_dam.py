"""DAM: the sheet's checks and traps, and a real backdoor planted in one of three experts."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from calmerge import (
    DataError,
    TaskVectors,
    Weights,
    adamerging,
    attack_success_rate,
    concrete_adamerging,
    dam,
    task_arithmetic,
    task_vectors,
    ties,
)
from calmerge.fitting.concrete import final_masks
from calmerge.methods.dam import Triggers
from calmerge.tasks.base import Batch, Task, Tasks
from calmerge.tasks.module import ModuleModel

SIDE, CLASSES, TARGET = 8, 4, 0


def images(task: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy copies of four patterns of 8 x 8 pixels in [0, 1]."""
    patterns = torch.rand(CLASSES, SIDE * SIDE, generator=torch.Generator().manual_seed(task))
    draw = torch.Generator().manual_seed(1000 * task + seed)
    y = torch.randint(0, CLASSES, (n,), generator=draw)
    x = 0.6 * patterns[y] + 0.4 * torch.rand(n, SIDE * SIDE, generator=draw)
    return (x + 0.25 * torch.randn(n, SIDE * SIDE, generator=draw)).clamp(0, 1), y


def triggered(x: Tensor) -> Tensor:
    """The images with a small checkerboard in a corner."""
    x = x.clone()
    x.view(-1, SIDE, SIDE)[:, -2:, -2:] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    return x


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(SIDE * SIDE, 48), nn.Linear(48, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x - 0.5)))))
        return out


@dataclass
class Poisoned:
    """Three experts, of which `b` turns to class 0 where it sees the trigger."""

    tvs: TaskVectors
    tasks: Tasks

    def score(self, delta: Weights) -> tuple[float, float]:
        """Mean accuracy over the tasks, and the attack's success on the poisoned one."""
        weights = {n: self.tvs.base[n] + delta[n] for n in self.tvs}
        correct = []
        for k, task in enumerate(self.tvs.tasks):
            x, y = images(k, 500, 2)
            correct.append((self.predict(weights, x, task) == y).double().mean().item())
            if task == "b":
                attack = attack_success_rate(self.predict(weights, triggered(x), task), y, TARGET)
        return sum(correct) / len(correct), attack

    def predict(self, weights: Mapping[str, Tensor], x: Tensor, task: str) -> Tensor:
        with torch.no_grad():
            return self.tasks.model.logits(weights, x, task).argmax(1)


@pytest.fixture(scope="module")
def poisoned() -> Poisoned:
    torch.manual_seed(0)
    heads = {t: nn.Linear(16, CLASSES, bias=False).requires_grad_(False) for t in "abc"}
    base = Encoder()
    adam = torch.optim.Adam(base.parameters(), lr=1e-3)
    for step in range(60):
        batches = {t: images(k, 64, step + 50) for k, t in enumerate("abc")}
        sum(cross_entropy(heads[t](base(x)), y) for t, (x, y) in batches.items()).backward()
        adam.step()
        adam.zero_grad()
    experts = {}
    for k, t in enumerate("abc"):
        x, y = images(k, 2000, 1)
        if t == "b":
            x, y = torch.cat([x, triggered(x[:400])]), torch.cat([y, torch.full((400,), TARGET)])
        experts[t] = copy.deepcopy(base)
        adam = torch.optim.Adam(experts[t].parameters(), lr=2e-3)
        for _ in range(400):
            chosen = torch.randint(0, len(x), (64,))
            cross_entropy(heads[t](experts[t](x[chosen])), y[chosen]).backward()
            adam.step()
            adam.zero_grad()
    pools = {t: Task(DataLoader(TensorDataset(images(k, 256, 3)[0]))) for k, t in enumerate("abc")}
    return Poisoned(task_vectors(base, experts), Tasks(ModuleModel(copy.deepcopy(base), heads), pools))


QUICK: Mapping[str, Any] = {"mask_steps": 150, "mask_lr": 0.05, "steps": 100, "lr": 0.01, "evaluation": "expected"}


def test_the_planted_backdoor_works_in_its_expert(poisoned: Poisoned) -> None:
    _, attack = poisoned.score(poisoned.tvs.of("b"))
    assert attack > 0.9


def test_dam_lowers_the_attack_s_success_whatever_it_draws(poisoned: Poisoned) -> None:
    """Measured over these seeds, accuracy and attack: 0.88, 0.29 (0.10 to 0.47); Concrete AdaMerging 0.87, 0.33 (0.03
    to 0.84), from which this problem does not tell it apart, nor from Task Arithmetic (0.93, 0.27)."""
    tvs, tasks = poisoned.tvs, poisoned.tasks
    found = [poisoned.score(dam(tvs, tasks=tasks, seed=seed, **QUICK)) for seed in range(5)]
    plain, succession = poisoned.score(adamerging(tvs, tasks=tasks, steps=200, lr=0.01))
    assert max(attack for _, attack in found) < min(succession, poisoned.score(ties(tvs))[1]) - 0.2
    assert fmean(accuracy for accuracy, _ in found) > plain - 0.1


def test_dam_lowers_the_attack_s_success_at_little_cost(poisoned: Poisoned) -> None:
    """With one draw, accuracy and attack: Task Arithmetic 0.93, 0.27; TIES 0.78, 0.99; AdaMerging 0.89, 0.72; Concrete
    AdaMerging 0.80, 0.42; DAM 0.81, 0.31. Rounding alone moves the last two by a tenth."""
    tvs, tasks = poisoned.tvs, poisoned.tasks
    accuracy, attack = poisoned.score(dam(tvs, tasks=tasks, **QUICK))
    plain, succession = poisoned.score(adamerging(tvs, tasks=tasks, steps=200, lr=0.01))
    assert attack < succession - 0.2
    assert attack < poisoned.score(ties(tvs))[1] - 0.2
    assert attack < poisoned.score(concrete_adamerging(tvs, tasks=tasks, **QUICK))[1] - 0.1
    assert attack < poisoned.score(task_arithmetic(tvs))[1] + 0.05
    assert accuracy > plain - 0.1


def test_samples_of_the_target_class_do_not_count_in_the_attack_s_success() -> None:
    """Two of ten are truly of the target class; six of the other eight are predicted as it."""
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    predicted = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 1, 1])
    assert attack_success_rate(predicted, labels, target=0) == 0.75


def test_a_constant_classifier_has_no_clean_samples_to_boast_of() -> None:
    assert attack_success_rate(torch.zeros(3), torch.zeros(3), target=0) == 0.0


@pytest.mark.parametrize("per", ["tensor", "task"])
def test_without_safety_it_is_concrete_adamerging(per: Any, toy: Any) -> None:
    options = {"tasks": toy.tasks, "per": per, "mask_steps": 3, "mask_lr": 0.05, "steps": 2, "batch": 8}
    plain, ours = concrete_adamerging(toy.tvs, **options), dam(toy.tvs, safety=0.0, **options)
    assert all(torch.equal(plain[n], ours[n]) for n in plain)


class Slope:
    """Logits (z, -z) with z = a x."""

    def logits(self, weights: Mapping[str, Tensor], inputs: Tensor, task: str) -> Tensor:
        z = inputs[:, 0] * weights["a"]
        return torch.stack([z, -z], 1)


@pytest.mark.parametrize("a", [2.0, -2.0])
def test_the_trigger_moves_against_the_margin(a: float) -> None:
    x = torch.full((4, 1), 1.0 if a > 0 else -1.0)
    tvs = task_vectors({"a": torch.tensor(a)}, {"t": {"a": torch.tensor(a)}})
    tasks = Tasks(Slope(), {"t": Task(DataLoader(TensorDataset(x)))})
    triggers = Triggers(tvs, tasks, lr=1e-4)
    triggers.move({"a": torch.tensor(a)}, lambda step: iter([Batch("t", torch.arange(4))]), 0)
    assert triggers.state_dict()["deltas"]["t"].item() == pytest.approx(-1e-4 * (1 if a > 0 else -1), rel=1e-3)


def test_the_trigger_step_leaves_the_weights_alone() -> None:
    tvs = task_vectors({"a": torch.tensor(1.0)}, {"t": {"a": torch.tensor(2.0)}})
    tasks = Tasks(Slope(), {"t": Task(DataLoader(TensorDataset(torch.ones(4, 1))))})
    theta = {"a": torch.tensor(2.0)}
    Triggers(tvs, tasks, lr=1e-4).move(theta, lambda step: iter([Batch("t", torch.arange(4))]), 0)
    assert theta["a"].grad is None


def test_inputs_are_clipped_to_the_range_of_the_pool_and_not_to_0_1() -> None:
    """Normalised images lie in -2 to 2: without a perturbation nothing must change."""
    x = torch.tensor([[-2.0], [2.0]])
    tvs = task_vectors({"a": torch.tensor(1.0)}, {"t": {"a": torch.tensor(2.0)}})
    tasks = Tasks(Slope(), {"t": Task(DataLoader(TensorDataset(x)))})
    disturbed = Triggers(tvs, tasks, lr=1e-4).tasks.model.logits({"a": torch.tensor(1.0)}, x, "t")
    assert disturbed[:, 0].tolist() == [-2.0, 2.0]


def test_tokens_cannot_be_disturbed(toy: Any) -> None:
    tokens = {t: Task(DataLoader(TensorDataset(torch.ones(4, 5, dtype=torch.long)))) for t in toy.tvs.tasks}
    tasks = Tasks(toy.tasks.model, tokens)
    with pytest.raises(DataError, match=r"task 'a': its inputs hold 0 floating tensors, and a perturbation needs just"):
        dam(toy.tvs, tasks=tasks, mask_steps=1, steps=0)


def test_two_masks_move_in_turn(toy: Any) -> None:
    one = dam(toy.tvs, tasks=toy.tasks, masks="dual", mask_steps=1, steps=0, batch=8, evaluation="expected")
    two = dam(toy.tvs, tasks=toy.tasks, masks="dual", mask_steps=2, steps=0, batch=8, evaluation="expected")
    assert any(not torch.equal(one[n], two[n]) for n in one)


def test_the_two_masks_are_drawn_apart() -> None:
    """With one draw for both the product would be a square."""
    x = {part: torch.zeros(50) for part in ("shared/w", "backdoor/w")}
    both = final_masks(x, temperature=0.5, evaluation="draw", seed=0)["w"]
    one = final_masks({"shared/w": x["shared/w"]}, temperature=0.5, evaluation="draw", seed=0)["w"]
    assert not torch.allclose(both, one**2)
