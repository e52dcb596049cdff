"""Mesh layouts give equal results within the expected memory and traffic."""

import dataclasses
import importlib
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from configs import pretrain_b, pretrain_s, quickstart
from marlin_jax.devices import sharding
from marlin_jax.planning import topology
from marlin_jax.pretraining import build
from marlin_jax.weights.architecture import Architecture
from tests.support import layouts, objectives
from tests.support.processes import on_eight_devices

ROOT = Path(__file__).parents[2]
SPREAD = ("data", "fsdp", "fsdp and tensor")


@pytest.fixture(scope="module")
def results():
  """Returns the output of layouts.py by case, from one process of 8 devices."""
  return on_eight_devices("layouts.py")


@pytest.fixture(scope="module")
def objective_results():
  """Returns the output of layouts.py for every objective."""
  return on_eight_devices("layouts.py", *layouts.OBJECTIVE_CASES)


def assert_same_losses(got, want, rtol=1e-5):
  for step, (a, b) in enumerate(zip(got, want, strict=True)):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_allclose(
        a[name], b[name], rtol=rtol, err_msg=f"step {step}: {name}"
      )


@pytest.mark.slow
@pytest.mark.parametrize("case", SPREAD)
def test_five_steps_have_the_same_losses_under_every_layout(results, case):
  got, want = (results[name]["losses"] for name in (case, "one device"))
  assert len(want) == 5
  assert_same_losses(got, want)


@pytest.mark.slow
def test_penalty_parts_scan_and_remat_work_on_all_axes_at_once(results):
  want, got = results["rich, one device"], results["rich, all axes"]
  assert got["num_microbatches"] == want["num_microbatches"] == 2
  assert "gradient_penalty" in want["losses"][0]
  assert_same_losses(got["losses"], want["losses"])


@pytest.mark.slow
@pytest.mark.parametrize("objective", objectives.OBJECTIVES)
def test_every_objective_has_the_same_losses_on_all_axes(
  objective_results, objective
):
  want = objective_results[f"{objective}, one device"]
  got = objective_results[f"{objective}, all axes"]
  assert got["num_microbatches"] == want["num_microbatches"] == 2
  # Some measure how features are spread, which takes differences of them.
  assert_same_losses(got["losses"], want["losses"], rtol=1e-4)
  assert got["held_bytes"] == got["planned_bytes"] < want["held_bytes"]
  assert not got["exchanged"].keys() & {"all-to-all", "collective-permute"}


