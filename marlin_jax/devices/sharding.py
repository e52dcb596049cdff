"""Device mesh, and the sharding of arrays over it.

The mesh has three axes:
  data: every device has its own clips and a copy of the weights;
  fsdp: every device has its own clips and keeps a shard of each large weight;
    weights are gathered block by block when they are used (ZeRO-3);
  tensor: the devices share their clips; each computes some of the attention
    heads and hidden units of every block (Megatron-LM).
Neighbouring devices, which have the fastest links, differ along tensor; the
most distant ones differ along data.
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
# Mesh axes that split the batch.
BATCH = P(("data", "fsdp"))

# (pattern at the end of a parameter's path, mesh axis of each of its axes). The
# first pattern that matches holds for the parameter and its optimiser moments.
# Stacked blocks (models.stacking) have one more axis, the first, which is not
# split. Within a block, tensor splits the outputs of the first layer of a pair
# and the inputs of the second, so that each pair ends with one sum over
# devices. fsdp splits the other axis: if it split the axis that tensor splits,
# or the largest axis, the compiler would move whole activations between
# devices.
RULES = (
  (r"attention/(query|key|value)/kernel", P("fsdp", "tensor")),
  (r"attention/(query|value)/bias", P("tensor")),
  (r"attention/out/kernel", P("tensor", "fsdp")),
  (r"mlp_in/kernel", P("fsdp", "tensor")),
  (r"mlp_in/bias", P("tensor")),
  (r"mlp_out/kernel", P("tensor", "fsdp")),
  (r"(patch_embedding|enc_to_dec|head|hidden)/kernel", P("fsdp", None)),
  # Norms, other biases, the mask token, position tables, the discriminator's
  # last layer, counters: together about 0.1 % of the parameters.
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
  """Returns a mesh of all devices.

  Args:
    data: devices along data; -1 for all that fsdp and tensor leave.
    fsdp: devices along fsdp, at least 1.
    tensor: devices along tensor, at least 1.
    devices: devices to use; by default those of all processes.

  Raises:
    MeshError: the sizes do not fit the devices; names sizes that do.
  """
  devices = jax.devices() if devices is None else devices
  grid = arrange(data, fsdp, tensor, devices)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(
  data: int, fsdp: int, tensor: int, devices: Sequence[Any]
) -> np.ndarray:
  """Returns the devices as an array (data, fsdp, tensor); see `make_mesh`.

  TPU slices are connected by the data centre's network, so devices of different
  slices differ along data alone. GPU nodes are connected by a network that
  serves fsdp too, but not tensor.

  Raises:
    MeshError: the sizes do not fit the devices or how they are connected; names
      sizes that do.
  """
  mesh = f"config.mesh.data={data}, fsdp={fsdp}, tensor={tensor}"
  kinds = ", ".join(sorted({d.device_kind for d in devices}))
  present = f"there are {len(devices)} devices ({kinds})"
  if data == -1:
    if len(devices) % (fsdp * tensor):
      raise MeshError(
        f"{mesh}, but {present}, which {fsdp} x {tensor} does not divide; "
        f"{_alternatives(tensor, devices)}"
      )
    data = len(devices) // (fsdp * tensor)
  if data * fsdp * tensor != len(devices):
    raise MeshError(
      f"{mesh}: a mesh of {data * fsdp * tensor}, but {present}; use "
      "config.mesh.data=-1 for all that fsdp and tensor leave"
    )
  try:
    return _grid((data, fsdp, tensor), devices)
  except _MisfitError as e:
    raise MeshError(f"{mesh}: {e}; {_alternatives(tensor, devices)}") from e


class _MisfitError(Exception):
  """Sizes of the right product that do not fit how devices are connected."""


def _grid(sizes: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
  """Returns the devices as an array of these sizes, or raises _MisfitError."""
  data, _, tensor = sizes
  slices = {_slice(d) for d in devices}
  if devices[0].platform == "gpu":
    # XLA gives the GPUs of a machine one slice_index.
    in_order = sorted(devices, key=lambda d: (_slice(d), d.id))
    grid = np.array(in_order, object).reshape(sizes)
    if any(
      len({_slice(d) for d in row}) > 1 for row in grid.reshape(-1, tensor)
    ):
      raise _MisfitError(
        f"{tensor} along tensor do not fit into each of the {len(slices)} nodes"
      )
    return grid
  if data % len(slices):
    raise _MisfitError(
      f"{data} along data is not a multiple of the {len(slices)} slices that "
      "the devices belong to; fsdp and tensor must fit into one slice"
    )
  in_slice = (data // len(slices), *sizes[1:])
  try:
    # Unless splitting is allowed, an axis of the mesh must be whole axes of the
    # slice: fsdp=8 would not fit 4x4. Axes are split only if they must be.
    if len(slices) > 1:
      return mesh_utils.create_hybrid_device_mesh(
        in_slice,
        (len(slices), 1, 1),
        devices,
        allow_split_physical_axes=True,
      )
    return mesh_utils.create_device_mesh(
      in_slice, devices, allow_split_physical_axes=True
    )
  except (NotImplementedError, ValueError) as e:
    raise _MisfitError("jax cannot map it to the links of the slice") from e


def _slice(device: Any) -> int:
  # A GPU that is only compiled for has no slice_index, and is of its node's
  # process.
  other = device.process_index if device.platform == "gpu" else 0
  return getattr(device, "slice_index", other)


def _alternatives(tensor: int, devices: Sequence[Any]) -> str:
  """Returns, in words, sizes that fit the devices with data=-1."""

  def fits(fsdp, tensor):
    data, rest = divmod(len(devices), fsdp * tensor)
    try:
      return not rest and _grid((data, fsdp, tensor), devices) is not None
    except _MisfitError:
      return False

  numbers = range(1, len(devices) + 1)
  if choices := [n for n in numbers if fits(n, tensor)]:
    return f"with tensor={tensor}, fsdp can be {', '.join(map(str, choices))}"
  choices = [n for n in numbers if fits(1, n)]
  return f"tensor can be {', '.join(map(str, choices))}"


def num_shards(mesh: Mesh) -> int:
  """Returns the number of parts of a batch: devices along data and fsdp."""
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
  """Returns a sharding that splits the first axis over data and fsdp."""
  return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns a sharding with a whole copy on every device."""
  return NamedSharding(mesh, P())


