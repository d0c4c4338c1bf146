"""RegMean and RegMean++: the sheet's checks and traps, and FusionBench's solutions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from calmerge import DataError, Run, StateDict, average, regmean, regmean_pp, task_vectors
from calmerge.fitting.calibrate import grams
from calmerge.methods.regmean import least_squares
from calmerge.tasks.base import Task, Tasks
from calmerge.tasks.module import ModuleModel
from calmerge.tasks.taps import tokens

GOLDEN = Path(__file__).parents[1] / "golden" / "fusion_bench"


def pair(one: list[list[float]], two: list[list[float]]) -> Any:
    base = {"w": torch.zeros(len(one), len(one[0]))}
    return task_vectors(base, {"a": {"w": torch.tensor(one)}, "b": {"w": torch.tensor(two)}})


def solved(g: list[Any], tvs: Any, ratio: float = 1.0) -> Tensor:
    return least_squares(tvs, StateDict({"w": torch.tensor(g)}), ratio=ratio, damping=0.0)["w"]


@pytest.mark.parametrize(("g", "w", "expected"), [([2.0, 1.0], [1.0, 4.0], 2.0), ([1.0, 3.0], [0.0, 4.0], 3.0)])
def test_one_weight_is_the_weighted_mean(g: list[float], w: list[float], expected: float) -> None:
    found = solved([[[g[0]]], [[g[1]]]], pair([[w[0]]], [[w[1]]]))
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, [0.5, 0.5]), (0.9, [0.52381, 0.47619]), (0.0, [2 / 3, 1 / 3])])
def test_entries_off_the_diagonal_are_shrunk(ratio: float, expected: list[float]) -> None:
    g = [[[2.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]]
    found = solved(g, pair([[1.0, 0.0]], [[0.0, 1.0]]), ratio)
    assert found[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_identical_experts_come_back_whatever_their_inputs() -> None:
    w = [[1.0, 2.0], [3.0, 4.0]]
    g = [[[2.0, 1.0], [1.0, 5.0]], [[1.0, 0.0], [0.0, 3.0]]]
    torch.testing.assert_close(solved(g, pair(w, w)), torch.tensor(w))


def test_equal_grams_give_the_plain_mean() -> None:
    g = [[[2.0, 1.0], [1.0, 5.0]]] * 2
    tvs = pair([[1.0, 2.0]], [[3.0, 6.0]])
    torch.testing.assert_close(solved(g, tvs), torch.tensor([[2.0, 4.0]]))


def test_the_solution_is_that_of_least_squares() -> None:
    torch.manual_seed(0)
    x, w = [torch.randn(9, 4), torch.randn(7, 4)], [torch.randn(3, 4), torch.randn(3, 4)]
    tvs = task_vectors({"w": torch.zeros(3, 4)}, {"a": {"w": w[0]}, "b": {"w": w[1]}})
    g = StateDict({"w": torch.stack([one.T @ one for one in x])})
    found = least_squares(tvs, g, ratio=1.0, damping=0.0)["w"]
    target = torch.cat([one @ w_t.T for one, w_t in zip(x, w, strict=True)])
    torch.testing.assert_close(found.T, torch.linalg.lstsq(torch.cat(x), target).solution, rtol=1e-3, atol=1e-4)


def test_inputs_that_no_expert_uses_take_the_mean_and_not_nan() -> None:
    g = torch.zeros(2, 2, 2)
    g[:, 0, 0] = 1.0
    tvs = pair([[1.0, 2.0]], [[3.0, 6.0]])
    found = least_squares(tvs, StateDict({"w": g}), ratio=1.0, damping=1e-6)["w"]
    torch.testing.assert_close(found, torch.tensor([[2.0, 4.0]]))


def test_weights_kept_the_other_way_round_are_not_transposed() -> None:
    """GPT-2 keeps [in, out]: one input, two outputs."""
    tvs = pair([[1.0, 2.0]], [[4.0, 8.0]])
    g = StateDict({"w": torch.tensor([[[2.0]], [[1.0]]])})
    found = least_squares(tvs, g, ratio=1.0, damping=0.0, transposed=frozenset(["w"]))["w"]
    assert found.tolist() == [[2.0, 4.0]]


def test_padding_is_left_out() -> None:
    x = torch.tensor([[[1.0], [9.0]], [[2.0], [3.0]]])
    assert tokens(x, {"attention_mask": torch.tensor([[1, 0], [1, 1]])}).flatten().tolist() == [1.0, 2.0, 3.0]


def test_a_gram_is_a_mean_over_tokens_of_the_expert_s_own_inputs(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    base = {"0.weight": torch.zeros(2, 2), "1.weight": torch.zeros(2, 2)}
    expert = {"0.weight": torch.tensor([[2.0, 0.0], [0.0, 1.0]]), "1.weight": torch.ones(2, 2)}
    tvs = task_vectors(base, {"a": expert})
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    tasks = Tasks(ModuleModel(net), {"a": Task(DataLoader(TensorDataset(x)))})
    found = grams(tvs, tasks, tmp_path, examples=9, seed=0, run=Run())
    assert found["0.weight"][0].tolist() == [[0.5, 0.0], [0.0, 4.5]]
    assert found["1.weight"][0].tolist() == [[2.0, 0.0], [0.0, 4.5]]  # behind the expert's own first layer


def test_tensors_that_are_no_linear_layer_are_means(toy: Any) -> None:
    found, mean = regmean(toy.tvs, tasks=toy.tasks, examples=8), average(toy.tvs)
    for name in ("fc1.bias", "norm.weight", "gain", "unused"):
        torch.testing.assert_close(found[name], mean[name])
    assert not torch.allclose(found["fc1.weight"], mean["fc1.weight"])


def test_a_model_that_hides_its_module_is_refused(toy: Any) -> None:
    class Hidden:
        def logits(self, *args: Any) -> Tensor:
            return torch.zeros(1, 2)

    with pytest.raises(DataError, match="Hidden does not show its module, and RegMean watches its linear layers"):
        regmean(toy.tvs, tasks=toy.tasks.with_model(Hidden()))


class Deep(nn.Module):
    """Two blocks of one linear layer and a norm each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(3, 3), "norm": nn.LayerNorm(3)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block["norm"](torch.tanh(block["fc"](x)))
        return x


