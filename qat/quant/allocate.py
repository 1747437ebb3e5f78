"""Allocation: a format for every tensor, of least cost within a number of bytes.

    min sum_t cost[t, f(t)]    subject to    sum_t num_bytes[t, f(t)] <= budget

With a price per byte in the place of the budget, each tensor takes a point of the lower convex hull
of its own (bytes, cost) points. As the price falls, tensors step along their hulls one at a time:
one sort of all steps by what they save per byte gives the whole frontier. What a budget leaves
unused after its last step is spent by single changes, and by pairs of a saving and a spending one.

Source: Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers".
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MAX_REPAIRS = 1000  # changes after the last step of the frontier; a few dozen are usual


class Choice(NamedTuple):
    """One format that a tensor may take."""

    spec: str
    """Name of the format."""
    num_bytes: int
    """That a file holds for the tensor."""
    cost: float
    """What it adds to the distance from the teacher, in nats."""


Table = Mapping[str, Sequence[Choice]]


@dataclass(frozen=True, slots=True)
class Allocation:
    """A format for every tensor."""

    choices: Mapping[str, Choice]
    """By tensor."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(choice.num_bytes for choice in self.choices.values())

    @property
    def cost(self) -> float:
        """Predicted distance from the teacher, in nats."""
        return sum(choice.cost for choice in self.choices.values())

    def with_choice(self, name: str, choice: Choice) -> "Allocation":
        """Return the allocation with another format for one tensor."""
        return Allocation({**self.choices, name: choice})


class Step(NamedTuple):
    """A tensor's move to the next point of its hull."""

    name: str
    choice: Choice
    saved_per_byte: float


def lower_hull(choices: Sequence[Choice]) -> list[Choice]:
    """Return the choices on the lower convex hull, bytes rising and cost falling."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.num_bytes, c.cost)):
        if hull and choice.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and slope(hull[-2], choice) >= slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def slope(left: Choice, right: Choice) -> float:
    """Return the cost that each byte more saves."""
    return (left.cost - right.cost) / max(right.num_bytes - left.num_bytes, 1)


def smallest(table: Table) -> Allocation:
    """Return the allocation of least bytes, the better of two formats of one size."""
    return Allocation({name: lower_hull(choices)[0] for name, choices in table.items()})


def steps(table: Table) -> list[Step]:
    """Return the moves of all tensors along their hulls, those that save most a byte first."""
    found = [
        Step(name, right, slope(left, right))
        for name, choices in table.items()
        for hull in [lower_hull(choices)]
        for left, right in zip(hull, hull[1:], strict=False)
    ]
    return sorted(found, key=lambda step: -step.saved_per_byte)  # stable: a hull's order stays


def frontier(table: Table) -> Iterator[Allocation]:
    """Yield the allocations that no other one of their bytes or fewer beats, bytes rising."""
    allocation = smallest(table)
    yield allocation
    for step in steps(table):
        allocation = allocation.with_choice(step.name, step.choice)
        yield allocation


def allocate(table: Table, budget_bytes: int) -> Allocation:
    """Return the allocation of least cost within a number of bytes.

    Args:
        table: The formats that each tensor may take.
        budget_bytes: Of all tensors together.

    Raises:
        ValueError: If the smallest formats are larger; says how large they are.
    """
    start = smallest(table)
    if start.num_bytes > budget_bytes:
        raise ValueError(
            f"{budget_bytes:,} bytes are fewer than the smallest formats take, "
            f"{start.num_bytes:,}; give more"
        )
    chosen, left = dict(start.choices), budget_bytes - start.num_bytes
    stuck = set()  # tensors whose next step did not fit: later ones of their hull start there
    for step in steps(table):
        extra = step.choice.num_bytes - chosen[step.name].num_bytes
        if step.name in stuck or extra > left:
            stuck.add(step.name)
            continue
        chosen[step.name], left = step.choice, left - extra
    return repair(table, Allocation(chosen), budget_bytes)


def repair(table: Table, allocation: Allocation, budget_bytes: int) -> Allocation:
    """Return an allocation after the single changes and pairs that lower its cost and fit."""
    moves = Moves.of(table)
    chosen = moves.rows_of(allocation)
    left = budget_bytes - allocation.num_bytes
    for _ in range(MAX_REPAIRS):
        extra = moves.num_bytes - moves.num_bytes[chosen][moves.tensor]
        change = moves.cost - moves.cost[chosen][moves.tensor]
        best = moves.best_single(extra, change, left) or moves.best_pair(extra, change, left)
        if not best:
            break
        for row in best:
            chosen[moves.tensor[row]] = row
            left -= int(extra[row])
    return moves.allocation(chosen)


@dataclass(frozen=True, slots=True)
class Moves:
    """All choices of all tensors as rows, for repairs."""

    names: list[str]
    choices: list[Choice]
    tensor: Tensor
    """The tensor of each row, (M,)."""
    num_bytes: Tensor
    """(M,) int64."""
    cost: Tensor
    """(M,) float64: costs differ by factors of a million."""

    @classmethod
    def of(cls, table: Table) -> "Moves":
        """Return the rows of a table."""
        names = list(table)
        choices = [choice for name in names for choice in table[name]]
        counts = torch.tensor([len(table[name]) for name in names])
        return cls(
            names=names,
            choices=choices,
            tensor=torch.arange(len(names)).repeat_interleave(counts),
            num_bytes=torch.tensor([choice.num_bytes for choice in choices]),
            cost=torch.tensor([choice.cost for choice in choices], dtype=torch.float64),
        )

    def rows_of(self, allocation: Allocation) -> Tensor:
        """Return the row of each tensor's choice."""
        found = {
            (index, choice): row
            for row, (index, choice) in enumerate(
                zip(self.tensor.tolist(), self.choices, strict=True)
            )
        }
        return torch.tensor(
            [found[index, allocation.choices[name]] for index, name in enumerate(self.names)]
        )

    def allocation(self, chosen: Tensor) -> Allocation:
        """Return the allocation of each tensor's row."""
        rows = zip(self.names, chosen.tolist(), strict=True)
        return Allocation({name: self.choices[row] for name, row in rows})

    def best_single(self, extra: Tensor, change: Tensor, left: int) -> tuple[int, ...]:
        """Return the row that lowers the cost most and fits, if there is one."""
        gain = torch.where(extra <= left, change, 0.0)
        row = int(gain.argmin())
        return (row,) if gain[row] < 0 else ()

    def best_pair(self, extra: Tensor, change: Tensor, left: int) -> tuple[int, ...]:
        """Return a saving and a spending row that together lower the cost most and fit."""
        savers = (extra < 0).nonzero().squeeze(1)
        spenders = ((change < 0) & (extra > left)).nonzero().squeeze(1)
        if not len(savers) or not len(spenders):
            return ()
        total = change[savers].unsqueeze(1) + change[spenders]  # (S, P)
        fits = extra[savers].unsqueeze(1) + extra[spenders] <= left
        fits &= self.tensor[savers].unsqueeze(1) != self.tensor[spenders]
        total = torch.where(fits, total, 0.0)
        place = int(total.argmin())
        if total.view(-1)[place] >= 0:
            return ()
        return int(savers[place // len(spenders)]), int(spenders[place % len(spenders)])
