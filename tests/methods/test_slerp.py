"""SLERP, NuSLERP, Multi-SLERP and the Karcher mean: the worked checks and traps of their specifications."""

from collections.abc import Callable
from functools import partial
from math import acos, cos, pi, sin, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

from calmerge import (
    CheckpointError,
    TaskVectors,
    UsageError,
    Weights,
    karcher,
    multislerp,
    nuslerp,
    slerp,
    task_vectors,
)
from calmerge._random import uniform

near = partial(torch.testing.assert_close, rtol=0, atol=2e-6)
BENT = ([1.0, 0.0], [0.0, 2.0])


def vectors(*rows: Any, base: Any = None) -> TaskVectors:
    """Task vectors over zeros, or experts over a base."""
    tensors = [torch.tensor(r) if isinstance(r, list) else r for r in rows]
    start = torch.zeros_like(tensors[0]) if base is None else torch.as_tensor(base)
    return task_vectors({"w": start}, {f"t{i}": {"w": t} for i, t in enumerate(tensors)})


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (partial(slerp, t=0.5), [sqrt(0.5), sqrt(2)]),
        (partial(nuslerp, weight=[1.0]), [sqrt(0.5), sqrt(2)]),
        (partial(karcher), [1.5 * sqrt(0.5)] * 2),
        (partial(multislerp, weight=[1.0]), [1.5 * sqrt(0.5)] * 2),
        (partial(karcher, weight=[0.25, 0.75]), [1.75 * cos(3 * pi / 8), 1.75 * sin(3 * pi / 8)]),
        (partial(multislerp, weight=[0.25, 0.75]), [1.75 / sqrt(10), 5.25 / sqrt(10)]),
    ],
)
def test_two_vectors_at_a_right_angle(method: Callable[..., Weights], expected: list[float]) -> None:
    near(method(vectors(*BENT))["w"], torch.tensor(expected))


# SLERP ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "expected"), [(0.0, [1.0, 0.0]), (1.0, [0.0, 2.0]), (2.0, [-1.0, 0.0])])
def test_t_is_0_at_the_first_model_and_may_extrapolate(t: float, expected: list[float]) -> None:
    near(slerp(vectors(*BENT), t=t)["w"], torch.tensor(expected))


def test_the_angle_is_that_of_the_weights_unless_asked_for_the_deltas() -> None:
    base, one, two = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.0]), torch.tensor([1.0, 3.0])
    tvs = vectors(one, two, base=base)
    omega = acos(5 / sqrt(5 * 10))
    near(slerp(tvs, t=0.5)["w"] + base, (one + two) * sin(omega / 2) / sin(omega))
    near(slerp(tvs, t=0.5, of="deltas")["w"], torch.tensor([sqrt(0.5), sqrt(2)]))


def test_the_vectors_are_not_normalised_only_the_angle_is() -> None:
    near(slerp(vectors([10.0, 0.0], [0.0, 0.1]), t=0.5)["w"], torch.tensor([10.0, 0.1]) * sqrt(0.5))


@pytest.mark.parametrize(("angle", "linear"), [(0.0316, True), (0.0317, False)])
def test_a_cosine_above_0_9995_is_interpolated_linearly(angle: float, linear: bool) -> None:
    t = 0.3
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([cos(angle), sin(angle)])
    curved = (one * sin((1 - t) * angle) + two * sin(t * angle)) / sin(angle)
    merged = slerp(vectors(1e3 * one, 1e3 * two), t=t)["w"] / 1e3  # both differ by 5e-5
    straight = (1 - t) * one + t * two
    assert ((merged - straight).norm() < 1e-6) == linear
    assert ((merged - curved).norm() < 1e-6) != linear


def test_a_model_of_zeros_is_orthogonal_to_any_other() -> None:
    near(slerp(vectors([0.0, 0.0], [0.0, 2.0]), t=0.5)["w"], torch.tensor([0.0, sqrt(2)]))