def deep(tasks: int) -> tuple[Any, Tasks]:
    torch.manual_seed(0)
    base = Deep().state_dict()
    experts = {
        t: {n: w + 0.3 * torch.randn_like(w) for n, w in base.items()} for t in [chr(97 + i) for i in range(tasks)]
    }
    pools = {t: Task(DataLoader(TensorDataset(torch.randn(20, 3)))) for t in experts}
    return task_vectors(base, experts), Tasks(ModuleModel(Deep()), pools)


def test_one_task_gives_the_expert_s_layers() -> None:
    tvs, tasks = deep(1)
    for method in (regmean, regmean_pp):
        delta = method(tvs, tasks=tasks)
        for name in delta:
            torch.testing.assert_close(delta[name], tvs[name][0], rtol=1e-3, atol=1e-4)


def test_the_second_block_sees_what_the_merged_first_block_gives() -> None:
    """The first block has the same inputs in both methods, the second has not."""
    tvs, tasks = deep(3)
    plain, ours = regmean(tvs, tasks=tasks, ratio=0.95), regmean_pp(tvs, tasks=tasks, ratio=0.95)
    torch.testing.assert_close(plain["layers.0.fc.weight"], ours["layers.0.fc.weight"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain["layers.1.fc.weight"], ours["layers.1.fc.weight"], atol=1e-4)


@pytest.mark.parametrize("case", ["regmean_ratio0p6_T3", "regmean_ratio1p0_T3"])
def test_solves_as_fusion_bench(case: str) -> None:
    described = json.loads((GOLDEN / case / "case.json").read_text())
    given = load_file((GOLDEN / case / described["inputs"]).resolve())
    extra = load_file((GOLDEN / case / described["extra_inputs"]).resolve())
    part = lambda d, p: {n.removeprefix(p): w for n, w in d.items() if n.startswith(p)}  # noqa: E731
    tvs = task_vectors(part(given, "base/"), {str(t): part(given, f"expert_{t}/") for t in (1, 2, 3)})
    modules = {n.removeprefix("gram_1/") for n in extra if n.startswith("gram_1/")}
    found = StateDict({f"{m}.weight": torch.stack([extra[f"gram_{t}/{m}"] for t in (1, 2, 3)]) for m in modules})
    ratio = described["hyper_parameters"]["reduce_non_diagonal_ratio"]
    delta = least_squares(tvs, found, ratio=ratio, damping=0.0)
    for name, stored in load_file(GOLDEN / case / "output.safetensors").items():
        if name in delta:
            torch.testing.assert_close(tvs.base[name] + delta[name], stored, **described["tolerance"])
