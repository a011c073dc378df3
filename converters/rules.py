"""Rule tables: how external tensors and our parameters correspond, in both directions.

A table is checked as a whole before a byte is moved, and every offender is reported at once:
a weight file that loads without error and does nothing is the failure this module exists for.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]
FULL = slice(None)


class WeightsError(ValueError):
    """Weights that do not fit; lists every offender.

    Attributes:
      what: what was being read or written.
      problems: one line per offender, with names, shapes and what to do.
    """

    SHOWN = 40

    def __init__(self, what: str, problems: Iterable[str]):
        self.what, self.problems = what, tuple(problems)
        shown = [f"  {p}" for p in self.problems[: self.SHOWN]]
        rest = len(self.problems) - len(shown)
        if rest > 0:
            shown.append(f"  ... and {rest} more (all in .problems)")
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n".join([f"{what}: {count}, nothing was loaded or written", *shown]))


@dataclasses.dataclass(frozen=True)
class Op:
    """A named, invertible array operation.

    Attributes:
      name: shown in messages.
      forward: external piece -> our piece.
      inverse: our piece -> external piece.
    """

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]


def transpose(*axes: int) -> Op:
    """External axes in the order of ours: our axis k is the external axis `axes[k]`."""
    back = tuple(int(a) for a in np.argsort(axes))
    return Op(f"transpose{axes}", lambda x: x.transpose(axes), lambda x: x.transpose(back))


def reshape(external: Shape, ours: Shape) -> Op:
    """A piece of shape `external` seen as shape `ours`."""
    return Op(
        f"reshape{external}->{ours}", lambda x: x.reshape(ours), lambda x: x.reshape(external)
    )


def swap_halves(axis: int = 0) -> Op:
    """First and second half of an axis exchanged: diffusers and BFL order shift and scale so."""

    def swap(x):
        first, second = np.split(x, 2, axis)
        return np.concatenate([second, first], axis)

    return Op(f"swap_halves({axis})", swap, swap)


ID = Op("id", lambda x: x, lambda x: x)
T = transpose(1, 0)
"""Linear layers: (out, in) of PyTorch, (in, out) here."""
CONV = transpose(2, 3, 1, 0)
"""Convolutions: OIHW of PyTorch, HWIO here."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Where one piece of an external tensor lies in our parameters.

    Attributes:
      path: our path; may hold placeholders such as `{i}`.
      at: index into our array: integers, `slice(None)` or placeholder names such as "i".
      ops: applied in order to the external piece, giving `ours[path][at]`.
    """

    path: str
    at: tuple[int | slice | str, ...] = ()
    ops: tuple[Op, ...] = ()

    def concrete(self, values: Mapping[str, int]) -> "Part":
        """This part with the placeholders filled in."""
        at = tuple(values[a] if isinstance(a, str) else a for a in self.at)
        return Part(self.path.format(**values), at, self.ops)

    def forward(self, piece: np.ndarray) -> np.ndarray:
        """External piece -> our piece."""
        for op in self.ops:
            piece = op.forward(piece)
        return piece

    def inverse(self, piece: np.ndarray) -> np.ndarray:
        """Our piece -> external piece."""
        for op in reversed(self.ops):
            piece = op.inverse(piece)
        return piece

    def __str__(self):
        index = ",".join(":" if isinstance(a, slice) else str(a) for a in self.at)
        return f"{self.path}[{index}]" if index else self.path


@dataclasses.dataclass(frozen=True)
class Rule:
    """One external tensor, or a family of them numbered by placeholders.

    Attributes:
      name: external name, with placeholders such as `{i}`.
      parts: where its pieces go.
      split: `(axis, sizes)` that cuts the external tensor into `len(parts)` pieces.
      indices: the values of every placeholder.
    """

    name: str
    parts: tuple[Part, ...]
    split: tuple[int, tuple[int, ...]] | None = None
    indices: Mapping[str, Iterable[int]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        pieces = 1 if self.split is None else len(self.split[1])
        if pieces != len(self.parts):
            raise ValueError(f"rule {self.name}: {pieces} pieces but {len(self.parts)} parts")


def rule(
    name: str, path: str, *ops: Op, at: tuple[int | slice | str, ...] = (), **indices: Iterable[int]
) -> Rule:
    """The rule of an external tensor that is one piece of one of our arrays."""
    return Rule(name, (Part(path, at, ops),), indices=indices)


@dataclasses.dataclass(frozen=True)
class Table:
    """All tensors of a format.

    Attributes:
      name: of the format, for messages.
      rules: one external tensor belongs to exactly one of them.
      ignore: regular expressions of external names that are known and left out on import. What
        they match is reported, not silent.
    """

    name: str
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()

    def ignores(self, name: str) -> bool:
        """Whether an external name is left out on purpose."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignore)


