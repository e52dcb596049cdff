"""The device mesh, and where arrays live on it.

Every device has a place along three axes:
  data: each has clips of its own and a copy of the weights;
  fsdp: each has clips of its own and keeps a part of every large weight; the
    parts are put together block by block, when they are used (ZeRO-3);
  tensor: all have the same clips; each computes some of the attention heads
    and hidden units of every block (Megatron-LM).
The fastest links should join tensor, the slowest data: the axes are laid over
the devices in that order.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from marlin_jax.records.cli import UserError

Pytree = Any

AXES = ("data", "fsdp", "tensor")
# Clips are spread over these.
BATCH = P(("data", "fsdp"))

# (pattern that ends a parameter's path, where each of its axes lives). The
# first that matches holds, for the parameter and for its optimiser moments.
# Joined blocks (models.blocks) have one more axis, in front, which stays whole.
# In a block tensor cuts what comes out of the first layer of a pair and what
# goes into the second, so that one sum over devices ends each pair. fsdp cuts
# the other axis: cutting the axis that tensor cuts, or the largest, makes the
# compiler move whole activations between devices.
RULES = (
  (r"attention/(query|key|value)/kernel", P("fsdp", "tensor")),
  (r"attention/(query|value)/bias", P("tensor")),
  (r"attention/out/kernel", P("tensor", "fsdp")),
  (r"mlp_in/kernel", P("fsdp", "tensor")),
  (r"mlp_in/bias", P("tensor")),
  (r"mlp_out/kernel", P("tensor", "fsdp")),
  (r"(patch_embedding|enc_to_dec|head|hidden)/kernel", P("fsdp", None)),
  # Norms, other biases, the mask token, position tables, the discriminator's
  # last layer, counters: a thousandth of the whole.
  (r".*", P()),
)


class MeshError(UserError):
  """Mesh or batch size that does not fit the devices."""


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh of all devices.

  Args:
    data: devices along the axis; -1 takes all that the others leave.
    fsdp: likewise, at least 1.
    tensor: likewise, at least 1.
    devices: the devices to use; all of the process group by default.

  Raises:
    MeshError: the sizes do not fit the number of devices or of slices.
  """
  devices = jax.devices() if devices is None else devices
  grid = arrange(data, fsdp, tensor, devices)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(
  data: int, fsdp: int, tensor: int, devices: Sequence[Any]
) -> np.ndarray:
  """Devices in their places, (data, fsdp, tensor); see `make_mesh`.

  Devices of several TPU slices, which only the data centre's network joins,
  differ along data alone.
  """
  asked = f"config.mesh.data={data}, fsdp={fsdp}, tensor={tensor}"
  kinds = ", ".join(sorted({d.device_kind for d in devices}))
  there = f"there are {len(devices)} devices ({kinds})"
  if data == -1:
    if len(devices) % (fsdp * tensor):
      raise MeshError(
        f"{asked}, but {there}, which {fsdp} x {tensor} does not divide; "
        "lower fsdp or tensor"
      )
    data = len(devices) // (fsdp * tensor)
  if data * fsdp * tensor != len(devices):
    raise MeshError(
      f"{asked}: a mesh of {data * fsdp * tensor}, but {there}; use "
      "config.mesh.data=-1 for all that fsdp and tensor leave"
    )
  num_slices = len({getattr(d, "slice_index", 0) for d in devices})
  if data % num_slices:
    raise MeshError(
      f"{asked}: {data} along data is no multiple of the {num_slices} slices "
      "that the devices belong to; fsdp and tensor must fit into one slice"
    )
  if num_slices > 1:
    return mesh_utils.create_hybrid_device_mesh(
      (data // num_slices, fsdp, tensor), (num_slices, 1, 1), devices
    )
  return mesh_utils.create_device_mesh((data, fsdp, tensor), devices)


def num_shards(mesh: Mesh) -> int:
  """Parts that a batch is spread in: the devices along data and fsdp."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh, batch_size: int, key: str = "batch_size") -> None:
  """Checks that a batch divides over the devices along data and fsdp.

  Args:
    mesh: from `make_mesh`.
    batch_size: clips per step.
    key: the configuration's name for it.

  Raises:
    MeshError: the batch does not divide; names the nearest sizes that do.
  """
  shards = num_shards(mesh)
  if batch_size % shards:
    lower = batch_size // shards * shards
    nearby = [str(n) for n in (lower, lower + shards) if n]
    raise MeshError(
      f"config.{key}={batch_size} does not divide over {shards} devices; "
      f"nearby values that do: {', '.join(nearby)}"
    )


def describe(mesh: Mesh) -> str:
  """Returns number and kind of the devices, and the number of processes."""
  kinds = ", ".join(sorted({d.device_kind for d in mesh.devices.flat}))
  num_processes = len({d.process_index for d in mesh.devices.flat})
  suffix = f" in {num_processes} processes" if num_processes > 1 else ""
  return f"{mesh.size} x {kinds}{suffix}"


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis over data and fsdp."""
  return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, P())


