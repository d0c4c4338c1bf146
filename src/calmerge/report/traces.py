"""What a fitted method recorded while it ran: the curves, masks and coefficients that the report draws.

A method writes plain JSON-able records; these types are their contract. Lists over updates start with the
first update.
"""

from collections.abc import Iterator
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """A part of `report.json`: unknown fields are refused; NaN and infinities are written as strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, ser_json_inf_nan="strings")


class Histogram(Record):
    """Counts of the positive values in logarithmic bins, and how many values were zero or negative.

    Values below `edges[0]` belong to the first bin, values of `edges[-1]` and above to the last.

    >>> Histogram(edges=[0.1, 1, 10], counts=[4, 2], non_positive=6).total
    12
    >>> list(Histogram(edges=[0.1, 1, 10], counts=[4, 2], non_positive=6).bins())
    [(0.1, 1.0, 4), (1.0, 10.0, 2)]
    """

    edges: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    counts: list[Count]
    non_positive: Count = 0

    @model_validator(mode="after")
    def _edges_enclose_bins(self) -> Self:
        if len(self.edges) != len(self.counts) + 1 or sorted(set(self.edges)) != self.edges:
            raise ValueError(f"{len(self.counts)} bins need {len(self.counts) + 1} rising edges, got {self.edges}")
        return self

    @property
    def total(self) -> int:
        """How many values were counted."""
        return sum(self.counts) + self.non_positive

    def bins(self) -> Iterator[tuple[float, float, int]]:
        """The bins as (lower edge, upper edge, count)."""
        return zip(self.edges, self.edges[1:], self.counts, strict=False)


class Density(Record):
    """The share of one tensor's entries that the final mask takes from the new expert.

    >>> Density(name="encoder.layer.0.fc.weight", share=0.0125, entries=4096).share
    0.0125
    """

    name: str
    share: Share
    entries: Count


class Coverage(Record):
    """Of the pool's examples that the expert assigns to one class, how many the sampler kept.

    >>> Coverage(kept=9, predicted=10).kept
    9
    """

    kept: Count
    predicted: Count


class CalmStage(Record):
    """One sequential stage of CALM: `task` joins the running merge against the loss of all tasks `seen`.

    Args:
        task: the expert added in this stage.
        seen: the tasks in the loss, in order, `task` last.
        lr: the step size used (with `lr: auto`, the one found).
        threshold: a constant F = -lr G d above it flips an entry within the planned updates (2.62 for 100).
        loss: per seen task, its loss at every update, at the soft mask.
        flips: entries whose rounded mask changed at every update.
        taken: share of the maskable entries which the rounded mask takes from the new expert.
        density: the same share per tensor, in the order of the model.
        histogram: distribution of F over the maskable entries, at the first update.
        entries: number of maskable entries.
    """

    task: str
    seen: list[str]
    lr: float
    threshold: float
    loss: dict[str, list[float]]
    flips: list[Count]
    taken: Share
    density: list[Density] = Field(default_factory=list)
    histogram: Histogram | None = None
    entries: Count


class CalmTrace(Record):
    """What CALM recorded: the tasks of its start, its stages, and per task and class what the sampler kept.

    >>> trace = CalmTrace(start=["a", "b"], samplers={"a": {"cat": Coverage(kept=9, predicted=10)}})
    >>> trace.samplers["a"]["cat"].kept
    9
    """

    kind: Literal["calm"] = "calm"
    start: list[str] = Field(default_factory=list)
    stages: list[CalmStage] = Field(default_factory=list)
    samplers: dict[str, dict[str, Coverage]] = Field(default_factory=dict)


class Coefficients(Record):
    """Learned coefficients: `values[i][j]` belongs to `tensors[i]` and `tasks[j]`; one row if task-wise.

    >>> Coefficients(tasks=["a", "b"], tensors=["all"], values=[[0.3, 0.5]]).values[0][1]
    0.5
    """

    tasks: list[str]
    tensors: list[str]
    values: list[list[float]]

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        if len(self.values) != len(self.tensors) or any(len(row) != len(self.tasks) for row in self.values):
            raise ValueError(
                f"coefficients must be {len(self.tensors)} rows (tensors) of {len(self.tasks)} values (tasks)"
            )
        return self


class FitTrace(Record):
    """What a method fitted by gradient recorded: its loss at every step (and on held-out examples, each time these
    were looked at), the coefficients it learned, and single numbers by what they are.

    >>> FitTrace(loss=[2.0, 1.5]).loss[-1]
    1.5
    """

    kind: Literal["fit"] = "fit"
    loss: list[float]
    held_out: list[float] = Field(default_factory=list)
    numbers: dict[str, float] = Field(default_factory=dict)
    per_task: dict[str, list[float]] | None = None
    coefficients: Coefficients | None = None


class Tried(Record):
    """One trial of a search; no scores where they could not be told."""

    values: dict[str, bool | int | float | str]
    scores: list[float] | None


class SearchTrace(Record):
    """What a search tried, in turn, and which trial was taken.

    >>> tried = Tried(values={"ties.keep": 0.2}, scores=[-0.1])
    >>> SearchTrace(score="expert_kl", strategy="tpe", trials=[tried], best=0).labelled
    False
    """

    kind: Literal["search"] = "search"
    score: str
    labelled: bool = False
    strategy: str
    trials: list[Tried]
    best: Count


class FrontPoint(Record):
    """One merge of a front: its coefficients and predicted metrics, in the order of the tasks."""

    coefficients: list[float]
    predicted: list[float]


class FrontTrace(Record):
    """A front of trade-offs among tasks, the point taken, and what was measured there.

    >>> point = FrontPoint(coefficients=[1.0], predicted=[0.9])
    >>> FrontTrace(tasks=["a"], points=[point], chosen=0, measured=[0.88]).labelled
    False
    """

    kind: Literal["front"] = "front"
    tasks: list[str]
    labelled: bool = False
    points: list[FrontPoint]
    chosen: Count
    measured: list[float]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of a table: the merge that was taken, predicted and measured, and the best one of each task.

        >>> points = [FrontPoint(coefficients=[1.0, 0.0], predicted=[0.9, 0.2])]
        >>> FrontTrace(tasks=["a", "b"], labelled=True, points=points, chosen=0, measured=[0.8, 0.3]).table()[1][:2]
        [['taken', '0.9000', '0.2000'], ['  measured', '0.8000', '0.3000']]
        """
        best = max if self.labelled else min
        taken = self.points[self.chosen]
        shown = [("taken", taken.predicted), ("  measured", self.measured), ("  coefficients", taken.coefficients)]
        for i, task in enumerate(self.tasks):
            shown.append((f"best for {task}", best((p.predicted for p in self.points), key=lambda m, i=i: m[i])))  # type: ignore[misc]
        metric = "accuracy" if self.labelled else "divergence"
        head = [f"{metric} of {len(self.points)} merges", *self.tasks]
        return head, [[who, *(f"{value:.4f}" for value in values)] for who, values in shown]


Trace = Annotated[CalmTrace | FitTrace | SearchTrace | FrontTrace, Field(discriminator="kind")]
