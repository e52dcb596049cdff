"""Bytes that a compiled program moves, read from its HLO text.

`compiled.cost_analysis()` gives no collectives, and its 'bytes accessed' of a
TPU program includes traffic within the chip's own fast memory: for a step of a
small network on v5e it is ten times the traffic to and from HBM.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "reduce-scatter",
)

_ITEM_BYTES = {"pred": 1, "bf16": 2, "token": 0}
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
# A shape with its layout, which names the memory space: S(1) is not HBM.
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
_FUSED_ATTENTION = re.compile(
  r"__cudnn\$fmha\w+|%splash_mha_(?:fwd|dkv)(?=.* custom-call\()"
)
# TPU slices all-reduce through their hosts.
_TO_SLICES = re.compile(r" send\(.*_xla_megascale_transfer_type=")
_REMATERIALISED = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]*\.remat\b")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count[\\"]*:\{[\\"]*n[\\"]*:[\\"]*(\d+)')


class Collective(NamedTuple):
  """A collective operation of a program.

  Attributes:
    kind: one of KINDS.
    num_bytes: size of the array that is exchanged: the result of an all-gather,
      the operand of a reduce-scatter or an all-reduce. In a ring of n devices
      (n - 1) / n of it passes each device, twice for an all-reduce.
    group_size: devices in a group.
    times: executions per step; a loop of unknown length counts as one
      iteration.
    num_nodes: machines to which the devices of a group belong.
  """

  kind: str
  num_bytes: int
  group_size: int
  times: int
  num_nodes: int = 1


def collectives(
  text: str, num_devices: int, per_node: int | None = None
) -> list[Collective]:
  """Lists the collective operations of a compiled program.

  Args:
    text: `jax.jit(...).lower(...).compile().as_text()`.
    num_devices: devices that the program is compiled for.
    per_node: devices of each machine, which have consecutive numbers; None: all
      are connected alike.

  Returns:
    The operations with groups of more than one device.
  """
  computations, entry = _computations(text)
  operations = []
  seen = set()
  for line, times, computation in _executed(computations, entry):
    match = _COLLECTIVE.search(line)
    if not match:
      continue
    operation = _collective(match, line, num_devices, computation)
    # The TPU compiler spreads an operation over several computations, a chain,
    # all of which contain it, with results in different memory spaces. Blocks
    # of equal shapes share a channel.
    chain = _CHAIN.search(line)
    shapes = tuple(_SHAPE.findall(match["type"]))
    key = chain and (chain[1], operation.kind, shapes)
    if operation.group_size > 1 and (not key or key not in seen):
      group = _first_group(line, num_devices)
      nodes = {device // (per_node or num_devices) for device in group}
      operations.append(operation._replace(times=times, num_nodes=len(nodes)))
    seen.add(key)
  return operations


def fused_attention(text: str) -> dict[str, int]:
  """Counts the calls of cuDNN's or Pallas' fused attention in one step.

  Args:
    text: see `collectives`.

  Returns:
    Calls by 'forward' and 'backward'. Blocks that are recomputed are called
    forward again.
  """
  counts = {"forward": 0, "backward": 0}
  for line, times, _ in _executed(*_computations(text)):
    if call := _FUSED_ATTENTION.search(line):
      is_backward = call[0].endswith(("Backward", "dkv"))
      counts["backward" if is_backward else "forward"] += times
  return counts


def rematerialised(text: str) -> int:
  """Counts the operations that the compiler added to save memory.

  It computes values again, instead of keeping them, if the program would not
  fit otherwise. `config.remat` is no such operation.

  Args:
    text: see `collectives`.
  """
  return sum(
    times
    for line, times, computation in _executed(*_computations(text))
    if _REMATERIALISED.match(line) and "fused" not in computation
  )


def _executed(
  computations: dict[str, list[str]], entry: str
) -> Iterator[tuple[str, int, str]]:
  """Yields each line that runs, how often, and its computation's name."""

  def visit(name: str, times: int) -> Iterator[tuple[str, int, str]]:
    for line in computations.get(name, ()):
      yield line, times, name
      if _COLLECTIVE.search(line):
        continue
      inner = times * _trips(line, computations)
      for callee in _callees(line):
        yield from visit(callee, inner)

  return visit(entry, 1)


def total_bytes(operations: list[Collective]) -> dict[str, int]:
  """Returns the bytes exchanged in one run of the program, by kind."""
  totals = collections.Counter()
  for operation in operations:
    totals[operation.kind] += operation.num_bytes * operation.times
  return dict(totals)


