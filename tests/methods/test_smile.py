"""SMILE: which expert a token goes to, and what it finds there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calmerge import DataError, Merged, UsageError, open_merged, save, smile, task_vectors
from calmerge.pieces.factor_patch import FactorPatch
from calmerge.pieces.subspace import SubspaceRouter, routed
from calmerge.tasks.base import Tasks
from calmerge.tasks.module import ModuleModel
from calmerge.tasks.serving import serving


def at_work(merged: Merged, module: nn.Module, base: dict[str, Tensor], x: Tensor) -> Tensor:
    model = ModuleModel(module)
    assert merged.router is not None
    return merged.router.over(model, task_vectors(base, {"a": base}).base, merged).logits({}, x, "a")


def two(first: Tensor, second: Tensor, base: Tensor | None = None) -> Any:
    base = torch.zeros_like(first) if base is None else base
    return task_vectors({"weight": base}, {"a": {"weight": base + first}, "b": {"weight": base + second}})


def linear(m: int = 2, n: int = 2) -> nn.Module:
    return nn.Linear(n, m, bias=False)


def test_one_expert_of_full_rank_is_the_expert(toy: Any) -> None:
    tvs = toy.tvs.only(["b"])
    merged = smile(tvs, rank=None, rest="mean")
    found = serving(merged, tvs.base.only_names(tvs.specs), toy.tasks)("b", "test")
    torch.testing.assert_close(found, toy.tasks.logits(tvs.expert("b"), "b", "test"), rtol=1e-4, atol=1e-5)


def test_an_input_in_the_span_of_an_expert_goes_there() -> None:
    """Updates [[2, 0], [0, 0]] and [[0, 0], [0, 3]] read one coordinate each."""
    tvs = two(torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 3.0])), torch.ones(2, 2))
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.5]])
    expected = x @ torch.ones(2, 2) + torch.tensor([[0.0, 3.0], [2.0, 0.0], [2.0, 0.0]])
    torch.testing.assert_close(at_work(smile(tvs), linear(), dict(tvs.base), x), expected)


def test_singular_values_play_no_part_in_the_choice() -> None:
    tvs = two(torch.diag(torch.tensor([100.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0])))
    found = at_work(smile(tvs), linear(), dict(tvs.base), torch.tensor([[0.9, 1.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, 1.0]]))


def test_the_best_are_weighted_by_a_softmax_renormalised() -> None:
    x, ways = torch.tensor([[1.0, 2.0, 0.5]]), list(torch.eye(3).split(1, dim=1))
    e = torch.tensor([1.0, 2.0]).exp()
    torch.testing.assert_close(routed(x, ways, 2), torch.tensor([[e[0] / e.sum(), e[1] / e.sum(), 0.0]]))
    torch.testing.assert_close(routed(x, ways, 3), x.softmax(1))
    assert routed(torch.zeros(1, 3), ways, 1).tolist() == [[1.0, 0.0, 0.0]]  # of equal ones the first


def test_more_directions_may_decide_otherwise() -> None:
    """b reads two coordinates, its second direction only with directions=2; a reads one."""
    a, b = torch.diag(torch.tensor([1.0, 0.0, 0.0])), torch.diag(torch.tensor([0.0, 2.0, 1.0]))
    tvs, x = two(a, b), torch.tensor([[1.0, 0.5, 1.0]])
    one = at_work(smile(tvs, directions=1), linear(3, 3), dict(tvs.base), x)
    both = at_work(smile(tvs, directions=2), linear(3, 3), dict(tvs.base), x)
    torch.testing.assert_close(one, torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(both, torch.tensor([[0.0, 1.0, 1.0]]))


def test_each_token_is_routed_by_itself() -> None:
    tvs = two(torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 3.0])))
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [1.0, 0.0]]])
    expected = torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[0.0, 6.0], [2.0, 0.0]]])
    torch.testing.assert_close(at_work(smile(tvs), linear(), dict(tvs.base), x), expected)


def test_biases_go_with_their_layer() -> None:
    base = {"weight": torch.zeros(1, 2), "bias": torch.tensor([1.0])}
    a = {"weight": torch.tensor([[1.0, 0.0]]), "bias": torch.tensor([11.0])}
    b = {"weight": torch.tensor([[0.0, 1.0]]), "bias": torch.tensor([101.0])}
    tvs = task_vectors(base, {"a": a, "b": b})
    found = at_work(smile(tvs), nn.Linear(2, 1), base, torch.eye(2))
    torch.testing.assert_close(found, torch.tensor([[12.0], [102.0]]))


def test_layers_kept_as_in_by_out_are_read_the_other_way_round() -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    a = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    tvs = two(a, a.flip(0) * 10)
    found = at_work(smile(tvs), Conv1D(), dict(tvs.base), torch.eye(2))
    torch.testing.assert_close(found, torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]))


def test_layers_that_no_expert_changed_are_left_alone() -> None:
    tvs = two(torch.zeros(2, 2), torch.zeros(2, 2), torch.eye(2))
    assert torch.equal(at_work(smile(tvs), linear(), dict(tvs.base), torch.eye(2)), torch.eye(2))


def test_other_tensors_are_the_base_s_or_the_mean(toy: Any) -> None:
    base, mean = smile(toy.tvs), smile(toy.tvs, rest="mean")
    assert not list(base.shared)
    assert set(mean.shared) == {"norm.weight", "norm.bias", "gain", "unused"}
    for name, w in mean.shared.items():
        torch.testing.assert_close(w, toy.tvs[name].mean(0))


def test_tables_have_no_experts() -> None:
    base = {n: torch.zeros(4, 4) for n in ("embeddings.position_embeddings.weight", "fc.weight")}
    merged = smile(task_vectors(base, {"a": {n: torch.eye(4) for n in base}}))
    patch = merged.patches["a"]
    assert isinstance(patch, FactorPatch)
    assert list(patch.own()) == ["fc.weight"]


def test_the_folder_routes_as_what_was_saved(toy: Any, tmp_path: Path) -> None:
    tvs = toy.tvs
    merged = smile(tvs, rank=3, directions=2, top=2)
    cost = save(tmp_path / "out", tvs, merged)["storage"]
    again = open_merged(tmp_path / "out")
    assert again.router == SubspaceRouter(tvs.tasks, 2, 2)
    assert cost["router"] == 16
    assert cost["patches"]["a"] == 4 * (3 * (8 + 5) + 3 * (6 + 8) + 8)  # two matrices, one bias
    base = tvs.base.only_names(tvs.specs)
    for routing in (True, False):
        found = [serving(m, base, toy.tasks, routed=routing)("c", "test") for m in (merged, again)]
        assert torch.equal(*found)
    assert not toy.module.fc1._forward_hooks


def test_an_attention_that_never_calls_its_layer_is_refused() -> None:
    module = nn.MultiheadAttention(4, 2, bias=False)
    base = {n: t.detach() for n, t in module.state_dict().items()}
    tvs = task_vectors(base, {"a": {n: t + 1 for n, t in base.items()}})
    with pytest.raises(DataError, match=r"'out_proj.weight' belongs to a torch.nn.MultiheadAttention"):
        at_work(smile(tvs), module, base, torch.ones(1, 4))
    with pytest.raises(DataError, match=r"skip: \['out_proj.weight'\]"):
        at_work(smile(tvs, skip=["in_proj_weight"]), module, base, torch.ones(1, 4))


def test_a_model_that_hides_its_module_is_named(toy: Any) -> None:
    class Closed:
        def logits(self, weights: Any, inputs: Any, task: str) -> Tensor:
            return torch.zeros(1, 2)

    tasks: Tasks = toy.tasks.with_model(Closed())
    with pytest.raises(DataError, match="Closed does not show its module"):
        serving(smile(toy.tvs), toy.tvs.base, tasks)


def test_numbers_that_do_not_fit_are_refused(toy: Any) -> None:
    with pytest.raises(UsageError, match="directions must be at most rank 2, got 3"):
        smile(toy.tvs, rank=2, directions=3)
    with pytest.raises(UsageError, match="top must be at most the number of experts, 4, got 5"):
        smile(toy.tvs, top=5)
    with pytest.raises(UsageError, match=r"'fc3\.weight' fits no tensor"):
        smile(toy.tvs, skip=["fc3.weight"])
