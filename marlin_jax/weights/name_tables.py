"""Name tables between this project's arrays and PyTorch's.

A table is a list of rules. Read one way it turns a state dict into our arrays,
read the other way it turns ours into a state dict; both refuse what is left
over. Rules only move numbers, so there and back gives the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from marlin_jax.weights.weights import Architecture, WeightsError


@dataclasses.dataclass(frozen=True)
class Rule:
  """One array of theirs, one or more of ours.

  Attributes:
    theirs: its name there.
    ours: names here.
    read: their array -> ours, as a tuple.
    write: our arrays -> theirs.
  """

  theirs: str
  ours: tuple[str, ...]
  read: Callable[[np.ndarray], tuple[np.ndarray, ...]]
  write: Callable[..., np.ndarray]


def same(theirs: str, ours: str) -> Rule:
  return Rule(theirs, (ours,), lambda x: (x,), lambda x: x)


def transposed(theirs: str, ours: str) -> Rule:
  """PyTorch keeps a linear layer's weight as (out, in)."""
  return Rule(theirs, (ours,), lambda x: (x.T,), lambda x: x.T)


def batched(theirs: str, ours: str, num_axes: int) -> Rule:
  """Theirs has `num_axes` leading axes of length 1."""
  one = (1,) * num_axes
  return Rule(
    theirs,
    (ours,),
    lambda x: (x.reshape(x.shape[num_axes:]),),
    lambda x: x.reshape(one + x.shape),
  )


def linear(theirs: str, ours: str) -> list[Rule]:
  return [
    transposed(f"{theirs}.weight", f"{ours}.kernel"),
    same(f"{theirs}.bias", f"{ours}.bias"),
  ]


def norm(theirs: str, ours: str) -> list[Rule]:
  return [
    same(f"{theirs}.weight", f"{ours}.scale"),
    same(f"{theirs}.bias", f"{ours}.bias"),
  ]


def patch_embedding(
  theirs: str, ours: str, architecture: Architecture
) -> list[Rule]:
  """A Conv3d (D, c, pt, ph, pw) whose stride is its size: a linear layer."""
  p = architecture.patch_size
  kernel = (3, architecture.tubelet_size, p, p)
  return [
    Rule(
      f"{theirs}.weight",
      (f"{ours}.kernel",),
      lambda x: (x.reshape(len(x), -1).T,),
      lambda x: x.T.reshape(-1, *kernel),
    ),
    same(f"{theirs}.bias", f"{ours}.bias"),
  ]


def fused_attention(theirs: str, ours: str) -> list[Rule]:
  """Query, key and value as one matrix; no bias on the key."""
  kernels = tuple(f"{ours}.{name}.kernel" for name in ("query", "key", "value"))
  return [
    Rule(
      f"{theirs}.qkv.weight",
      kernels,
      lambda x: tuple(part.T for part in np.split(x, 3)),
      lambda *parts: np.concatenate([part.T for part in parts]),
    ),
    same(f"{theirs}.q_bias", f"{ours}.query.bias"),
    same(f"{theirs}.v_bias", f"{ours}.value.bias"),
    *linear(f"{theirs}.proj", f"{ours}.out"),
  ]


def fused_blocks(
  theirs: str, ours: str, depth: int, hidden: str, out: str
) -> list[Rule]:
  """A stack of blocks.

  Args:
    theirs: what their blocks' numbers follow.
    ours: the Transformer.
    depth: how many.
    hidden: their name of a block's first MLP layer.
    out: of its second.
  """
  found = []
  for i in range(depth):
    a, b = f"{theirs}.{i}", f"{ours}.blocks.{i}"
    found += [
      *norm(f"{a}.norm1", f"{b}.norm1"),
      *fused_attention(f"{a}.attn", f"{b}.attention"),
      *norm(f"{a}.norm2", f"{b}.norm2"),
      *linear(f"{a}.{hidden}", f"{b}.mlp_in"),
      *linear(f"{a}.{out}", f"{b}.mlp_out"),
    ]
  return found