def local_rows(x: jax.Array) -> np.ndarray:
  """What of an array, spread along its first axis, this process holds.

  Several devices may hold the same rows.
  """
  shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}
  return np.concatenate([shards[start] for start in sorted(shards)])


class Layout(NamedTuple):
  """Where each array of a state lives.

  Attributes:
    shardings: a tree like the state, of NamedShardings.
    notes: for each axis that could not be cut as RULES say, a line that tells
      which and why; it is kept whole instead.
  """

  shardings: Pytree
  notes: tuple[str, ...]


def lay_out(
  mesh: Mesh | AbstractMesh, shapes: Pytree, num_heads: Mapping[str, int]
) -> Layout:
  """Finds a place for every array before any is made.

  Args:
    mesh: from `make_mesh`.
    shapes: the state, arrays or ShapeDtypeStructs.
    num_heads: attention heads, which stay whole, by the part of the path that
      they are for: {"encoder": 12, "decoder": 6}.
  """
  notes = []

  def place(path, leaf):
    name = _name(path)
    spec = []
    for axis, mesh_axis in enumerate(_rule(name)):
      pieces, what = leaf.shape[axis], f"along axis {axis}"
      if mesh_axis == "tensor" and "attention/" in name:
        pieces = next(n for part, n in num_heads.items() if f"{part}/" in name)
        what = "heads"
      if mesh_axis and pieces % mesh.shape[mesh_axis]:
        # None for the moments again.
        if name.split("/")[0] in ("params", "disc_params"):
          of_all = re.sub(r"blocks/\d+/", "blocks/", name)
          notes.append(
            f"{of_all}: {pieces} {what} do not divide over "
            f"mesh.{mesh_axis}={mesh.shape[mesh_axis]}, kept whole"
          )
        mesh_axis = None
      spec.append(mesh_axis)
    return NamedSharding(mesh, P(*spec))

  shardings = jax.tree_util.tree_map_with_path(place, shapes)
  return Layout(shardings, tuple(dict.fromkeys(notes)))


def bytes_per_device(shapes: Pytree, shardings: Pytree) -> int:
  """Bytes that one device holds of a tree of arrays or shapes."""
  sizes = jax.tree.map(
    lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize,
    shapes,
    shardings,
  )
  return sum(jax.tree.leaves(sizes))


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where tokens and weights live while a network runs; models.partition.

  Attributes:
    mesh: from `make_mesh`.
    dtype: of the matmuls; weights travel in it.
  """

  mesh: Mesh
  dtype: str

  @property
  def num_tensor(self) -> int:
    return self.mesh.shape["tensor"]

  def tokens(self, x: jax.Array) -> jax.Array:
    """(B, N, D): clips spread over data and fsdp, whole along tensor."""
    return jax.lax.with_sharding_constraint(x, batch_sharding(self.mesh))

  def own_heads(self, attend):
    """Has each device run a function of (B, N, H, K) on its clips and heads."""

    def run(*arrays):
      num_heads = arrays[0].shape[2]
      # As lay_out does: what does not divide is whole everywhere.
      heads = None if num_heads % self.num_tensor else "tensor"
      spec = P(*BATCH, None, heads)
      return jax.shard_map(
        attend, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False
      )(*arrays)

    return run

  def weights(self, params: Pytree) -> Pytree:
    """Puts the parts that fsdp has cut together again.

    Blocks stay as they are: each asks for its own as it runs,
    so that no device ever holds all of them.

    Args:
      params: of a network or of a single block, nested dicts by name.
    """

    def whole(path, x):
      name = _name(path)
      rule = _rule(name)
      if "blocks/" in name or "fsdp" not in rule:
        return x
      axis = rule.index("fsdp")
      size = self.mesh.shape["fsdp"]
      if size == 1 or x.shape[axis] % size:
        return x
      # Cast before the journey, not after.
      return _gather(x.astype(self.dtype), self.mesh, rule)

    return jax.tree_util.tree_map_with_path(whole, params)


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _rule(name: str) -> P:
  spec = next(
    spec for pattern, spec in RULES if re.search(f"(^|/){pattern}$", name)
  )
  return P(None, *spec) if re.search(r"blocks/(?!\d)", name) else spec


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x, mesh, rule):
  """Whole along the axis that fsdp cuts; what tensor does stays."""
  return _constrain(x, mesh, rule, fsdp=None)


def _gather_forward(x, mesh, rule):
  return _gather(x, mesh, rule), None


def _gather_backward(mesh, rule, _, grad):
  # The gradient is wanted in parts only. With the transpose of the above every
  # device would get all of it.
  return (_constrain(grad, mesh, rule, fsdp="fsdp"),)


_gather.defvjp(_gather_forward, _gather_backward)


def _constrain(x, mesh, rule, fsdp):
  # Tensor may have left whole what does not divide.
  places = {"fsdp": fsdp, "tensor": P.UNCONSTRAINED, None: None}
  spec = P(*(places[axis] for axis in rule))
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
