"""The README's examples are true: its code runs, its recipe is valid, its commands exist."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import calmerge as cm
from calmerge._random import uniform
from calmerge.cli import app
from calmerge.recipe import load_recipe

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def tensors(*key: object) -> dict[str, torch.Tensor]:
    return {"w": uniform((4, 3), *key), "b": uniform((4,), *key)}


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "experts/cars", "experts/pets"):
        source = cm.task_vectors(tensors(name), {"x": tensors(name) | {"head": torch.ones(2)}})
        cm.save(tmp_path / name, source, source.of("x"))
    return tmp_path


def test_the_python_example_runs(checkpoints: Path) -> None:
    names: dict[str, object] = {}
    exec(blocks("python")[0], names)
    assert (checkpoints / "merged" / "calmerge.json").is_file()
    assert (checkpoints / "merged-cars" / "model.safetensors").is_file()
    written = cm.open_checkpoint(checkpoints / "merged")
    torch.testing.assert_close(written["w"], names["weights"]["w"], rtol=0, atol=0)  # type: ignore[index]


def test_any_module_with_any_loader_runs() -> None:
    def encoder(seed: int) -> nn.Module:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
        with torch.no_grad():
            for name, p in module.named_parameters():
                p += 0.1 * seed * (uniform(tuple(p.shape), seed, name) - 0.5)
        return module

    def loader(seed: int) -> DataLoader:  # type: ignore[type-arg]
        return DataLoader(TensorDataset(uniform((64, 6), seed), torch.zeros(64, dtype=torch.long)), batch_size=8)

    names = {
        "encoder": encoder(0),
        "digits_encoder": encoder(1),
        "letters_encoder": encoder(2),
        "digits_head": nn.Linear(8, 3),
        "letters_head": nn.Linear(8, 2),
        "digits_loader": loader(1),
        "letters_loader": loader(2),
    }
    before = {n: p.clone() for n, p in names["encoder"].state_dict().items()}  # type: ignore[union-attr]
    exec(blocks("python")[1], names)
    after = names["encoder"].state_dict()  # type: ignore[union-attr]
    assert any(not torch.equal(before[n], after[n]) for n in before)


def test_the_recipe_is_valid_and_runs(checkpoints: Path) -> None:
    (checkpoints / "recipe.yaml").write_text(blocks("yaml")[0])
    assert [step.name for step in load_recipe(checkpoints / "recipe.yaml").merge] == ["drop_and_rescale", "ties"]
    result = CliRunner().invoke(app, ["merge", "recipe.yaml", "--quiet"])
    assert result.exit_code == 0, result.output
    assert cm.open_checkpoint(checkpoints / "merged")["w"].dtype == torch.bfloat16


def test_every_command_exists() -> None:
    verbs = set(re.findall(r"(?:`|&& |# )calmerge ([\w-]+)", README))
    known = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    assert {"demo", "bench", "merge"} < verbs <= known


def test_setup_commands_stand_alone() -> None:
    assert 'pip install -e ".[demo]" && calmerge demo' in blocks("bash")[0]
    assert 'pip install -e ".[test]" && pytest' in blocks("bash")[1].splitlines()