def bytes_to_slices(text: str) -> int:
  """Returns the bytes of a device that are summed over the TPU slices.

  Args:
    text: see `collectives`.
  """
  return sum(
    times * _num_bytes(_SHAPE.search(line).groups())
    for line, times, _ in _executed(*_computations(text))
    if _TO_SLICES.search(line)
  )


def memory_bytes(text: str) -> int:
  """Returns the bytes that a program reads from and writes to a chip's HBM.

  Counts operands and results of each operation, as often as it runs. If an
  operation reads or updates a slice of an array, only the slice counts. Buffers
  in the chip's own fast memory do not count.

  Args:
    text: see `collectives`.
  """
  computations, entry = _computations(text)

  def visit(name: str) -> int:
    lines = computations.get(name, ())
    by_name = {x.name: x for x in map(_instruction, lines) if x}
    total = 0
    for x in by_name.values():
      if x.op in ("while", "conditional", "call"):
        inner = sum(visit(name) for name in _callees(x.line))
        total += inner * _trips(x.line, computations)
      elif x.op not in _MOVES_NOTHING and not _ALLOCATES.search(x.line):
        body = _fusion_body(x, computations)
        total += _bytes_read(x, by_name, computations)
        total += _bytes_written(x, by_name, body)
    return total

  return visit(entry)


# Operations that name existing memory, and the ends of asynchronous operations,
# which count at their start.
_MOVES_NOTHING = (
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota"),
  *("partition-id", "replica-id", "after-all", "opt-barrier"),
  *("copy-done", "slice-done", "async-done", "async-update"),
  *("send-done", "recv-done"),
  *(f"{kind}-done" for kind in KINDS),
)
_ALLOCATES = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')
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


def _fusion_body(instruction: _Instruction, computations) -> list[_Instruction]:
  """Returns the instructions inside a fusion; [] for any other operation."""
  if instruction.op != "fusion":
    return []
  called = _CALLS.search(instruction.line)
  lines = computations.get(called[1], ()) if called else ()
  return [x for x in map(_instruction, lines) if x]


def _bytes_read(instruction: _Instruction, by_name, computations) -> int:
  """Returns the bytes that an operation reads from HBM."""
  if instruction.op == "slice-start":
    return _num_bytes(_slice_shape(instruction)[:2])
  return sum(
    min(
      _hbm_bytes(by_name[name].type),
      _operand_bytes(i, instruction, computations),
    )
    for i, name in enumerate(instruction.operands)
    if name in by_name
  )


def _operand_bytes(i: int, user: _Instruction, computations) -> float:
  """Returns the bytes that an operation uses of operand i, at most."""
  if user.op in ("dynamic-slice", "gather", "slice") and i == 0:
    return _size(user.type)
  if user.op == "dynamic-update-slice" and i == 0:
    return 0
  body = _fusion_body(user, computations)
  names = [x.name for x in body if f" parameter({i})" in x.line]
  if not names:
    return math.inf
  total = 0
  for x in body:  # definitions come before uses
    for j, name in enumerate(x.operands):
      if name not in names:
        continue
      if x.op == "bitcast":
        names.append(x.name)
      else:
        total += _operand_bytes(j, x, computations)
  return total


def _slice_shape(start: _Instruction) -> tuple[str, str, str]:
  """Returns the shape that a slice-start fetches; the whole comes before it."""
  return _PLACED.findall(start.type)[1]


def _bytes_written(instruction: _Instruction, by_name, body) -> int:
  """Returns the bytes that an operation writes to HBM."""
  if instruction.op == "copy-start":  # its type has target and source
    return _hbm_bytes(_PLACED.search(instruction.type)[0])
  if instruction.op == "slice-start":
    dtype, dims, layout = _slice_shape(instruction)
    return _hbm_bytes(f"{dtype}[{dims}]{layout}")
  written = _hbm_bytes(instruction.type)
  types = {x.name: x.type for x in body or by_name.values()}
  for x in body or [instruction]:
    if x.op == "dynamic-update-slice":
      update = _size(types[x.operands[1]])
      written -= max(min(written, _size(x.type)) - update, 0)
  return written


def _hbm_bytes(type_: str) -> int:
  """Returns the bytes of a type that are in HBM."""
  return sum(
    _num_bytes((dtype, dims))
    for dtype, dims, layout in _PLACED.findall(type_)
    if not _ELSEWHERE.search(layout)
  )