def test_the_base_as_one_of_the_two_may_stand_among_the_experts() -> None:
    base, expert = torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 2.0])
    over_zero = slerp(vectors(base, expert), t=0.3)["w"]
    near(slerp(vectors(base, expert, base=base), t=0.3)["w"] + base, over_zero)


@pytest.mark.parametrize("method", [partial(slerp, t=0.5), partial(nuslerp, weight=[1.0])])
@pytest.mark.parametrize("n", [1, 3])
def test_other_than_two_models_are_refused(method: Callable[..., Weights], n: int) -> None:
    with pytest.raises(UsageError, match=rf"interpolates two models, got {n} \(t0"):
        method(vectors(*[torch.ones(2)] * n))


# NuSLERP ----------------------------------------------------------------------------------------------------


def test_t_is_the_second_weight_s_share() -> None:
    near(nuslerp(vectors(*BENT), weight=[1.0, 3.0])["w"], slerp(vectors(*BENT), t=0.75)["w"])


def test_weights_that_sum_to_zero_mean_one_half() -> None:
    for weight in ([0.0], [0.5, -0.5]):
        near(nuslerp(vectors(*BENT), weight=weight)["w"], torch.tensor([sqrt(0.5), sqrt(2)]))


def test_a_task_vector_of_zeros_is_orthogonal() -> None:
    near(nuslerp(vectors([0.0, 0.0], [0.0, 2.0]), weight=[1.0])["w"], torch.tensor([0.0, sqrt(2)]))


@pytest.mark.parametrize("two", [[1.0, 3.0], [-1.0, -3.0]])
def test_parallel_and_opposite_vectors_are_interpolated_linearly(two: list[float]) -> None:
    """Rounding of the cosine must not be blown up by a sine of almost 0."""
    expected = 0.75 * torch.tensor([1.0, 3.0]) + 0.25 * torch.tensor(two)
    near(nuslerp(vectors([1.0, 3.0], two), weight=[0.75, 0.25])["w"], expected)


MATRICES = ([[1.0, 0.0], [3.0, 0.0]], [[0.0, 2.0], [1.0, 0.0]])


def test_rows_have_their_own_angles_without_flatten() -> None:
    merged = nuslerp(vectors(*MATRICES), weight=[1.0], nuslerp_flatten=False)["w"]
    near(merged, torch.tensor([[sqrt(0.5), sqrt(2)], [2.0, 0.0]]))


def test_row_wise_takes_columns() -> None:
    turned = [torch.tensor(m).T.contiguous() for m in MATRICES]
    merged = nuslerp(vectors(*turned), weight=[1.0], nuslerp_flatten=False, nuslerp_row_wise=True)["w"]
    near(merged, torch.tensor([[sqrt(0.5), 2.0], [sqrt(2), 0.0]]))


def test_many_rows_are_cut_into_blocks_without_effect() -> None:
    one, two = (uniform((3000, 200), i) - 0.5 for i in range(2))
    tall = nuslerp(vectors(one, two), weight=[1.0, 2.0], nuslerp_flatten=False)["w"]
    near(tall[2990:], nuslerp(vectors(one[2990:], two[2990:]), weight=[1.0, 2.0], nuslerp_flatten=False)["w"])


def test_rows_of_weights_give_the_base_where_nothing_changed() -> None:
    base = torch.tensor(MATRICES[0])
    delta = nuslerp(vectors(base, base, base=base), weight=[0.3, 0.9], nuslerp_flatten=False, of="weights")["w"]
    assert torch.equal(delta, torch.zeros(2, 2))


# Multi-SLERP ------------------------------------------------------------------------------------------------


def test_the_closed_form_is_the_exponential_map_from_the_mean_direction() -> None:
    x = torch.stack([uniform((50,), i) - 0.3 for i in range(4)]).double()
    w = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    unit = x / x.norm(dim=1, keepdim=True)
    m = w @ unit
    m = m / m.norm()
    tangents = unit - (unit @ m)[:, None] * m
    step = w @ tangents
    moved = m + step if step.norm() < 1e-12 else cos(step.norm()) * m + sin(step.norm()) * step / step.norm()
    expected = (w @ x.norm(dim=1)) * moved
    merged = multislerp(vectors(*x.float()), weight=w.tolist())["w"]
    near(merged, expected.float())


