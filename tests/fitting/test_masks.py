"""One mask between a running merge and a new expert, by given gradients: every number can be computed by hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calmerge import Run, StateDict
from calmerge._random import permutation
from calmerge.fitting.masks import Search, auto_step_size, consensus_mask, flip_threshold, start_logits
from calmerge.report.traces import CalmStage

DEFAULTS = Search(
    lr=1e7, share=0.05, steps=100, batch=128, batches=2, regulariser="binarise", alpha=1.0, top=1e-5, logit=5.0,
    frozen=(), rest="average", seed=0,
)  # fmt: skip


class Forces:
    """Stands for `Tasks`: every batch has a given gradient, whatever the weights; remembers the weights it saw."""

    device = torch.device("cpu")

    def __init__(self, *batches: Mapping[str, Tensor]) -> None:
        self.batches, self.seen = batches, []

    def gradient(self, objective: object, draw: object) -> Any:
        def at(theta: Mapping[str, Tensor], step: int) -> dict[str, float]:
            self.seen.append({n: t.detach().clone() for n, t in theta.items()})
            for batch in self.batches:
                torch.stack([(theta[n] * g).sum() for n, g in batch.items()]).sum().backward()
            return {"k": 0.0}

        return at


class Stage:
    """The outcome of one stage, with the logits after the last update."""

    def __init__(self, folder: Path, u: Any, k: Any, *batches: Any, **options: Any) -> None:
        u, k = ({"w": torch.as_tensor(x)} if not isinstance(x, dict) else x for x in (u, k))
        tasks = Forces(*({"w": torch.as_tensor(b)} if not isinstance(b, dict) else b for b in batches))
        base = StateDict({n: torch.zeros_like(t) for n, t in u.items()})
        self.delta, self.mask, self.record = consensus_mask(
            StateDict(u), StateDict(k), base, tasks, ["u", "k"], None, DEFAULTS._replace(**options),  # type: ignore[arg-type]
            run=Run(folder), key="",
        )  # fmt: skip
        self.logits = torch.load(folder / "CALM-k.state.pt", weights_only=True)["params"]
        self.thetas = tasks.seen[2:]  # the first looks which tensors are reached, the second sets the step size


def test_one_update_of_one_entry(tmp_path: Path) -> None:
    """G d = 2e-6 * -0.4, F = 8, m' = -5 + 7 * sigma'(5). Averaging the two batches would give -4.9800558."""
    stage = Stage(tmp_path, [0.3], [-0.1], [1.5e-6], [0.5e-6], steps=1)
    assert stage.logits["w"].item() == pytest.approx(-4.9534636, abs=1e-6)
    assert isinstance(stage.record, CalmStage)


@pytest.mark.parametrize(("regulariser", "on", "off"), [("binarise", 5.51198, -5.51198), ("l1", 3.93335, -5.51198)])
def test_without_a_force_the_regulariser_alone_moves_logits(
    regulariser: str, on: float, off: float, tmp_path: Path
) -> None:
    stage = Stage(tmp_path, [0.0, 0.0], [4.0, 1.0], [0.0, 0.0], regulariser=regulariser, top=1.0)
    assert stage.logits["w"].tolist() == pytest.approx([on, off], abs=2e-5)
    assert stage.mask["w"].tolist() == [True, False]


@pytest.mark.parametrize("lr", [1.0, 1e7, 1e12])
def test_alpha_is_not_multiplied_by_the_step_size(lr: float, tmp_path: Path) -> None:
    stage = Stage(tmp_path, [0.0], [1.0], [0.0], lr=lr)
    assert stage.logits["w"].item() == pytest.approx(-5.51198, abs=5e-5)


def test_alpha_weighs_the_regulariser(tmp_path: Path) -> None:
    once, twice = (
        Stage(tmp_path / str(a), [0.0], [1.0], [0.0], steps=1, alpha=a).logits["w"].item() for a in (1.0, 2.0)
    )
    assert (once, twice) == (pytest.approx(-5.0066481, abs=1e-6), pytest.approx(-5.0132961, abs=1e-6))


@pytest.mark.parametrize(("force", "taken"), [(2.59, False), (2.65, True), (-50.0, False)])
def test_in_100_updates_an_entry_is_taken_iff_its_force_is_at_least_2_62(
    force: float, taken: bool, tmp_path: Path
) -> None:
    stage = Stage(tmp_path, [0.0], [1.0], [-force * 1e-7])
    assert stage.mask["w"].item() is taken
    assert stage.delta["w"].item() == float(taken)


@pytest.mark.parametrize(("updates", "force"), [(161, 2.0), (101, 2.6), (81, 3.0), (55, 4.0), (25, 8.0), (1, 754.0)])
def test_updates_until_an_entry_flips(updates: int, force: float) -> None:
    assert flip_threshold(updates) == pytest.approx(force, rel=0.03)


def test_plain_gradient_descent_not_adam(tmp_path: Path) -> None:
    """Steps are proportional to the force: an optimizer that normalises would move both entries alike."""
    moved = Stage(tmp_path, [0.0, 0.0], [1.0, 1.0], [-2e-7, -4e-7], steps=1, alpha=0.0).logits["w"] + 5
    assert (moved[1] / moved[0]).item() == pytest.approx(2.0, rel=1e-4)


def test_tiny_products_do_not_underflow(tmp_path: Path) -> None:
    """g d = 1e-10 and far below is nothing to half precision; lr brings it back to F = 8."""
    for scale in (1e-10, 1e-20, 1e-30):
        stage = Stage(tmp_path / str(scale), [0.0], [scale**0.5], [-(scale**0.5)], lr=8 / scale, steps=1)
        assert stage.logits["w"].item() == pytest.approx(-4.9534636, abs=1e-5)


def test_the_gradient_is_taken_at_the_soft_point_and_the_result_is_rounded(tmp_path: Path) -> None:
    stage = Stage(tmp_path, [0.25], [0.75], [-1e-6], steps=45)
    sigma = torch.sigmoid(torch.tensor(-5.0)).item()
    assert stage.thetas[0]["w"].item() == pytest.approx(0.25 + sigma * 0.5, abs=1e-7)
    soft = [theta["w"].item() for theta in stage.thetas]
    assert len(soft) == 45
    assert soft == sorted(soft)
    assert all(0.25 < w < 0.75 for w in soft)
    assert stage.delta["w"].item() == 0.75


def test_a_logit_of_exactly_0_keeps_the_running_merge(tmp_path: Path) -> None:
    stage = Stage(tmp_path, [0.25], [0.75], [0.0], logit=0.0, alpha=0.0, steps=1, lr=1.0)
    assert stage.logits["w"].item() == 0.0
    assert stage.delta["w"].item() == 0.25


@pytest.mark.parametrize("regulariser", ["binarise", "l1"])
def test_a_logit_of_exactly_0_is_pushed_down(regulariser: str, tmp_path: Path) -> None:
    stage = Stage(tmp_path, [0.25], [0.75], [0.0], logit=0.0, steps=1, regulariser=regulariser)
    assert stage.logits["w"].item() == -0.25


@pytest.mark.parametrize(("force", "expected"), [(1e-3, "k"), (-1e-3, "u")])
def test_a_full_mask_is_the_expert_and_an_empty_one_changes_nothing(
    force: float, expected: str, tmp_path: Path
) -> None:
    u, k = torch.tensor([0.1, -0.2, 0.3]), torch.tensor([1 / 3, 2 / 3, 1.0])
    stage = Stage(tmp_path, u, k, -force * torch.sign(k - u))
    assert torch.equal(stage.delta["w"], {"u": u, "k": k}[expected])


def test_the_top_entries_are_counted_over_all_tensors_together() -> None:
    tau_k = StateDict({"a": torch.tensor([9.0, -8.0, 7.0]), "b": torch.tensor([1.0, 2.0, 3.0])})
    logits = start_logits(tau_k, ["a", "b"], top=0.5, logit=5.0)
    assert logits["a"].tolist() == [5.0, 5.0, -5.0]  # k = 3: strictly above the third largest
    assert logits["b"].tolist() == [-5.0, -5.0, -5.0]


def test_of_300_000_entries_exactly_two_start_on() -> None:
    tau_k = StateDict({"w": (permutation(300_000, "w") - 150_000).float() + 0.25})
    assert (start_logits(tau_k, ["w"], top=1e-5, logit=5.0)["w"] > 0).sum() == 2


def test_fewer_than_100_000_entries_start_with_none(tmp_path: Path) -> None:
    """The official code takes the minimum of an empty tensor and crashes."""
    assert (start_logits(StateDict({"w": torch.arange(99_999.0)}), ["w"], top=1e-5, logit=5.0)["w"] == -5).all()
    assert Stage(tmp_path, [0.0], [1.0], [0.0]).record.entries == 1


def test_the_start_looks_at_the_new_expert_not_at_the_difference(tmp_path: Path) -> None:
    stage = Stage(tmp_path, [9.0, 0.0, 0.0], [1.0, 3.0, 2.0], [0.0] * 3, top=0.7, steps=1)  # k = 2
    assert stage.mask["w"].tolist() == [False, True, False]


@pytest.mark.parametrize(("rest", "expected"), [("average", 0.5), ("copy", 0.2)])
@pytest.mark.parametrize("why", ["no gradient", "frozen"])
def test_tensors_without_a_mask_are_averaged_or_copied(rest: str, expected: float, why: str, tmp_path: Path) -> None:
    u, k = ({"w": torch.tensor([x]), "text.w": torch.tensor([x])} for x in (0.2, 0.8))
    force = {"w": torch.tensor([-1.0])} | ({"text.w": torch.tensor([-1.0])} if why == "frozen" else {})
    frozen = ("text.*",) if why == "frozen" else ()
    stage = Stage(tmp_path, u, k, force, rest=rest, frozen=frozen)
    assert list(stage.mask) == ["w"]
    assert (stage.delta["w"].item(), stage.delta["text.w"].item()) == pytest.approx((0.8, expected))
    assert stage.thetas[0]["text.w"].item() == pytest.approx(expected)  # the loss sees them so as well


def test_the_automatic_step_size_gives_the_share_the_threshold(tmp_path: Path) -> None:
    force = StateDict({"a": torch.tensor([4.0, -8.0]), "b": torch.tensor([1.0, 2.0])})
    assert auto_step_size(force, 0.25, 3.0) == 0.75
    assert auto_step_size(force, 0.5, 3.0) == 1.5
    assert auto_step_size(force, 0.001, 3.0) == 0.75  # at least one entry
    assert auto_step_size(StateDict({"a": torch.tensor([-1.0, 2.0, 0.0, 0.0])}), 1.0, 3.0) == 1.5  # 1 of 4 is positive
    assert auto_step_size(StateDict({"a": torch.tensor([-1.0, 0.0])}), 0.5, 3.0) == 1.0  # nothing pulls
    assert auto_step_size(StateDict({}), 0.5, 3.0) == 1.0
    stage = Stage(tmp_path, torch.zeros(10), torch.ones(10), -torch.arange(1.0, 11.0), lr="auto", share=0.3)
    assert stage.mask["w"].tolist() == [False] * 7 + [True] * 3
    assert stage.record.lr == pytest.approx(flip_threshold(100) / 8)


@pytest.mark.parametrize("scale", [1e-12, 1000.0, 1e12])
def test_the_automatic_step_size_takes_the_scale_of_the_loss_away(scale: float, tmp_path: Path) -> None:
    g = -torch.arange(-3.0, 9.0)
    one, other = (Stage(tmp_path / str(s), torch.zeros(12), torch.ones(12), s * g, lr="auto", share=0.2)
                  for s in (1.0, scale))  # fmt: skip
    assert torch.equal(one.mask["w"], other.mask["w"])
    torch.testing.assert_close(one.logits["w"], other.logits["w"], rtol=1e-4, atol=1e-4)


def test_the_record_tells_flips_density_and_forces(tmp_path: Path) -> None:
    u, k = ({"a": torch.full((4,), x), "b": torch.full((2,), x)} for x in (0.0, 1.0))
    g = {"a": torch.tensor([-1.0, -1e-9, 0.0, 1.0]), "b": torch.tensor([-1.0, -1.0])}
    record = Stage(tmp_path, u, k, g, lr=1e3, steps=3).record
    assert record.flips == [3, 0, 0]
    assert record.taken == 0.5
    assert [(d.name, d.share, d.entries) for d in record.density] == [("a", 0.25, 4), ("b", 1.0, 2)]
    assert record.entries == record.histogram.total == 6
    assert record.histogram.non_positive == 2
    assert sum(c for low, _, c in record.histogram.bins() if low >= 100) == 3