def put(tree: Pytree, shardings: Pytree) -> Pytree:
  """Places arrays that every process holds whole.

  Args:
    tree: arrays, equal on all processes.
    shardings: their shardings, or one for all.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)
  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda _: shardings, tree)

  def place(x, where):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda i: x[i].copy())

  return jax.tree.map(place, tree, shardings)


def local_rows(x: jax.Array) -> np.ndarray:
  """Returns the rows of an array that this process's devices hold.

  Args:
    x: array that is split along its first axis only. Several devices may hold
      the same rows.
  """
  shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}
  return np.concatenate([shards[start] for start in sorted(shards)])


class Layout(NamedTuple):
  """Sharding of each array of a state.

  Attributes:
    shardings: pytree like the state, of NamedShardings.
    notes: a line for each axis that is not split as RULES say, with the reason.
  """

  shardings: Pytree
  notes: tuple[str, ...]


def lay_out(
  mesh: Mesh | AbstractMesh, shapes: Pytree, num_heads: Mapping[str, int]
) -> Layout:
  """Returns the sharding of each array by RULES; allocates nothing.

  An axis whose size does not divide over its mesh axis is not split.

  Args:
    mesh: from `make_mesh`.
    shapes: the state, arrays or ShapeDtypeStructs.
    num_heads: attention heads of each network, by its name in parameter paths:
      {"encoder": 12, "decoder": 6}. A head is never split.
  """
  notes = []

  def place(path, leaf):
    name = _name(path)
    spec = []
    for axis, mesh_axis in enumerate(_rule(name)):
      size, unit = leaf.shape[axis], f"along axis {axis}"
      if mesh_axis == "tensor" and "attention/" in name:
        size = next(n for part, n in num_heads.items() if f"{part}/" in name)
        unit = "heads"
      if mesh_axis and size % mesh.shape[mesh_axis]:
        # Optimiser moments need no notes of their own.
        if name.split("/")[0] in ("params", "disc_params"):
          all_blocks = re.sub(r"blocks/\d+/", "blocks/", name)
          notes.append(
            f"{all_blocks}: {size} {unit} do not divide over "
            f"mesh.{mesh_axis}={mesh.shape[mesh_axis]}, kept whole"
          )
        mesh_axis = None
      spec.append(mesh_axis)
    return NamedSharding(mesh, P(*spec))

  shardings = jax.tree_util.tree_map_with_path(place, shapes)
  return Layout(shardings, tuple(dict.fromkeys(notes)))


def bytes_per_device(shapes: Pytree, shardings: Pytree) -> int:
  """Returns the bytes of a pytree of arrays or shapes on one device."""
  sizes = jax.tree.map(
    lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize,
    shapes,
    shardings,
  )
  return sum(jax.tree.leaves(sizes))


@dataclasses.dataclass(frozen=True)
class MeshPlacement:
  """Sharding of tokens and weights while a network runs.

  Implements models.partition.Placement.

  Attributes:
    mesh: from `make_mesh`.
    dtype: dtype of matmuls; weights are gathered in it.
    float32_sums: see models.partition.Placement.
  """

  mesh: Mesh
  dtype: str
  float32_sums: bool = False

  @property
  def num_tensor(self) -> int:
    return self.mesh.shape["tensor"]

  def tokens(self, x: jax.Array) -> jax.Array:
    """Splits (B, N, D) along B; replicates it over tensor."""
    return jax.lax.with_sharding_constraint(x, batch_sharding(self.mesh))

  def own_heads(self, attend):
    """Wraps a function so that each device runs it on its own clips and heads.

    Args:
      attend: arrays (B, N, H, K) -> (B, N, H, K).

    Returns:
      A function of the same arrays, sharded over the mesh.
    """

    def run(*arrays):
      num_heads = arrays[0].shape[2]
      # As in lay_out, heads that do not divide are replicated.
      heads = None if num_heads % self.num_tensor else "tensor"
      spec = P(*BATCH, None, heads)
      return jax.shard_map(
        attend, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False
      )(*arrays)

    return run

  def weights(self, params: Pytree) -> Pytree:
    """Gathers the shards of weights over fsdp.

    Leaves blocks as they are: each block gathers its own weights when it runs,
    so that no device ever holds all of them.

    Args:
      params: parameters of a network or a block, nested dicts by name.
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
      if not self.float32_sums:
        x = x.astype(self.dtype)
      return _gather(x, self.mesh, rule, self.dtype)

    return jax.tree_util.tree_map_with_path(whole, params)


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _rule(name: str) -> P:
  spec = next(
    spec for pattern, spec in RULES if re.search(f"(^|/){pattern}$", name)
  )
  return P(None, *spec) if re.search(r"blocks/(?!\d)", name) else spec


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(x, mesh, rule, dtype):
  """Gathers along the axis that fsdp splits; leaves tensor's axis as it is.

  The values travel in `dtype`; the gradients in that of x.
  """
  # Behind the barrier: for a product of one row, which XLA computes in float32,
  # it would gather float32 and cast to bfloat16 afterwards.
  cast = jax.lax.optimization_barrier(x.astype(dtype))
  return _constrain(cast, mesh, rule, fsdp=None).astype(x.dtype)


def _gather_forward(x, mesh, rule, dtype):
  return _gather(x, mesh, rule, dtype), None


def _gather_backward(mesh, rule, dtype, _, grad):
  # Each device needs its shard of the gradient only. The transpose of
  # _gather would give every device the whole gradient.
  return (_constrain(grad, mesh, rule, fsdp="fsdp"),)


_gather.defvjp(_gather_forward, _gather_backward)


def _constrain(x, mesh, rule, fsdp):
  # UNCONSTRAINED: tensor does not split an axis that does not divide.
  places = {"fsdp": fsdp, "tensor": P.UNCONSTRAINED, None: None}
  spec = P(*(places[axis] for axis in rule))
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
