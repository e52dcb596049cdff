"""The plan command, with real compilations for TPU and CPU."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import types

import pytest

from configs import pretrain_b
from marlin_jax.devices import chips, sharding
from marlin_jax.planning import (
  compiled_step,
  hlo,
  report,
  roofline,
  search,
  topology,
)
from marlin_jax.pretraining import build, configuration
from tests.support.processes import ROOT

GIB = 2**30

SMALL = {
  "batch_size": 8,
  "num_steps": 10,
  "num_epochs": 0.0,
  "data.num_frames": 2,
  "mask.strategy": "random",  # sorts less, which takes libtpu long to compile
  "model.width": 128,
  "model.depth": 1,
  "model.num_heads": 2,
  "model.mlp_dim": 256,
  "model.dec_width": 128,
  "model.dec_depth": 1,
  "model.dec_num_heads": 2,
  "model.dec_mlp_dim": 256,
  "adv.hidden": 64,
}


needs_cuda_plugin = pytest.mark.skipif(
  not topology.has_cuda_plugin(),
  reason="needs jax's CUDA plugin: pip install 'marlin-jax[plan-gpu]'",
)


def run(*args, config="pretrain_b", binary=("-m", "marlin_jax.plan"), **values):
  """Runs the plan command or another script, by default on a small network."""
  values = (SMALL if config == "pretrain_b" else {}) | values
  return subprocess.run(
    [
      *(sys.executable, *binary, f"--config=configs/{config}.py", *args),
      *(f"--config.{key}={value}" for key, value in values.items()),
    ],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
    timeout=280,
  )


def small(**values):
  config = pretrain_b.get_config()
  config.update_from_flattened_dict(SMALL | values)
  return config


def quiet(what):
  return contextlib.nullcontext()


def here(memory_bytes):
  """Returns one device of this process with a made-up amount of memory."""
  found = topology.find_devices("here")
  return dataclasses.replace(
    found, devices=found.devices[:1], memory_bytes=memory_bytes
  )


# --- the command --------------------------------------------------------------


@pytest.mark.slow
def test_a_step_is_compiled_for_tpus_that_are_not_there():
  pytest.importorskip("libtpu")
  result = run("--topology=v5e:2x2", "--json=-", "--nosearch", dtype="bfloat16")
  assert result.returncode == 0, result.stderr
  found = json.loads(result.stdout)
  assert (found["num_devices"], found["device_kind"]) == (4, "TPU v5 lite")
  assert found["fits"]
  assert found["memory_bytes"] == chips.find("TPU v5 lite").hbm_bytes
  # The compiler may pad.
  state = sum(found["state_bytes"].values())
  assert state <= found["memory"]["arguments"] < 1.5 * state
  assert found["state_bytes"]["parameters"] >= 4 * found["num_params"]
  assert found["state_bytes"]["optimisers"] >= 8 * found["num_params"]
  # Each gradient is summed once, in bfloat16 or float32.
  (row,) = found["collectives"]
  assert (row["kind"], row["devices"]) == ("all-reduce", 4)
  assert 2 <= row["bytes"] / found["num_params"] <= 4
  rate = found["rate"]
  assert rate["step_secs"] == rate["least_secs"][rate["binds"]] > 0
  assert rate["hbm_bytes_per_device"] > state
  assert rate["clips_per_sec"] == pytest.approx(8 / rate["step_secs"])
  assert rate["input_clips_per_sec_per_host"] == rate["clips_per_sec"]
  assert found["compile_secs"] > 0


def test_what_reading_needs_is_told_beside_what_was_measured():
  config = pretrain_b.get_config()
  step = types.SimpleNamespace(config=config)
  rate = {"input_clips_per_sec_per_host": 5850, "input_cores_per_host": 16.7}
  (needed,) = report._reading_lines(step, rate)
  assert "5850 clips/s of each host: 17 cores" in needed
  config.data.num_workers = 0
  advice = report._reading_lines(step, rate)[-1]
  assert "threads of one process read at most 2000 clips/s" in advice
  rate["input_clips_per_sec_per_host"] = 500
  assert len(report._reading_lines(step, rate)) == 1


@needs_cuda_plugin
def test_a_step_is_compiled_for_gpu_nodes_that_are_not_there():
  result = run(
    "--topology=h200:4x2",
    "--json=-",
    "--nosearch",
    dtype="bfloat16",
    **{"mesh.fsdp": 4, "model.depth": 2},
  )
  assert result.returncode == 0, result.stderr
  found = json.loads(result.stdout)
  assert (found["num_devices"], found["num_hosts"]) == (8, 2)
  assert found["device_kind"] == "NVIDIA H200"
  assert found["memory_bytes"] == 0.75 * chips.find("NVIDIA H200").hbm_bytes
  # Three blocks; an odd number of tokens is visible.
  assert found["fused_attention"] == {"forward": 3, "backward": 3}
  kinds = {(row["kind"], row["devices"]) for row in found["collectives"]}
  assert {("all-gather", 4), ("reduce-scatter", 4), ("all-reduce", 2)} <= kinds
  assert found["rate"]["least_secs"]["network"] > 0
  assert found["fits"]


def test_what_the_tpu_compiler_refuses_does_not_fit_by_so_much():
  pytest.importorskip("libtpu")
  result = run(
    "--topology=v5e:2x2",
    "--nosearch",
    batch_size=80_000,
    clips_per_device=20_000,
  )
  assert result.returncode == 1
  assert "does not fit by" in result.stdout
  assert "the compiler refused it" in result.stdout
  assert "Traceback" not in result.stderr


def test_cpu_devices_are_planned_for_in_words_and_numbers(tmp_path):
  path = tmp_path / "new" / "plan.json"
  result = run(
    "--topology=cpu:2",
    "--nosearch",
    f"--json={path}",
    clips_per_device=2,
    **{"mesh.fsdp": 2},
  )
  assert result.returncode == 0, result.stderr
  text = result.stdout
  assert "2 x cpu of 1 host; mesh data 1, fsdp 2, tensor 1" in text
  assert "2 at once in 2 microbatches, set by clips_per_device" in text
  assert "no estimate of the rate: the peak of cpu is not known" in text
  assert "compiling for cpu:2" in result.stderr
  found = json.loads(path.read_text())
  assert found["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1}
  assert (found["num_parts"], found["num_parts_training_chooses"]) == (2, 1)
  whole = 4 * found["num_params"]
  assert whole / 2 < found["state_bytes"]["parameters"] < whole
  kinds = {row["kind"] for row in found["collectives"]}
  assert "all-gather" in kinds
  assert "flops_per_clip" in found["rate"]
  assert "clips_per_sec" not in found["rate"]


CURRICULUM = "3: data.frame_size=112"


@pytest.mark.slow
def test_every_stage_of_a_curriculum_is_compiled():
  steps = compiled_step.compile_steps(
    small(curriculum=CURRICULUM), here(GIB), quiet
  )
  assert [step.stage for step in steps] == [0, 1]
  assert steps[0].needed_bytes < steps[1].needed_bytes
  assert steps[0].num_params == steps[1].num_params
  first, *_ = report.stages_text(steps).splitlines()
  assert first.startswith(
    "stage 1 of 2: 2 frames of 112 pixels, 4 of 49 tokens visible; 0.0"
  )


@pytest.mark.slow
def test_the_stage_that_needs_the_most_memory_is_reported_in_full(tmp_path):
  path = tmp_path / "plan.json"
  result = run(
    "--topology=cpu:1", "--nosearch", f"--json={path}", curriculum=CURRICULUM
  )
  assert result.returncode == 0, result.stderr
  assert "stage 2 needs the most memory:\nnetwork " in result.stdout
  assert "compiling stage 2 of 2 for cpu:1" in result.stderr
  found = json.loads(path.read_text())
  assert [stage["clips"] for stage in found["stages"]] == [
    "2 frames of 112 pixels, 4 of 49 tokens visible",
    "2 frames of 224 pixels, 19 of 196 tokens visible",
  ]
  assert found["needed_bytes"] == found["stages"][1]["needed_bytes"]


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["--topology=v5e:4"], "v5e has 2 sides and at most 256 chips"),
    (["--topology=cpu:2", "--num_slices=2"], "has no slices"),
    (["--topology=cpu:2", "--json=tests"], "--json=tests is a folder"),
  ],
)
def test_bad_flags_are_told_before_anything_is_built(args, words):
  result = run(*args)
  assert result.returncode == 1
  assert words in result.stderr
  assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
  ("tensor", "num_shards", "of_host"), [(1, 16, 4), (4, 4, 2), (8, 2, 1)]
)
def test_hosts_that_share_clips_all_read_them(tensor, num_shards, of_host):
  pytest.importorskip("libtpu")
  devices = topology.find_devices("v5e:4x4")
  assert devices.num_hosts == 4
  mesh = sharding.make_mesh(tensor=tensor, devices=devices.devices)
  assert sharding.num_shards(mesh) == num_shards
  assert compiled_step.shards_per_host(mesh) == of_host


# --- topologies ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "kind", "shape"),
  [
    ("v5e:4x4", "v5e", (4, 4)),
    ("v6e:16x16", "v6e", (16, 16)),
    ("v5p:4x4x8", "v5p", (4, 4, 8)),
    ("h200:8", "h200", (8, 1)),
    ("a100:8x4", "a100", (8, 4)),
    ("cpu:8", "cpu", (8,)),
    ("here", "here", ()),
  ],
)
def test_topologies_are_read(name, kind, shape):
  assert topology.parse(name) == (kind, shape)


@pytest.mark.parametrize(
  "name",
  [
    *("", "v5e", "v5e:4x4x4", "v5p:4x4", "v5e:32x16", "cpu:0", "tpu:8"),
    *("h100", "h100:0", "h100:16", "h100:8x4x4", "v100:8"),
  ],
)
def test_a_bad_topology_is_answered_with_good_ones(name):
  with pytest.raises(topology.TopologyError) as e:
    topology.parse(name)
  assert name in str(e.value)
  assert ":4x4" in str(e.value) or "h100:8x4" in str(e.value)


def test_without_libtpu_the_error_says_how_to_get_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(topology.TopologyError, match=r"pip install 'marlin-jax"):
    topology.find_devices("v5e:2x2")


def test_without_the_cuda_plugin_the_error_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(topology, "_CUDA_PLUGINS", ("no_such_plugin",))
  with pytest.raises(topology.TopologyError, match=r"marlin-jax\[plan-gpu\]"):
    topology.find_devices("h200:8")


# --- what fits ----------------------------------------------------------------


@pytest.mark.parametrize(
  ("state", "fixed", "per_clip", "first"),
  # GiB of S on v5e, B on H200 and L on H200, and a network with a large state.
  [(0.06, 0, 0.22, 8), (0.6, 0.5, 0.225, 32), (1, 0, 0.71, 2), (12, 1, 0.1, 1)],
)
def test_a_few_guesses_fill_the_memory_and_none_exceeds_it(
  state, fixed, per_clip, first
):
  available = 15.75 * GIB
  needed, clips = {0: state * GIB}, first
  for _ in range(3 if state < 12 else 4):
    needed[clips] = (state + fixed + clips * per_clip) * GIB
    assert needed[clips] <= available
    clips = search.guess(needed, available)
  assert needed[max(needed)] > 0.93 * available
  assert clips - max(needed) <= max(needed) // 16


@pytest.mark.slow
@pytest.mark.parametrize(("together", "num_microbatches"), [(1, 1), (8, 2)])
def test_the_largest_batch_that_fits_fills_the_memory(
  together, num_microbatches
):
  devices = here(GIB // 2)
  config = small(
    batch_size=8 * num_microbatches,
    clips_per_device=8,
    **{"data.draws_per_unit": together},
  )
  step = compiled_step.compile_step(config, devices, quiet)
  compilations = []

  def counted(message):
    compilations.append(message)
    return quiet(message)

  best = search.largest(step, counted)
  assert len(compilations) <= 3
  assert best.fits
  assert best.num_microbatches == num_microbatches
  assert best.clips_at_once > 2 * step.clips_at_once
  assert best.needed_bytes > 0.9 * devices.memory_bytes
  configuration.validate(best.config)


@pytest.mark.slow
def test_a_configuration_that_does_not_fit_is_told_what_would():
  devices = here(GIB // 8)
  config = small(batch_size=64, clips_per_device=64)
  step = compiled_step.compile_step(config, devices, quiet)
  assert not step.fits
  tried = []
  for changes in search.remedies(step):
    changed = compiled_step.with_changes(config, changes)
    tried.append(compiled_step.compile_step(changed, devices, quiet))
    if tried[-1].fits:
      break
  assert tried[-1].fits
  assert config.batch_size == tried[-1].config.batch_size
  assert len(tried) <= 3


@pytest.fixture(scope="module")
def too_large():
  """Returns a step that compares clips, on a device that is too small."""
  config = small(
    batch_size=16,
    clips_per_device=8,
    **{"contrast.weight": 1.0, "data.draws_per_unit": 2},
  )
  step = compiled_step.compile_step(config, here(GIB), quiet)
  available = (sum(step.state_bytes.values()) + step.needed_bytes) // 2
  return dataclasses.replace(step, topology=here(available))


@pytest.mark.slow
def test_input_is_that_of_the_shards_and_frames_of_a_host(too_large):
  pytest.importorskip("libtpu")
  step = dataclasses.replace(
    too_large,
    topology=topology.find_devices("v5e:4x4"),
    mesh={"data": 4, "fsdp": 1, "tensor": 4},
    shards_per_host=2,
  )
  rate = report.numbers(step)["rate"]
  per_shard = pytest.approx(rate["clips_per_sec"] / 4)
  assert rate["input_bytes_per_sec_per_device"] / step.clip_bytes == per_shard
  assert rate["input_clips_per_sec_per_host"] / 2 == per_shard
  # Two frames in a clip, of the 5600 that a core reads.
  assert rate["input_cores_per_host"] * 5600 / (2 * 2) == per_shard


@pytest.mark.slow
def test_a_remedy_leaves_enough_clips_to_compare(too_large):
  remedies = [*search.remedies(too_large)]
  found = {x["clips_per_device"] for x in remedies if "clips_per_device" in x}
  assert min(found) == 4
  for clips in found:
    changed = compiled_step.with_changes(
      too_large.config, {"clips_per_device": clips}
    )
    build.Experiment(changed, 10).lower_step()


@pytest.mark.slow
def test_a_remedy_keeps_weights_within_a_slice(too_large):
  pytest.importorskip("libtpu")
  devices = topology.find_devices("v5e:2x2", 2)
  step = dataclasses.replace(
    too_large,
    topology=dataclasses.replace(devices, memory_bytes=0),
    mesh={"data": 4, "fsdp": 1, "tensor": 2},
  )
  (spread, *_) = search.remedies(step)
  assert spread == {"mesh.data": 2, "mesh.fsdp": 2}
  changed = compiled_step.with_changes(step.config, spread | {"mesh.tensor": 2})
  mesh = sharding.make_mesh(**changed.mesh, devices=devices.devices)
  assert mesh.shape["fsdp"] == 2


@pytest.mark.slow
def test_the_memory_planned_is_the_memory_that_a_run_takes():
  result = run(
    config="pretrain_s",
    binary=[str(ROOT / "tests" / "support" / "measured_memory.py")],
    batch_size=3,
    clips_per_device=3,
    **{"model.depth": 1, "model.dec_depth": 4, "mask.strategy": "random"},
  )
  assert result.returncode == 0, result.stderr
  found = json.loads(result.stdout.splitlines()[-1])
  assert found["planned"] > GIB / 2
  assert found["measured"] == pytest.approx(found["planned"], rel=0.1)


# --- the least time -----------------------------------------------------------


def test_the_slowest_resource_binds():
  chip = chips.find("TPU v5 lite")
  sums = [hlo.Collective("all-reduce", 10**9, 4, 2)]
  roof = roofline.estimate(
    chip, chip.bfloat16, flops=197e9, hbm_bytes=819e6, collectives=sums
  )
  assert roof.compute == pytest.approx(1e-3)
  assert roof.hbm == pytest.approx(1e-3)
  # Each of four devices sends three quarters of the array, twice for an
  # all-reduce, and there are two.
  assert roof.links == pytest.approx(2 * 2 * 0.75 * 1e9 / 200e9)
  assert (roof.binds, roof.secs) == ("links", roof.links)
  assert roof.network == 0


def test_what_spans_machines_takes_their_network():
  chip = chips.find("NVIDIA H200")
  (secs_links, secs_network) = (
    8e9 * 3 / 4 / chip.link_bandwidth,
    8e9 / 4 * 1 / 2 / chip.network_bandwidth,
  )
  gathered = [hlo.Collective("all-gather", 8 * 10**9, 8, 1, num_nodes=2)]
  roof = roofline.estimate(
    chip, chip.bfloat16, flops=1, hbm_bytes=1, collectives=gathered
  )
  assert roof.links == pytest.approx(secs_links)
  assert roof.network == pytest.approx(secs_network)
  assert roof.binds == "network"


def test_a_network_of_unknown_speed_is_no_bound():
  chip = chips.find("TPU v4")
  roof = roofline.estimate(
    chip,
    chip.float32,
    flops=1e12,
    hbm_bytes=0,
    collectives=[],
    network_bytes=1e9,
  )
  assert roof.network is None
  assert roof.binds == "compute"
