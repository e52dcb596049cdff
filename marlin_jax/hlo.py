"""What a compiled program sends between devices, read from its HLO text."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "reduce-scatter",
)

_ITEM_BYTES = {"pred": 1, "bf16": 2, "token": 0}
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(
  rf"= (?P<type>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\("
)
_CALLS = re.compile(
  r"(?:body|condition|to_apply|calls|true_computation|false_computation)="
  r"%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count[\\"]*:\{[\\"]*n[\\"]*:[\\"]*(\d+)')


class Collective(NamedTuple):
  """One operation, as often as it runs.

  Attributes:
    kind: one of KINDS.
    num_bytes: size of what is exchanged: of the whole that an all-gather makes
      or a reduce-scatter takes, of the array that an all-reduce sums. A ring
      of n devices moves (n - 1) / n of it through each, an all-reduce twice.
    group_size: devices that take part in one exchange.
    times: how often it runs, for loops of known length; in others counts once.
  """

  kind: str
  num_bytes: int
  group_size: int
  times: int


def collectives(text: str, num_devices: int) -> list[Collective]:
  """Lists the collective operations of a compiled program.

  Args:
    text: `jax.jit(...).lower(...).compile().as_text()`.
    num_devices: that it is compiled for.

  Returns:
    Those that exchange anything: groups of one are left out.
  """
  computations, entry = _computations(text)
  found = []
  seen = set()

  def visit(name: str, times: int) -> None:
    for line in computations.get(name, ()):
      match = _COLLECTIVE.search(line)
      if match:
        one = _read(match, line, num_devices, name)
        # The TPU compiler spreads one operation over several computations,
        # all of which show it, with results in other kinds of memory.
        channel = re.search(r"channel_id=(\d+)", line)
        shapes = tuple(_SHAPE.findall(match["type"]))
        twin = channel and (channel[1], one.kind, shapes)
        if one.group_size > 1 and (not twin or twin not in seen):
          found.append(one._replace(times=times))
        seen.add(twin)
        continue
      trips = _TRIPS.search(line)
      inner = times * int(trips[1]) if trips and " while(" in line else times
      for callee in _callees(line):
        visit(callee, inner)

  visit(entry, 1)
  return found


def total_bytes(found: list[Collective]) -> dict[str, int]:
  """Bytes exchanged in one run of the program, by kind."""
  totals = collections.Counter()
  for one in found:
    totals[one.kind] += one.num_bytes * one.times
  return dict(totals)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Lines of each computation by its name, and the name of the first to run."""
  computations, entry, lines = {}, "", []
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      lines = computations.setdefault(head[1], [])
      if line.startswith("ENTRY"):
        entry = head[1]
    elif line.startswith("}"):
      lines = []
    else:
      lines.append(line)
  return computations, entry


def _callees(line: str) -> Iterator[str]:
  yield from _CALLS.findall(line)
  for names in _BRANCHES.findall(line):
    yield from (name.strip().lstrip("%") for name in names.split(","))


def _read(match, line: str, num_devices: int, computation: str) -> Collective:
  kind, group = match["kind"], _group_size(line, num_devices)
  size = sum(map(_num_bytes, _SHAPE.findall(match["type"])))
  if kind == "reduce-scatter":
    size *= group
  if match["start"]:
    # The start of an asynchronous one shows what goes in beside what comes out.
    if kind == "all-gather":
      size = size * group // (group + 1)
    elif kind == "reduce-scatter":
      size = size // (group + 1)
    elif kind in ("all-to-all", "collective-permute"):
      size = size // 2
  if computation.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"  # how the TPU compiler writes it
  return Collective(kind, size, group, 1)


def _num_bytes(shape: tuple[str, str]) -> int:
  dtype, dims = shape
  bits = re.search(r"\d+", dtype)
  item = _ITEM_BYTES.get(dtype, max(int(bits[0]) // 8, 1) if bits else 0)
  return item * math.prod(int(d) for d in dims.split(",") if d)


def _group_size(line: str, num_devices: int) -> int:
  pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)", line)
  if pairs:
    return num_devices if pairs[1] != pairs[2] else 1
  lists = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
  if lists:
    return len(lists[1].split(","))
  iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
  if iota:
    return int(iota[1])
  mesh = re.search(r"replica_groups=mesh\[([^\]]*)\].*?\{([^}]*)\}", line)
  if mesh:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    # An axis, or a part of one: 'axis_0' or 'axis_0':(2)4.
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  return num_devices
