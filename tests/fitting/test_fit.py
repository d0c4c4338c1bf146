"""The one optimisation loop."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from calmerge import DataError, FitError, Run, StateDict, UsageError, Weights, task_vectors
from calmerge._weights import Computed
from calmerge.fitting import Pool, entropy, fit, shuffled
from calmerge.pieces import blend

SGD = partial(torch.optim.SGD, lr=0.1)


def batches_of(toy: Any) -> Callable:
    return shuffled({t: Pool(torch.arange(30)) for t in toy.tvs.tasks}, size=8, count=2)


def plain_loss(toy: Any, theta: Mapping[str, Tensor], step: int) -> Tensor:
    """The loss with the whole graph, through the parameters, held at once."""
    losses = []
    for task, indices, _ in batches_of(toy)(step):
        x, _ = toy.tasks.split(task, "pool").batch(indices)
        x = x[0] if isinstance(x, tuple | list) else x
        losses.append(entropy(toy.heads[task](functional_call(toy.module, dict(theta), (x,)))))
    return torch.stack(losses).sum()


def test_coefficients_move_as_under_plain_autograd(toy: Any) -> None:
    tvs = toy.tvs
    start = torch.full((4, len(tvs)), 0.3)
    column = {name: i for i, name in enumerate(tvs)}
    fitted = fit(
        lambda p: blend(tvs, lambda name: p["lam"][:, column[name]]),
        {"lam": start},
        toy.tasks.gradient(entropy, batches_of(toy)),
        base=tvs.base,
        optimizer=partial(torch.optim.Adam, lr=0.02),
        steps=5,
    )
    lam = start.clone().requires_grad_()
    optim = torch.optim.Adam([lam], lr=0.02)
    curve = []
    for step in range(5):
        theta = {n: tvs.base[n] + torch.einsum("t,t...->...", lam[:, column[n]], tvs[n]) for n in tvs}
        loss = plain_loss(toy, theta, step)
        optim.zero_grad()
        loss.backward()
        optim.step()
        curve.append(loss.item())
    torch.testing.assert_close(fitted.params["lam"], lam.detach(), rtol=0, atol=1e-6)
    assert [sum(s) for s in zip(*fitted.loss.values(), strict=True)] == pytest.approx(curve, abs=1e-5)
    assert (fitted.params["lam"] - start).abs().max() > 0.05  # the coefficients did move


def test_masks_move_as_under_plain_autograd(toy: Any) -> None:
    tvs = toy.tvs
    u, k = {n: 0.3 * tvs[n][:3].sum(0) for n in tvs}, dict(tvs.of("d"))
    start = {n: torch.where(k[n] > 0.25, 1.0, -1.0) for n in tvs}

    def soft(logits: Mapping[str, Tensor]) -> Weights:
        mixed = lambda u, k, site: u + logits[site.name].sigmoid() * (k - u)  # noqa: E731
        return Computed(mixed, (StateDict(u), StateDict(k)), tvs.specs, elementwise=False)

    fitted = fit(
        soft,
        start,
        toy.tasks.gradient(entropy, batches_of(toy)),
        base=tvs.base,
        optimizer=partial(torch.optim.SGD, lr=20.0),
        steps=4,
        penalty=lambda name, p: 0.01 * p[name].sigmoid().sum(),
    )
    m = {n: t.clone().requires_grad_() for n, t in start.items()}
    optim = torch.optim.SGD(m.values(), lr=20.0)
    for step in range(4):
        theta = {n: tvs.base[n] + (1 - m[n].sigmoid()) * u[n] + m[n].sigmoid() * k[n] for n in tvs}
        loss = plain_loss(toy, theta, step) + 0.01 * torch.stack([t.sigmoid().sum() for t in m.values()]).sum()
        optim.zero_grad()
        loss.backward()
        optim.step()
    for name in tvs:
        torch.testing.assert_close(fitted.params[name], m[name].detach(), rtol=0, atol=2e-6)


def test_the_gradient_is_that_of_finite_differences() -> None:
    tvs = task_vectors({"w": torch.zeros(3)}, {"a": {"w": torch.tensor([1.0, 2.0, 4.0])}, "b": {"w": torch.ones(3)}})
    target = torch.tensor([0.5, -1.0, 2.0])

    def loss_at(lam: Tensor) -> float:
        return ((blend(tvs, lam)["w"] - target) ** 2).sum().item()

    def gradient(theta: Mapping[str, Tensor], step: int) -> dict[str, float]:
        ((theta["w"] - target) ** 2).sum().backward()
        return {}

    start = torch.tensor([0.25, 0.5])
    fitted = fit(lambda p: blend(tvs, p["lam"]), {"lam": start}, gradient, base=tvs.base, optimizer=SGD, steps=1)
    found = (start - fitted.params["lam"]) / 0.1
    for t, step in enumerate(torch.eye(2) / 8):  # central differences are exact for a quadratic
        assert found[t].item() == pytest.approx((loss_at(start + step) - loss_at(start - step)) * 4, rel=1e-5)


def counting(target: float, *, fail_at: int | None = None) -> Callable[[Mapping[str, Tensor], int], dict[str, float]]:
    """Gradients of (w - target)^2 / 2 with a target that depends on the update; may break down at one."""

    def gradient(theta: Mapping[str, Tensor], step: int) -> dict[str, float]:
        if step == fail_at:
            raise KeyboardInterrupt
        loss = ((theta["w"] - target - step) ** 2).sum() / 2
        loss.backward()
        return {"toy": loss.item()}

    return gradient


def scaled(params: Mapping[str, Tensor]) -> Weights:
    return StateDict({"w": params["scale"] * torch.ones(2)})


BASE = StateDict({"w": torch.zeros(2)})
START = {"scale": torch.tensor(0.5)}
ADAM = partial(torch.optim.Adam, lr=0.1)


@pytest.mark.parametrize("fail_at", [0, 1, 3])
def test_an_interrupted_fit_goes_on_and_ends_the_same(fail_at: int, tmp_path: Path, save_always: None) -> None:
    whole = fit(scaled, START, counting(3.0), base=BASE, optimizer=ADAM, steps=5)
    again = partial(fit, scaled, START, base=BASE, optimizer=ADAM, steps=5, run=Run(tmp_path), key="k")
    with pytest.raises(KeyboardInterrupt):
        again(counting(3.0, fail_at=fail_at))
    steps: list[int] = []

    def watched(theta: Mapping[str, Tensor], step: int) -> dict[str, float]:
        steps.append(step)
        return counting(3.0)(theta, step)

    resumed = again(watched)
    assert steps == list(range(fail_at, 5))
    assert torch.equal(resumed.params["scale"], whole.params["scale"])
    assert resumed.loss == whole.loss
    assert again(counting(3.0, fail_at=0)).loss == whole.loss  # finished: nothing is computed again


def test_a_resumed_fit_tells_what_it_took_before(tmp_path: Path) -> None:
    again = partial(fit, scaled, START, counting(3.0), base=BASE, optimizer=ADAM, key="k")
    first, run = again(steps=2, run=Run(tmp_path)), Run(tmp_path)
    assert again(steps=4, run=run).seconds > first.seconds
    assert run.earlier == [first.seconds]


def test_the_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "here")
    fit(scaled, START, counting(3.0), base=BASE, optimizer=ADAM, steps=2, run=run, key="seed 0")
    with pytest.raises(UsageError, match=r"here holds the state of another run. Name another folder"):
        fit(scaled, START, counting(3.0), base=BASE, optimizer=ADAM, steps=2, run=run, key="seed 1")


def test_a_fit_can_be_prolonged_but_not_shortened(tmp_path: Path) -> None:
    again = partial(fit, scaled, START, counting(3.0), base=BASE, optimizer=ADAM, run=Run(tmp_path), key="k")
    again(steps=2)
    whole = fit(scaled, START, counting(3.0), base=BASE, optimizer=ADAM, steps=4)
    assert torch.equal(again(steps=4).params["scale"], whole.params["scale"])
    with pytest.raises(UsageError, match="4 updates, more than the 3 asked for"):
        again(steps=3)


def test_what_is_observed_is_asked_for_after_every_update_and_kept(tmp_path: Path) -> None:
    fitted = fit(
        scaled, START, counting(3.0), base=BASE, optimizer=SGD, steps=2, run=Run(tmp_path),
        observe=lambda p: {"scale": p["scale"].item()},
    )  # fmt: skip
    assert len(fitted.observed["scale"]) == 2
    assert fitted.observed["scale"][-1] == fitted.params["scale"].item()


def test_parameters_are_not_changed_in_place() -> None:
    start = {"scale": torch.tensor(0.5)}
    fitted = fit(scaled, start, counting(3.0), base=BASE, optimizer=SGD, steps=3)
    assert start["scale"].item() == 0.5
    assert not start["scale"].requires_grad
    assert not fitted.params["scale"].requires_grad
    assert BASE["w"].tolist() == [0.0, 0.0]


def test_without_updates_the_start_comes_out() -> None:
    fitted = fit(scaled, START, counting(3.0), base=BASE, optimizer=SGD, steps=0)
    assert fitted.params["scale"].item() == 0.5
    assert fitted.loss == {}


def test_a_gradient_that_is_not_finite_names_update_and_parameter() -> None:
    def gradient(theta: Mapping[str, Tensor], step: int) -> dict[str, float]:
        (theta["w"].sum() * (float("nan") if step == 2 else 0.0)).backward()
        return {"toy": 0.0}

    with pytest.raises(FitError, match="update 3: the gradient of 'scale' is not finite"):
        fit(scaled, START, gradient, base=BASE, optimizer=SGD, steps=5)


@pytest.mark.parametrize("error", [FitError, DataError])
def test_a_fit_that_fails_keeps_its_last_good_state(error: type[Exception], tmp_path: Path) -> None:
    def gradient(theta: Mapping[str, Tensor], step: int) -> dict[str, float]:
        if step == 2 and error is DataError:
            raise DataError("update 3: the model fails")
        (theta["w"].sum() * (float("nan") if step == 2 else 1.0)).backward()
        return {"toy": 0.0}

    run = Run(folder=tmp_path)
    with pytest.raises(error, match="update 3"):
        fit(scaled, START, gradient, base=BASE, optimizer=SGD, steps=5, run=run)
    two = fit(scaled, START, gradient, base=BASE, optimizer=SGD, steps=2)
    kept = torch.load(tmp_path / "fitting.state.pt", weights_only=True)
    assert kept["step"] == 2
    assert torch.equal(kept["params"]["scale"], two.params["scale"])


def test_large_finite_gradients_that_overflow_only_in_their_sum_are_fine() -> None:
    def gradient(theta: Mapping[str, Tensor], step: int) -> dict[str, float]:
        theta["w"].grad = torch.full((2,), 2e38)
        return {}

    merged = lambda p: Computed(lambda m, site: p["w"] * m, (StateDict({"w": torch.ones(2)}),), BASE.specs)  # noqa: E731
    fitted = fit(merged, {"w": torch.zeros(2)}, gradient, base=BASE, optimizer=partial(torch.optim.SGD, lr=1e-38),
                 steps=1)  # fmt: skip
    assert fitted.params["w"].tolist() == pytest.approx([-2.0, -2.0])


def test_a_loss_that_is_not_finite_names_task_and_update(toy: Any) -> None:
    def broken(logits: Tensor, targets: Tensor | None) -> Tensor:
        return logits.sum() * (float("inf") if logits.shape[1] == 3 else 0.0)  # the task of three classes is 'b'

    tvs = toy.tvs
    with pytest.raises(FitError, match=r"update 1: the loss of task 'b' is (inf|-inf|nan)"):
        fit(
            lambda p: blend(tvs, p["lam"]),
            {"lam": torch.full((4,), 0.3)},
            toy.tasks.gradient(broken, batches_of(toy)),
            base=tvs.base,
            optimizer=SGD,
            steps=1,
        )


def test_tensors_that_no_loss_reaches_leave_their_parameters_alone() -> None:
    def gradient(theta: Mapping[str, Tensor], step: int) -> dict[str, float]:
        theta["w"].sum().backward()
        return {}

    base = StateDict({"w": torch.zeros(1), "v": torch.zeros(1)})
    merged = lambda p: Computed(lambda b, site: p[site.name] + b, (base,), base.specs)  # noqa: E731
    start = {"w": torch.zeros(1), "v": torch.zeros(1)}
    fitted = fit(merged, start, gradient, base=base, optimizer=SGD, steps=1)
    assert (fitted.params["w"].item(), fitted.params["v"].item()) == (pytest.approx(-0.1), 0.0)


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []

    class Bar:
        def track(self, label: str, total: float, unit: str = "it") -> "Bar":
            told.append((label, total))
            return self

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *exc: object) -> None:
            return None

        def advance(self, n: float = 1, **info: object) -> None:
            told.append(("advance", n))

    fit(scaled, START, counting(3.0), base=BASE, optimizer=SGD, steps=2, run=Run(progress=Bar()), label="toy")
    assert told[0] == ("toy", 2)
    assert sum(n for what, n in told if what == "advance") == 2
