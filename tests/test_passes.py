"""Threads that work on blocks."""

import gc
from collections.abc import Iterator

import pytest
import torch

from calmerge._passes import workers


@pytest.fixture
def two() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two")
def test_threads_that_are_opened_meanwhile_leave_the_others_with_one_torch_thread() -> None:
    with workers(1) as outer:
        outer.submit(int).result()
        with workers(2) as inner:
            assert list(inner.map(lambda _: torch.get_num_threads(), range(2))) == [1, 1]
        assert torch.get_num_threads() == 1
        assert "mkl_get_max_threads() : 2" not in torch.__config__.parallel_info()
        assert outer.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 2


def test_garbage_is_collected_as_before_when_the_last_pool_is_closed() -> None:
    before = gc.get_threshold()
    first, second = workers(1), workers(1)
    first.__enter__()
    second.__enter__()
    assert gc.get_threshold()[:2] == before[:2]
    assert gc.get_threshold()[2] == 2**30
    first.__exit__(None, None, None)  # before the one that was opened later
    assert gc.get_threshold()[2] == 2**30
    second.__exit__(None, None, None)
    assert gc.get_threshold() == before
