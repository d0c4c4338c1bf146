"""What every doctest may use without importing it."""

import pytest
import torch

import calmerge


@pytest.fixture(autouse=True)
def _names(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(torch=torch, calmerge=calmerge, task_vectors=calmerge.task_vectors)
