"""Mixtures of inputs: what is mixed, that it is the same in any batch, and inputs that cannot be."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from calmerge import DataError
from calmerge.tasks.base import Task, Tasks
from calmerge.tasks.data import from_loader
from calmerge.tasks.mixing import RUN, Mixed, mixed


def images(n: int = 6) -> Mixed:
    """Image i is i + 1 everywhere."""
    pixels = (torch.arange(n) + 1.0).reshape(n, 1, 1, 1).expand(n, 3, 8, 8)
    return Mixed(from_loader(DataLoader(TensorDataset(pixels))), 4, "seed")


class Texts:
    """Text i has i + 1 runs of the token i + 1; a batch is as long as its longest."""

    def __len__(self) -> int:
        return 4

    def batch(self, indices: torch.Tensor) -> tuple[dict[str, torch.Tensor], None]:
        longest = RUN * int(indices.max() + 1)
        mask = (torch.arange(longest) < RUN * (indices[:, None] + 1)).long()
        return {"input_ids": mask * (indices[:, None] + 1), "attention_mask": mask}, None


def test_the_pool_itself_comes_first() -> None:
    first, labels = images().batch(torch.arange(6))
    assert first[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert first.var(dim=(1, 2, 3)).eq(0).all()
    assert labels is None


def test_an_image_takes_a_box_of_one_other() -> None:
    for i in range(6, 24):
        image = images().batch(torch.tensor([i]))[0][0]
        assert torch.equal(image[0], image[1])
        taken = image[0] != i % 6 + 1
        rows, columns = taken.any(1), taken.any(0)
        assert torch.equal(taken, rows[:, None] & columns[None, :])
        assert rows.long().diff().abs().sum() <= 2  # neighbouring rows
        assert len(image[0][taken].unique()) <= 1


def test_boxes_are_of_all_sizes() -> None:
    pool = images(50)
    own = pool.batch(torch.arange(50, 100))[0][:, 0] == (torch.arange(50) + 1)[:, None, None]
    share = own.float().mean((1, 2))
    assert share.min() < 0.2
    assert share.max() > 0.8


def test_a_text_takes_runs_with_their_mask() -> None:
    pool = Mixed(Texts(), 8, "seed")
    for i in range(4, 32):
        batch = pool.batch(torch.tensor([i]))[0]
        tokens, mask = batch["input_ids"][0], batch["attention_mask"][0]
        assert torch.equal(tokens > 0, mask > 0)
        assert all(len(run.unique()) == 1 for run in tokens.split(RUN))


def test_a_mixture_is_the_same_in_any_batch() -> None:
    pool = Mixed(Texts(), 8, "seed")
    together = pool.batch(torch.arange(32))[0]["input_ids"]
    for i in range(32):
        alone = pool.batch(torch.tensor([i]))[0]["input_ids"][0]
        assert torch.equal(alone, together[i, : len(alone)])
        assert not together[i, len(alone) :].any()


def test_rows_of_numbers_are_summed() -> None:
    pool = Mixed(from_loader(DataLoader(TensorDataset(torch.tensor([[0.0, 0.0], [1.0, 2.0]])))), 5, "seed")
    rows = pool.batch(torch.arange(2, 10))[0]
    torch.testing.assert_close(rows[:, 1], 2 * rows[:, 0])
    assert len(rows[:, 0].unique()) > 3


def test_keyed_by_seed_and_task() -> None:
    x = torch.arange(8.0).reshape(8, 1).expand(8, 3)
    tasks = Tasks(None, {t: Task(from_loader(DataLoader(TensorDataset(x)))) for t in ("a", "b")})  # type: ignore[arg-type]
    read = {
        (task, seed): mixed(tasks, 40, seed=seed).split(task, "pool").batch(torch.arange(8, 16))[0]
        for task in ("a", "b")
        for seed in (0, 1)
    }
    assert torch.equal(read["a", 0], mixed(tasks, 40).split("a", "pool").batch(torch.arange(8, 16))[0])
    assert not torch.equal(read["a", 0], read["b", 0])
    assert not torch.equal(read["a", 0], read["a", 1])


def test_small_pools_grow_to_the_size_asked_for_and_no_further() -> None:
    pools = {"few": torch.ones(3, 2), "many": torch.ones(8, 2)}
    tasks = Tasks(None, {t: Task(DataLoader(TensorDataset(x))) for t, x in pools.items()})  # type: ignore[arg-type]
    for size, few, many in ((0, 3, 8), (12, 3, 8), (13, 15, 8), (32, 33, 8), (33, 33, 40)):
        found = mixed(tasks, size)
        assert [len(found.split(t, "pool")) for t in ("few", "many")] == [few, many]


def test_what_cannot_be_mixed_is_said() -> None:
    numbers = from_loader(DataLoader(TensorDataset(torch.arange(3))))
    with pytest.raises(DataError, match=r"only tensors \[n, ...\] can be mixed, the pool's inputs hold a tensor \[2\]"):
        Mixed(numbers, 2).batch(torch.tensor([3]))
    with pytest.raises(DataError, match="hold str"):
        Mixed(
            from_loader(DataLoader(["one", "two"], collate_fn=lambda items: ({"text": " ".join(items)}, None))), 2
        ).batch(  # type: ignore[arg-type]
            torch.tensor([2])
        )
    left = {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    with pytest.raises(DataError, match="padded on the left"):
        Mixed(from_loader(DataLoader([{k: v[i] for k, v in left.items()} for i in range(2)])), 2).batch(torch.arange(2))  # type: ignore[arg-type]