@pytest.mark.slow
@pytest.mark.parametrize(
  "case", [case for case in layouts.CASES if case.startswith("cudnn")]
)
def test_cudnns_rules_allow_every_layout(results, case):
  """Jax refuses layouts that its rules for cuDNN's attention do not know."""
  rich = "rich" in case
  want = results["rich, one device" if rich else "one device"]["losses"][:2]
  assert results[case]["num_visible"] % 2 == 1
  for got, exact in zip(results[case]["losses"], want, strict=True):
    assert got["loss"] == pytest.approx(exact["loss"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("case", layouts.CASES)
def test_a_step_reuses_the_memory_of_the_state_before_it(results, case):
  assert results[case]["old_state_is_given_up"]


# --- memory -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", layouts.CASES)
def test_devices_hold_what_was_planned(results, case):
  assert results[case]["held_bytes"] == results[case]["planned_bytes"]


def learned(config):
  """Returns the shapes of parameters and optimiser states."""
  shapes = build.Experiment(config, 10).shapes
  return {
    name: getattr(shapes, name)
    for name in ("params", "opt_state", "disc_params", "disc_opt_state")
  }


def planned(config, shapes, fsdp=1, tensor=1):
  """Returns bytes per device, and the notes."""
  mesh = AbstractMesh((1, fsdp, tensor), sharding.AXES)
  layout = build.lay_out(Architecture.from_config(config), mesh, shapes)
  return sharding.bytes_per_device(shapes, layout.shardings), layout.notes


def test_eight_devices_each_keep_an_eighth():
  config = pretrain_b.get_config()
  shapes = learned(config)
  whole, _ = planned(config, shapes)
  kept, notes = planned(config, shapes, fsdp=8)
  assert whole / 8 <= kept <= 1.05 * whole / 8
  assert not notes
  # tensor replicates weights outside of blocks: about 6%.
  kept, notes = planned(config, shapes, fsdp=4, tensor=2)
  assert whole / 8 <= kept <= 1.1 * whole / 8
  assert not notes


def test_what_does_not_divide_is_kept_whole_and_told():
  config = pretrain_s.get_config()
  config.model.depth = 1
  assert config.model.dec_num_heads == 3
  shapes = learned(config)
  whole, _ = planned(config, shapes)
  kept, notes = planned(config, shapes, fsdp=5, tensor=2)
  assert whole / 10 < kept < whole
  text = "\n".join(notes)
  assert (
    "params/decoder/blocks/attention/query/kernel: 3 heads do not divide "
    "over mesh.tensor=2, kept whole"
  ) in text
  assert "transformer/blocks/attention/query/kernel: 6 heads" not in text
  assert (
    "params/encoder/transformer/blocks/mlp_in/kernel: 384 along axis 0 do "
    "not divide over mesh.fsdp=5, kept whole"
  ) in text
  assert len(notes) == len(set(notes)) < 30


@pytest.mark.parametrize("name", ["pretrain_b", "pretrain_h", "quickstart"])
def test_every_matrix_has_a_rule_of_its_own(name):
  config = importlib.import_module(f"configs.{name}").get_config()
  config.model.depth = config.model.dec_depth = 1
  shapes = build.Experiment(config, 10).shapes
  mesh = AbstractMesh((1, 2, 2), sharding.AXES)
  layout = build.lay_out(Architecture.from_config(config), mesh, shapes)
  assert not layout.notes
  for part in ("params", "disc_params"):
    for path, s in jax.tree_util.tree_leaves_with_path(
      getattr(layout.shardings, part)
    ):
      where = jax.tree_util.keystr(path, simple=True, separator="/")
      # The discriminator's last kernel is (hidden, 1), in effect a vector.
      if "kernel" in where and where != "out/kernel":
        assert "fsdp" in s.spec, where


# --- bytes between devices ----------------------------------------------------


def textbook(result, fsdp, tensor, num_clips):
  """Returns the bytes that a step must exchange: (gathered, summed).

  fsdp puts every matrix together for the forward, and keeps it for the
  backward; those of the discriminator twice, for its own update and for the
  autoencoder's loss after it. Each gradient is summed once. Under tensor a
  device has its part of the blocks alone, and sums what enters and leaves each
  half of a block, forwards and backwards: four times a block.
  """
  sizes, pixels = layouts.SMALL, 3 * 2 * 16 * 16
  width, dec_width = sizes["model.width"], sizes["model.dec_width"]
  blocks = sum(
    4 * (4 * w * w + 2 * w * sizes[f"model.{prefix}mlp_dim"])
    for w, prefix in ((width, ""), (dec_width, "dec_"))
  )
  ends = 4 * (pixels * width + width * dec_width + dec_width * pixels)
  judge = 4 * pixels * sizes["adv.hidden"]
  elsewhere = blocks * (tensor - 1) // tensor
  put_together = blocks + ends + 2 * judge - elsewhere if fsdp > 1 else 0
  summed = result["param_bytes"] + result["disc_bytes"] - elsewhere
  if tensor > 1:
    for w, n in ((width, "num_visible"), (dec_width, "num_tokens")):
      summed += 4 * num_clips * result[n] * w * 4
  return put_together, summed


@pytest.mark.slow
@pytest.mark.parametrize("case", SPREAD)
def test_a_step_exchanges_the_textbook_bytes_and_nothing_else(results, case):
  _, num_clips, (_, fsdp, tensor), _ = layouts.CASES[case]
  found = results[case]["exchanged"]
  put_together, summed = textbook(results[case], fsdp, tensor, num_clips)
  assert found.pop("all-gather", 0) == pytest.approx(put_together, rel=0.1)
  # The CPU compiler, unlike those for TPU and GPU, emits an all-reduce in place
  # of a reduce-scatter; each device keeps its shard.
  reduced = found.pop("all-reduce", 0) + found.pop("reduce-scatter", 0)
  assert reduced == pytest.approx(summed, rel=0.1)
  assert not found


@pytest.mark.slow
def test_no_layout_moves_whole_activations(results):
  for case, result in results.items():
    kinds = result["exchanged"].keys()
    assert not kinds & {"all-to-all", "collective-permute"}, case


# --- the mesh -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
  """Stand-in for a device, with the attributes that a mesh needs."""

  id: int
  slice_index: int
  process_index: int = 0
  platform: str = "cpu"
  device_kind: str = "chip"


def chips(num_slices, per_slice, platform="cpu"):
  return [
    Chip(s * per_slice + i, s, platform=platform)
    for s in range(num_slices)
    for i in range(per_slice)
  ]


def test_data_takes_what_fsdp_and_tensor_leave():
  grid = sharding.arrange(-1, 2, 2, chips(1, 8))
  assert grid.shape == (2, 2, 2)
  assert [chip.id for chip in grid.ravel()] == list(range(8))


def test_slices_differ_along_data_alone():
  # Slices are interleaved, as a scheduler may list them.
  devices = sorted(chips(2, 8), key=lambda chip: chip.id % 8)
  grid = sharding.arrange(-1, 4, 2, devices)
  assert grid.shape == (2, 4, 2)
  for i, part in enumerate(grid):
    assert {chip.slice_index for chip in part.ravel()} == {i}


@pytest.mark.parametrize(
  ("sizes", "num_slices", "words"),
  [
    ((3, 1, 1), 1, "a mesh of 3, but there are 8 devices"),
    ((-1, 3, 1), 1, "3 x 1 does not divide; .*fsdp can be 1, 2, 4, 8$"),
    ((-1, 2, 3), 1, "2 x 3 does not divide; tensor can be 1, 2, 4, 8$"),
    ((1, 8, 1), 2, "not a multiple of the 2 slices.*fsdp can be 1, 2, 4$"),
  ],
)
def test_meshes_that_do_not_fit_are_refused(sizes, num_slices, words):
  with pytest.raises(sharding.MeshError, match=words):
    sharding.arrange(*sizes, chips(num_slices, 8 // num_slices))


def tpus(name, num_slices=1):
  """Returns the devices of a TPU topology; skips the test without libtpu."""
  pytest.importorskip("libtpu")
  return topology.find_devices(name, num_slices).devices


TPU_SLICES = (
  *(f"{chip}:{n}x{n}" for chip in ("v5e", "v6e") for n in (4, 8, 16)),
  "v5p:2x2x4",
)


@pytest.mark.parametrize("name", TPU_SLICES)
@pytest.mark.parametrize("num_slices", [1, 2])
def test_fsdp_and_tensor_are_arranged_on_tpu_slices(name, num_slices):
  devices = tpus(name, num_slices)
  sizes = [(fsdp, 1) for fsdp in (2, 4, 8, 16)]
  sizes += [(1, 2), (2, 2), (4, 2), (8, 2)]
  for fsdp, tensor in sizes:
    grid = sharding.arrange(-1, fsdp, tensor, devices)
    assert grid.shape == (len(devices) // fsdp // tensor, fsdp, tensor)
    assert {d.id for d in grid.flat} == {d.id for d in devices}
    if num_slices > 1:
      for part in grid:
        assert len({d.slice_index for d in part.flat}) == 1
    if tensor == 2:
      # Tensor exchanges most, and gets a link.
      coords = np.array([d.coords for d in grid.flat]).reshape(-1, 2, 3)
      assert (np.abs(coords[:, 0] - coords[:, 1]).sum(1) == 1).all()


def test_a_mesh_of_whole_axes_of_a_slice_is_not_split():
  """Runs that could start before keep their mesh, and so their sums."""
  devices = tpus("v5e:4x4")
  for sizes in [(16, 1, 1), (4, 4, 1), (1, 16, 1), (1, 4, 4)]:
    np.testing.assert_array_equal(
      sharding.arrange(*sizes, devices),
      mesh_utils.create_device_mesh(sizes, devices),
    )


def test_a_mesh_that_a_slice_cannot_hold_names_sizes_that_fit():
  with pytest.raises(
    sharding.MeshError, match=r"fsdp=10.*fsdp can be 1, 2, 4, 5, 8, "
  ) as e:
    sharding.arrange(-1, 10, 1, tpus("v5p:4x4x20"))
  assert " 10," not in str(e.value)


@pytest.mark.parametrize(
  ("fsdp", "tensor"), [(1, 1), (8, 1), (16, 1), (4, 2), (8, 2), (2, 8)]
)
def test_fsdp_spans_gpu_nodes_and_tensor_does_not(fsdp, tensor):
  devices = chips(2, 8, "gpu")
  # Nodes are interleaved, as a scheduler may list them.
  grid = sharding.arrange(
    -1, fsdp, tensor, sorted(devices, key=lambda gpu: gpu.id % 8)
  )
  assert grid.shape == (16 // fsdp // tensor, fsdp, tensor)
  assert grid.ravel().tolist() == devices


def test_tensor_over_gpu_nodes_is_refused_with_sizes_that_fit():
  with pytest.raises(
    sharding.MeshError,
    match=r"tensor=16: .* 2 nodes; tensor can be 1, 2, 4, 8$",
  ):
    sharding.arrange(-1, 1, 16, chips(2, 8, "gpu"))


def test_a_batch_that_does_not_divide_names_values_that_do():
  mesh = AbstractMesh((4, 2, 3), sharding.AXES)
  sharding.check_batch(mesh, 24)
  with pytest.raises(
    sharding.MeshError, match=r"expert.batch_size=30 .* 8 devices; .* 24, 32"
  ):
    sharding.check_batch(mesh, 30, "expert.batch_size")


def test_a_mesh_of_one_device_is_the_default():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
  assert sharding.batch_sharding(mesh).spec == P(("data", "fsdp"))


# --- float32 sums -------------------------------------------------------------


@pytest.mark.slow
# Without a device jax writes what it has compiled to the cache, and cannot read
# it in the next run.
@pytest.mark.filterwarnings(
  "ignore:Error reading persistent compilation cache:UserWarning"
)
def test_on_tpu_gradients_are_summed_in_float32_where_that_is_asked_for():
  config = quickstart.get_config()
  config.update_from_flattened_dict(
    {
      "dtype": "bfloat16",
      "float32_sums": True,
      "clips_per_device": 2,
      "data.num_frames": 2,
      "mask.strategy": "random",
      "model.depth": 1,
      "model.dec_depth": 1,
    }
  )
  mesh = sharding.make_mesh(devices=tpus("v5e:2x2"))
  experiment = build.Experiment(config, 10, mesh, device_bytes=2**33)
  text = experiment.lower_step().compile().as_text()
  sums = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
  assert sums
  assert not re.findall(r"bf16\[[^]]*\]", " ".join(sums))
