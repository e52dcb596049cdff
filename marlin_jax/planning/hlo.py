"""What a compiled program moves, read from its HLO text."""

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
# With its layout, which says where in the chip it is: S(1) is not its HBM.
_PLACED = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_ELSEWHERE = re.compile(r"S\([1-9]")
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
      inner = times * _trips(line, computations)
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


def memory_bytes(text: str) -> int:
  """Bytes that a compiled program reads from and writes to a chip's memory.

  What each operation takes and gives, as often as it runs; of an array that it
  cuts a slice from or writes one into, the slice alone. Buffers that the
  compiler keeps in the chip's own fast memory do not count.

  Args:
    text: as for `collectives`.
  """
  computations, entry = _computations(text)

  def visit(name: str) -> int:
    lines = computations.get(name, ())
    made = {one.name: one for one in map(_instruction, lines) if one}
    total = 0
    for one in made.values():
      if one.op in ("while", "conditional", "call"):
        inner = sum(visit(name) for name in _callees(one.line))
        total += inner * _trips(one.line, computations)
      elif one.op not in _MOVES_NOTHING and not _NAMES_MEMORY.search(one.line):
        inside = _inside(one, computations)
        total += _taken(one, made, computations) + _given(one, made, inside)
    return total

  return visit(entry)


# Names for what is there; ends of what has been counted at its start.
_MOVES_NOTHING = (
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota"),
  *("partition-id", "replica-id", "after-all", "opt-barrier"),
  *("copy-done", "slice-done", "async-done", "async-update"),
  *("send-done", "recv-done"),
  *(f"{kind}-done" for kind in KINDS),
)
_NAMES_MEMORY = re.compile(
  r'custom_call_target="(AllocateBuffer|ConcatBitcast)"'
)
_INSTRUCTION = re.compile(
  r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<op>[a-z][a-z\-]*)"
  r"\((?P<operands>[^)]*)\)"
)


class _Instruction(NamedTuple):
  name: str
  type: str
  op: str
  operands: list[str]
  line: str


def _instruction(line: str) -> _Instruction | None:
  match = _INSTRUCTION.match(line)
  if not match:
    return None
  operands = re.findall(r"%([\w.\-]+)", match["operands"])
  return _Instruction(match["name"], match["type"], match["op"], operands, line)


def _inside(one: _Instruction, computations) -> list[_Instruction]:
  """What a fusion computes; nothing for all others."""
  called = _CALLS.search(one.line) if one.op == "fusion" else None
  lines = computations.get(called[1], ()) if called else ()
  return [inner for inner in map(_instruction, lines) if inner]


def _taken(one: _Instruction, made, computations) -> int:
  """Bytes that an operation reads."""
  if one.op == "slice-start":
    return _num_bytes(_slice_of(one)[:2])
  return sum(
    min(_stored(made[name].type), _needed(i, one, computations))
    for i, name in enumerate(one.operands)
    if name in made
  )


def _needed(i: int, user: _Instruction, computations) -> float:
  """Bytes that an operation wants of its operand number i."""
  if user.op in ("dynamic-slice", "gather", "slice") and i == 0:
    return _size(user.type)
  if user.op == "dynamic-update-slice" and i == 0:
    return 0
  inside = _inside(user, computations)
  names = [x.name for x in inside if f" parameter({i})" in x.line]
  if not names:
    return math.inf
  total = 0
  for x in inside:  # in order: what is made comes before what uses it
    for j, name in enumerate(x.operands):
      if name not in names:
        continue
      if x.op == "bitcast":
        names.append(x.name)
      else:
        total += _needed(j, x, computations)
  return total


def _slice_of(start: _Instruction) -> tuple[str, str, str]:
  """What a slice-start fetches; it shows first what it is a slice of."""
  return _PLACED.findall(start.type)[1]


def _given(one: _Instruction, made, inside) -> int:
  """Bytes that an operation writes."""
  if one.op == "copy-start":  # it shows both ends
    return _stored(_PLACED.search(one.type)[0])
  if one.op == "slice-start":
    dtype, dims, layout = _slice_of(one)
    return _stored(f"{dtype}[{dims}]{layout}")
  written = _stored(one.type)
  types = {x.name: x.type for x in inside or made.values()}
  for inner in inside or [one]:
    if inner.op == "dynamic-update-slice":
      part = _size(types[inner.operands[1]])
      written -= max(min(written, _size(inner.type)) - part, 0)
  return written


def _stored(type_: str) -> int:
  """Bytes of a result that lie in the chip's main memory."""
  return sum(
    _num_bytes((dtype, dims))
    for dtype, dims, layout in _PLACED.findall(type_)
    if not _ELSEWHERE.search(layout)
  )


def _size(type_: str) -> int:
  return sum(map(_num_bytes, _SHAPE.findall(type_)))


def _trips(line: str, computations: dict[str, list[str]]) -> int:
  """How often what a line calls runs: 1 but for loops of known length."""
  if " while(" not in line:
    return 1
  trips = _TRIPS.search(line)
  if trips:
    return int(trips[1])
  # The TPU compiler does not tell; its loops count up to a constant.
  condition = re.search(r"condition=%?([\w.\-]+)", line)
  text = "\n".join(computations.get(condition[1], ())) if condition else ""
  last = re.search(r"compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", text)
  limit = last and re.search(
    rf"%?{re.escape(last[1])} = [su]32\[\]\S* constant\((\d+)\)", text
  )
  return int(limit[1]) if limit else 1


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
