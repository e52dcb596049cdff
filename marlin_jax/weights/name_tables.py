"""Name tables between this project's arrays and PyTorch state dicts.

A table is a list of rules. `read` turns a state dict into our arrays, `write`
turns our arrays into a state dict; both refuse arrays without a rule. Rules
only move values, so a round trip gives the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import WeightsError


@dataclasses.dataclass(frozen=True)
class Rule:
  """How an array of a state dict corresponds to one or more of ours.

  Attributes:
    theirs: name in the state dict.
    ours: names in Weights.
    read: their array -> tuple of our arrays.
    write: our arrays -> their array.
  """

  theirs: str
  ours: tuple[str, ...]
  read: Callable[[np.ndarray], tuple[np.ndarray, ...]]
  write: Callable[..., np.ndarray]


def same(theirs: str, ours: str) -> Rule:
  """Returns the rule of equal arrays."""
  return Rule(theirs, (ours,), lambda x: (x,), lambda x: x)


def transposed(theirs: str, ours: str) -> Rule:
  """Returns the rule of a linear layer's weight, (out, in) in PyTorch."""
  return Rule(theirs, (ours,), lambda x: (x.T,), lambda x: x.T)


def batched(theirs: str, ours: str, num_axes: int) -> Rule:
  """Returns the rule of an array with `num_axes` leading axes of length 1."""
  leading = (1,) * num_axes
  return Rule(
    theirs,
    (ours,),
    lambda x: (x.reshape(x.shape[num_axes:]),),
    lambda x: x.reshape(leading + x.shape),
  )


def linear(theirs: str, ours: str) -> list[Rule]:
  """Returns the rules of a linear layer with bias."""
  return [
    transposed(f"{theirs}.weight", f"{ours}.kernel"),
    same(f"{theirs}.bias", f"{ours}.bias"),
  ]


def norm(theirs: str, ours: str) -> list[Rule]:
  """Returns the rules of a LayerNorm."""
  return [
    same(f"{theirs}.weight", f"{ours}.scale"),
    same(f"{theirs}.bias", f"{ours}.bias"),
  ]


def patch_embedding(
  theirs: str, ours: str, architecture: Architecture
) -> list[Rule]:
  """Returns the rules of the patch embedding.

  Theirs is a Conv3d with weight (D, c, pt, ph, pw) whose stride is its kernel
  size, which is a linear layer on tokens.
  """
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
  """Returns the rules of attention with query, key and value in one matrix."""
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
  """Returns the rules of a stack of blocks with fused attention.

  Args:
    theirs: prefix of the block numbers in their names.
    ours: name of the Transformer.
    depth: number of blocks.
    hidden: their name of a block's first MLP layer.
    out: their name of its second MLP layer.
  """
  rules = []
  for i in range(depth):
    a, b = f"{theirs}.{i}", f"{ours}.blocks.{i}"
    rules += [
      *norm(f"{a}.norm1", f"{b}.norm1"),
      *fused_attention(f"{a}.attn", f"{b}.attention"),
      *norm(f"{a}.norm2", f"{b}.norm2"),
      *linear(f"{a}.{hidden}", f"{b}.mlp_in"),
      *linear(f"{a}.{out}", f"{b}.mlp_out"),
    ]
  return rules