def test_raw_weights_scale_the_length_and_not_the_direction() -> None:
    normal = multislerp(vectors(*BENT), weight=[1.0, 3.0])["w"]
    near(multislerp(vectors(*BENT), weight=[1.0, 3.0], normalize_weights=False)["w"], 4 * normal)


def test_directions_that_cancel_are_an_error_that_names_the_tensor() -> None:
    tvs = vectors([1.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0])
    with pytest.raises(CheckpointError, match="directions of the 4 models cancel in tensor 'w'"):
        dict(multislerp(tvs, weight=[1.0]))


def test_two_opposite_vectors_are_added_by_weight() -> None:
    near(multislerp(vectors([1.0, 0.0], [-2.0, 0.0]), weight=[0.5, 0.5])["w"], torch.tensor([-0.5, 0.0]))


def test_vectors_of_zeros_shorten_the_mean_and_do_not_turn_it() -> None:
    near(multislerp(vectors([4.0, 0.0], [0.0, 0.0]), weight=[1.0])["w"], torch.tensor([2.0, 0.0]))


def test_a_tensor_of_one_entry_is_averaged() -> None:
    near(multislerp(vectors([3.0], [-1.0], [4.0]), weight=[1.0])["w"], torch.tensor([2.0]))
    near(karcher(vectors([3.0], [-1.0], [4.0]))["w"], torch.tensor([2.0]))


# Karcher ----------------------------------------------------------------------------------------------------


def iterated(x: Tensor, share: Tensor, steps: int) -> Tensor:
    """The mean as it is told, on the vectors themselves."""
    norms = x.norm(dim=1)
    unit = x / norms[:, None]
    u = share @ unit
    u = u / u.norm()
    for _ in range(steps):
        angle = torch.acos((unit @ u).clamp(-1, 1))
        away = unit - torch.cos(angle)[:, None] * u
        move = share @ (angle[:, None] * away / away.norm(dim=1, keepdim=True))
        if move.norm() < 1e-5:
            break
        u = torch.cos(move.norm()) * u + torch.sin(move.norm()) * move / move.norm()
        u = u / u.norm()
    mean: Tensor = (share @ norms) * u
    return mean


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_the_search_on_inner_products_is_the_search_on_vectors(steps: int) -> None:
    x = torch.stack([uniform((40,), "k", i) - 0.4 for i in range(5)]).double()
    share = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25]).double()
    near(karcher(vectors(*x.float()), weight=share.tolist(), max_iter=steps)["w"], iterated(x, share, steps).float())


def test_zeros_count_in_the_length_and_not_in_the_direction() -> None:
    near(karcher(vectors([1.0, 0.0], [0.0, 2.0], [0.0, 0.0]))["w"], torch.full((2,), sqrt(0.5)))


def test_only_zeros_give_zeros() -> None:
    assert karcher(vectors([0.0, 0.0], [0.0, 0.0]))["w"].tolist() == [0.0, 0.0]


def test_opposite_models_give_a_finite_answer() -> None:
    assert karcher(vectors([1.0, 0.0], [-1.0, 0.0]))["w"].isfinite().all()


def test_the_base_is_only_where_the_merge_starts_from() -> None:
    base = torch.tensor([5.0, -1.0])
    near(karcher(vectors(*BENT, base=base))["w"] + base, karcher(vectors(*BENT))["w"])


def test_the_order_of_models_does_not_matter() -> None:
    x = [uniform((30,), "o", i) - 0.5 for i in range(3)]
    near(karcher(vectors(*x))["w"], karcher(vectors(*x[::-1]))["w"])
    near(multislerp(vectors(*x), weight=[1.0])["w"], multislerp(vectors(*x[::-1]), weight=[1.0])["w"])