class Entry(NamedTuple):
    """One concrete external tensor: its name, its shape, and where its pieces go."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]
    split: tuple[int, tuple[int, ...]] | None

    def pieces(self, tensor: np.ndarray) -> list[tuple[Part, np.ndarray]]:
        """What goes where: (part, value of `ours[part.path][part.at]`)."""
        if self.split is None:
            return [(self.parts[0], self.parts[0].forward(tensor))]
        axis, sizes = self.split
        cuts = np.split(tensor, np.cumsum(sizes)[:-1], axis)
        return [(p, p.forward(c)) for p, c in zip(self.parts, cuts, strict=True)]

    def assemble(self, read: Callable[[Part], np.ndarray]) -> np.ndarray:
        """The external tensor from our pieces; inverse of `pieces`."""
        pieces = [p.inverse(read(p)) for p in self.parts]
        return pieces[0] if self.split is None else np.concatenate(pieces, self.split[0])


class Plan(NamedTuple):
    """A table matched with our shapes.

    Attributes:
      entries: external name -> its tensor.
      ignored: external names present in the source and left out on purpose.
    """

    entries: dict[str, Entry]
    ignored: tuple[str, ...] = ()

    def by_path(self) -> dict[str, list[Entry]]:
        """Our path -> the external tensors that fill it."""
        out: dict[str, list[Entry]] = {}
        for entry in self.entries.values():
            for path in dict.fromkeys(p.path for p in entry.parts):
                out.setdefault(path, []).append(entry)
        return out


def expand(table: Table) -> dict[str, tuple[Rule, tuple[Part, ...]]]:
    """External name -> its rule and concrete parts.

    Raises:
      WeightsError: two rules give the same external name.
    """
    out: dict[str, tuple[Rule, tuple[Part, ...]]] = {}
    problems = []
    for r in table.rules:
        keys = list(r.indices)
        for combination in itertools.product(*r.indices.values()):
            values = dict(zip(keys, combination, strict=True))
            name = r.name.format(**values)
            if name in out:
                problems.append(
                    f"ambiguous: {name} is given by rules {out[name][0].name!r} and {r.name!r}; "
                    "keep one of them"
                )
                continue
            out[name] = r, tuple(p.concrete(values) for p in r.parts)
    if problems:
        raise WeightsError(f"table {table.name}", problems)
    return out


def plan(
    table: Table, ours: Mapping[str, Shape], external: Mapping[str, Shape] | None = None
) -> Plan:
    """Matches a table with our shapes and, for an import, with the shapes of a source.

    Args:
      table: the format.
      ours: our path -> shape, complete.
      external: external name -> shape of what a source holds; None for an export.

    Raises:
      WeightsError: any name unknown, missing, mis-shaped, doubly filled or ambiguous.
    """
    entries: dict[str, Entry] = {}
    problems: list[str] = []
    filled: dict[str, list[Part]] = {path: [] for path in ours}
    concrete = expand(table)
    for name, (r, parts) in concrete.items():
        pieces = []
        for part in parts:
            if part.path not in ours:
                problems.append(
                    f"not ours: {name} goes to {part}, which the model lacks; "
                    "is the configuration that of this model?"
                )
                continue
            try:
                dummy = np.broadcast_to(np.int8(0), ours[part.path])[part.at]
                pieces.append(part.inverse(dummy).shape)
            except (IndexError, ValueError) as e:
                problems.append(f"mis-shaped: {name} goes to {part} of {ours[part.path]}: {e}")
                continue
            filled[part.path].append(part)
        if len(pieces) == len(parts):
            entries[name] = Entry(name, _joined(name, r, pieces, problems), parts, r.split)
    for path, shape in ours.items():
        problems += _coverage(path, shape, filled[path], table.name)
    ignored: tuple[str, ...] = ()
    if external is not None:
        found, ignored = _compare(table, concrete, entries, external)
        problems += found
    if problems:
        raise WeightsError(f"{table.name} weights", problems)
    return Plan(entries, ignored)


def _joined(name: str, r: Rule, pieces: list[Shape], problems: list[str]) -> Shape:
    if r.split is None:
        return pieces[0]
    axis, sizes = r.split
    rest = {p[:axis] + p[axis + 1 :] for p in pieces}
    if len(rest) > 1 or tuple(p[axis] for p in pieces) != tuple(sizes):
        problems.append(
            f"mis-shaped: {name} is cut into {sizes} along axis {axis}, ours are {pieces}"
        )
    return (*pieces[0][:axis], sum(sizes), *pieces[0][axis + 1 :])


def _coverage(path: str, shape: Shape, parts: list[Part], table: str) -> list[str]:
    """Every element of our array must be filled exactly once."""
    if not parts:
        return [f"unfilled: {path} {shape} has no rule in table {table}; add one"]
    indexed = [any(d < len(p.at) and p.at[d] != FULL for p in parts) for d in range(len(shape))]
    count = np.zeros([n if i else 1 for n, i in zip(shape, indexed, strict=True)], np.int32)
    for part in parts:
        count[part.at] += 1
    problems = []
    for what, where in (("unfilled", count == 0), ("doubly filled", count > 1)):
        if where.any():
            first = ",".join(
                str(k) if i else ":" for k, i in zip(np.argwhere(where)[0], indexed, strict=True)
            )
            problems.append(
                f"{what}: {path} {shape} at [{first}] ({int(where.sum())} of {where.size} slots); "
                f"check the indices in table {table}"
            )
    return problems


def _compare(
    table: Table,
    concrete: Mapping[str, object],
    entries: Mapping[str, Entry],
    external: Mapping[str, Shape],
) -> tuple[list[str], tuple[str, ...]]:
    problems, ignored = [], []
    for name, shape in external.items():
        if name not in concrete:
            if table.ignores(name):
                ignored.append(name)
            else:
                problems.append(
                    f"unknown: {name} {tuple(shape)} is not a tensor of {table.name}; "
                    "is this the right format and size?"
                )
        elif name in entries and tuple(shape) != entries[name].shape:
            where = ", ".join(map(str, entries[name].parts))
            problems.append(
                f"mis-shaped: {name} is {tuple(shape)}, expected {entries[name].shape} for {where}"
            )
    for name, entry in entries.items():
        if name not in external:
            where = ", ".join(map(str, entry.parts))
            problems.append(
                f"missing: {name} {entry.shape} for {where}; is the file complete "
                "(all shards there) and the configuration right?"
            )
    if external and not ignored and not set(external) & set(entries):
        problems.insert(0, f"no tensor at all is one of {table.name}: this is another format")
    return problems, tuple(ignored)