def videomae_head(theirs: str, ours: str) -> list[Rule]:
  """Returns the rules of VideoMAE's head.

  Its pixels are ordered (pt ph pw c), ours (c pt ph pw).
  """

  def colours_first(rows):
    return rows.reshape(-1, 3, *rows.shape[1:]).swapaxes(0, 1)

  def colours_last(rows):
    return rows.reshape(3, -1, *rows.shape[1:]).swapaxes(0, 1)

  def reorder(rows, order):
    return order(rows).reshape(rows.shape)

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
    source: origin of the state dict, for messages.

  Returns:
    float32 arrays by our names.

  Raises:
    WeightsError: keys are missing or unknown, or a shape does not fit; the
      message lists every key.
  """
  expected = {rule.theirs for rule in rules}
  missing = sorted(expected - theirs.keys())
  unknown = sorted(theirs.keys() - expected)
  if missing or unknown:
    raise WeightsError(
      f"{source}: its keys are not those of this network\n"
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
      # Transposes and splits are views; files and devices need them in order.
      name: np.ascontiguousarray(part)
      for name, part in zip(rule.ours, parts, strict=True)
    }
  return arrays


def write(
  rules: list[Rule], ours: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """Turns our arrays into a state dict.

  Args:
    rules: the table.
    ours: arrays by our names.

  Raises:
    WeightsError: the table has no rule for some arrays; the message lists them.
  """
  placed = {name for rule in rules for name in rule.ours}
  unplaced = sorted(ours.keys() - placed)
  if unplaced:
    raise WeightsError("the format has no place for " + ", ".join(unplaced))
  return {
    rule.theirs: np.ascontiguousarray(
      rule.write(*(ours[name] for name in rule.ours))
    )
    for rule in rules
  }


def infer_depth(keys, prefix: str) -> int:
  """Returns the number of blocks below a prefix such as 'encoder.blocks.'."""
  names = {
    key[len(prefix) :].split(".")[0] for key in keys if key.startswith(prefix)
  }
  # Others are not known, which `read` tells.
  return max((int(n) for n in names if n.isdecimal()), default=-1) + 1


# Width -> number of heads of the published networks. State dicts do not say it.
_HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 192: 3, 512: 8, 640: 8}


def infer_heads(width: int, given: int, flag: str, source: str) -> int:
  """Returns the number of attention heads of a stack of blocks.

  Args:
    width: D.
    given: number of heads from the user; 0: that of the published network.
    flag: the flag of `given`, for the message.
    source: origin of the state dict, for messages.

  Raises:
    WeightsError: no published network has this width, and none is given.
  """
  heads = given or _HEADS.get(width, 0)
  if not heads:
    raise WeightsError(
      f"{source}: no published network has a width of {width}, and the file "
      "does not hold the number of attention heads: convert it with "
      f"python -m marlin_jax.convert {flag}"
    )
  return heads


def decoder_sizes(
  theirs: Mapping[str, np.ndarray],
  projection: str,
  hidden: str,
  num_heads: int,
  source: str,
) -> dict[str, int]:
  """Returns the sizes of the decoder `decoder.blocks`, fields of Architecture.

  Args:
    theirs: state dict.
    projection: their name of the layer from the encoder's width to its own.
    hidden: their name of a block's first MLP layer.
    num_heads: see `infer_heads`.
    source: origin of the state dict, for messages.

  Raises:
    WeightsError: a layer is missing, or the number of heads is not known.
  """
  width = shape_of(theirs, f"{projection}.weight", source)[0]
  first_layer = f"decoder.blocks.0.{hidden}.weight"
  return {
    "dec_width": width,
    "dec_depth": infer_depth(theirs, "decoder.blocks."),
    "dec_num_heads": infer_heads(width, num_heads, "--dec_num_heads", source),
    "dec_mlp_dim": shape_of(theirs, first_layer, source)[0],
  }


def shape_of(theirs: Mapping[str, np.ndarray], key: str, source: str):
  """Returns the shape of an array of a state dict.

  Raises:
    WeightsError: there is no such array.
  """
  if key not in theirs:
    raise WeightsError(
      f"{source}: no key '{key}'; it holds {len(theirs)} arrays, e.g. "
      f"{', '.join(sorted(theirs)[:3])}. Does it have another format?"
    )
  return theirs[key].shape


def patch_sizes(
  theirs: Mapping[str, np.ndarray], key: str, source: str
) -> tuple[int, int, int]:
  """Returns width, tubelet size and patch size.

  Args:
    theirs: state dict.
    key: name of the patch embedding's weight.
    source: origin of the state dict, for messages.

  Raises:
    WeightsError: the weight is missing, or its shape is not (D, 3, pt, p, p).
  """
  shape = shape_of(theirs, key, source)
  if len(shape) != 5 or shape[1] != 3 or shape[3] != shape[4]:
    raise WeightsError(
      f"{source}: {key} has shape {shape}, expected (width, 3, tubelet size, "
      "patch size, patch size)"
    )
  return shape[0], shape[2], shape[3]