def videomae_head(theirs: str, ours: str) -> list[Rule]:
  """A head whose pixels are ordered (pt ph pw c), where ours are c pt ph pw."""

  def colours_first(rows):
    return rows.reshape(-1, 3, *rows.shape[1:]).swapaxes(0, 1)

  def colours_last(rows):
    return rows.reshape(3, -1, *rows.shape[1:]).swapaxes(0, 1)

  def reorder(rows, how):
    return how(rows).reshape(rows.shape)

  return [
    Rule(
      f"{theirs}.weight",
      (f"{ours}.kernel",),
      lambda x: (reorder(x, colours_first).T,),
      lambda x: reorder(x.T, colours_last),
    ),
    Rule(
      f"{theirs}.bias",
      (f"{ours}.bias",),
      lambda x: (reorder(x, colours_first),),
      lambda x: reorder(x, colours_last),
    ),
  ]


def read(
  rules: list[Rule], theirs: Mapping[str, np.ndarray], source: str
) -> dict[str, np.ndarray]:
  """Turns a state dict into our arrays.

  Args:
    rules: the table.
    theirs: float arrays by name.
    source: where they come from, for the message.

  Raises:
    WeightsError: names every key that is missing or left over.
  """
  expected = {rule.theirs for rule in rules}
  missing = sorted(expected - theirs.keys())
  unknown = sorted(theirs.keys() - expected)
  if missing or unknown:
    raise WeightsError(
      f"{source}: its keys are not those of such a network\n"
      + "\n".join(
        [f"  {key}: missing" for key in missing]
        + [f"  {key}: not known" for key in unknown]
      )
    )
  arrays = {}
  for rule in rules:
    try:
      parts = rule.read(np.asarray(theirs[rule.theirs], np.float32))
    except ValueError as e:
      raise WeightsError(
        f"{source}: {rule.theirs} has shape {theirs[rule.theirs].shape}: {e}"
      ) from e
    arrays |= {
      # Rows in order: files and devices want no views.
      name: np.ascontiguousarray(part)
      for name, part in zip(rule.ours, parts, strict=True)
    }
  return arrays


def write(
  rules: list[Rule], ours: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Turns our arrays into a state dict.

  Raises:
    WeightsError: names every array of ours for which the table has no place.
  """
  placed = {name for rule in rules for name in rule.ours}
  left = sorted(ours.keys() - placed)
  if left:
    raise WeightsError("the format has no place for " + ", ".join(left))
  return {
    rule.theirs: np.ascontiguousarray(
      rule.write(*(ours[name] for name in rule.ours))
    )
    for rule in rules
  }


def infer_depth(keys, prefix: str) -> int:
  """How many blocks there are below `prefix`, e.g. 'encoder.blocks.'."""
  numbers = [
    int(key[len(prefix) :].split(".")[0])
    for key in keys
    if key.startswith(prefix)
  ]
  return max(numbers, default=-1) + 1


# Heads are nowhere in a state dict; these are the published networks'.
_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 192: 3, 512: 8, 640: 8}


def infer_heads(width: int, given: int, flag: str, source: str) -> int:
  """The number of heads of a stack of that width.

  Args:
    width: D.
    given: what the user says; 0: nothing.
    flag: how the user can say it.
    source: for the message.

  Raises:
    WeightsError: the width is none of a published network.
  """
  heads = given or _HEADS.get(width, 0)
  if not heads:
    raise WeightsError(
      f"{source}: a width of {width} is none of a published network, and the "
      f"number of attention heads is not in the file: give {flag}"
    )
  return heads


def shape_of(theirs: Mapping[str, np.ndarray], key: str, source: str):
  """The shape of an array that must be there.

  Raises:
    WeightsError: it is not.
  """
  if key not in theirs:
    raise WeightsError(
      f"{source}: no key '{key}'; it holds {len(theirs)} arrays, e.g. "
      f"{', '.join(sorted(theirs)[:3])}. Is it of another format?"
    )
  return theirs[key].shape


def patch_sizes(
  theirs: Mapping[str, np.ndarray], key: str, source: str
) -> tuple[int, int, int]:
  """Width, tubelet size and patch size, from the patch embedding's weight.

  Raises:
    WeightsError: it is missing, or no (D, 3, pt, p, p).
  """
  shape = shape_of(theirs, key, source)
  if len(shape) != 5 or shape[1] != 3 or shape[3] != shape[4]:
    raise WeightsError(
      f"{source}: {key} has shape {shape}, expected (width, 3, tubelet size, "
      "patch size, patch size)"
    )
  return shape[0], shape[2], shape[3]