def _size(type_: str) -> int:
  return sum(map(_num_bytes, _SHAPE.findall(type_)))


def _trips(line: str, computations: dict[str, list[str]]) -> int:
  """Returns how often the callees of a line run: the length of a loop, or 1."""
  if " while(" not in line:
    return 1
  trips = _TRIPS.search(line)
  if trips:
    return int(trips[1])
  # The TPU compiler does not write it; its loops count up to a constant.
  condition = re.search(r"condition=%?([\w.\-]+)", line)
  text = "\n".join(computations.get(condition[1], ())) if condition else ""
  last = re.search(r"compare\(%?[\w.\-]+, %?([\w.\-]+)\), direction=LT", text)
  limit = last and re.search(
    rf"%?{re.escape(last[1])} = [su]32\[\]\S* constant\((\d+)\)", text
  )
  return int(limit[1]) if limit else 1


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns the lines of each computation, and the name of the entry."""
  computations, entry, lines = {}, "", []
  for line in text.splitlines():
    head = _HEAD.match(line)
    if head:
      lines = computations.setdefault(head[1], [])
      if line.startswith("ENTRY"):
        entry = head[1]
    elif line.rstrip() == "}":
      lines = []
    elif lines and not line.startswith("  "):
      lines[-1] += line  # the metadata of a Pallas kernel has line breaks
    else:
      lines.append(line)
  return computations, entry


def _callees(line: str) -> Iterator[str]:
  yield from _CALLS.findall(line)
  for names in _BRANCHES.findall(line):
    yield from (name.strip().lstrip("%") for name in names.split(","))


def _collective(
  match: re.Match, line: str, num_devices: int, computation: str
) -> Collective:
  """Parses a collective operation, without how often it runs."""
  kind = match["kind"]
  group = len(_first_group(line, num_devices))
  size = sum(map(_num_bytes, _SHAPE.findall(match["type"])))
  if kind == "reduce-scatter":
    size *= group
  if match["start"]:
    # The type of an asynchronous start has operands and results.
    if kind == "all-gather":
      size = size * group // (group + 1)
    elif kind == "reduce-scatter":
      size = size // (group + 1)
    elif kind in ("all-to-all", "collective-permute"):
      size = size // 2
  if computation.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"  # as the TPU compiler writes it
  return Collective(kind, size, group, 1)


def _num_bytes(shape: tuple[str, str]) -> int:
  dtype, dims = shape
  bits = re.search(r"\d+", dtype)
  item = _ITEM_BYTES.get(dtype, max(int(bits[0]) // 8, 1) if bits else 0)
  return item * math.prod(int(d) for d in dims.split(",") if d)


# Device numbers as an array: [4,2]<=[2,4]T(1,0) transposes arange(8) as (2, 4).
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"


def _first_group(line: str, num_devices: int) -> list[int]:
  """Returns the devices of the first group of a collective."""
  pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)", line)
  if pairs:
    return list(range(num_devices)) if pairs[1] != pairs[2] else [0]
  lists = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
  if lists:
    return [int(device) for device in lists[1].split(",")]
  iota = re.search(rf"replica_groups=\[\d+,(\d+)\]<={_IOTA}", line)
  if iota:
    return _iota(iota[2], iota[3]).ravel()[: int(iota[1])].tolist()
  mesh = re.search(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))?.*?"
    r"\{([^}]*)\}",
    line,
  )
  if not mesh:
    return list(range(num_devices))
  sizes = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
  order = _iota(mesh[2] or str(math.prod(sizes.values())), mesh[3])
  # A mesh axis or a part of one: 'axis_0', or 'axis_0':(2)4 for the middle of
  # three axes, the first of size 2, of which axis_0 is the product.
  varying = {
    axis: (int(before or 1), int(part or sizes[axis]))
    for axis, before, part in re.findall(
      r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[4]
    )
  }
  shape, index = [], []
  for axis, size in sizes.items():
    before, part = varying.get(axis, (size, 1))
    shape += [before, part, size // (before * part)]
    index += [0, slice(None), 0]
  return order.reshape(shape)[tuple(index)].ravel().tolist()


def _iota(shape: str, order: str | None) -> np.ndarray:
  """Returns consecutive numbers, reshaped and transposed."""
  sizes = [int(n) for n in shape.split(",")]
  numbers = np.arange(math.prod(sizes)).reshape(sizes)
  return numbers.transpose(
    [int(i) for i in order.split(",")] if order else None
  )
