"""Reading HLO text, on lines of the compilers for CPU, GPU and TPU."""

import pytest

from marlin_jax.planning import hlo


def computation(head, *lines):
  body = "".join(f"  {line}\n" for line in lines)
  return f"%{head} {{\n{body}}}\n\n"


def program(*lines, others=""):
  entry = computation("main.1 (p: f32[8]) -> f32[8]", *lines)
  return f"HloModule jit_step\n\n{others}ENTRY {entry}"


@pytest.mark.parametrize(
  ("line", "expected"),
  [
    pytest.param(
      "%all-reduce.79 = (f32[1,128]{1,0}, bf16[16]{0}) all-reduce(%a, %b), "
      "channel_id=3, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, "
      "use_global_device_ids=true, to_apply=%add",
      ("all-reduce", 544, 4),
      id="several_arrays_along_a_mesh_axis",
    ),
    pytest.param(
      "%all-gather = f32[64,32]{1,0} all-gather(%p), channel_id=1, "
      "replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], "
      "device_ids=([2,2,2]T(1,0,2)) {'axis_0'}, dimensions={0}",
      ("all-gather", 8192, 2),
      id="devices_in_another_order",
    ),
    pytest.param(
      "%all-gather.1 = bf16[64]{0:T(8,128)(2,1)S(1)} all-gather(%p), "
      "channel_id=1, replica_groups=mesh['a'=8] {'a':(2)4}, dimensions={0}",
      ("all-gather", 128, 4),
      id="a_part_of_a_mesh_axis",
    ),
    pytest.param(
      "%reduce-scatter = f32[8,32]{1,0} reduce-scatter(%p), channel_id=2, "
      "replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, to_apply=%add",
      ("reduce-scatter", 4096, 4),
      id="the_whole_of_what_is_scattered",
    ),
    pytest.param(
      "%all-gather-start = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), "
      "channel_id=4, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}",
      ("all-gather", 128, 4),
      id="asynchronous",
    ),
    pytest.param(
      "%collective-permute = pred[16]{0} collective-permute(%p), "
      "source_target_pairs={{0,1},{1,0}}",
      ("collective-permute", 16, 8),
      id="permute",
    ),
    pytest.param(
      "%all-to-all = s32[16]{0} all-to-all(%p), replica_groups={}, "
      "dimensions={0}",
      ("all-to-all", 64, 8),
      id="among_all",
    ),
  ],
)
def test_an_operation_is_read_with_its_size_and_group(line, expected):
  assert hlo.collectives(program(line), 8) == [hlo.Collective(*expected, 1)]


def test_what_is_no_exchange_is_left_out():
  text = program(
    "%all-reduce = f32[4]{0} all-reduce(%p), replica_groups=[8,1]<=[8]",
    "%add.all-reduce = f32[4]{0} add(%p, %all-reduce)",
  )
  assert hlo.collectives(text, 8) == []


def test_a_loop_counts_as_often_as_it_runs():
  reduce = (
    "all-reduce(%x), channel_id=1, replica_groups=[1,8]<=[8], to_apply=%add"
  )
  others = computation(
    "body.1 (p: (s32[], f32[4])) -> (s32[], f32[4])",
    f"%all-reduce.1 = f32[4]{{0}} {reduce}",
  ) + computation(
    "never_called (p: f32[4]) -> f32[4]",
    f"%all-reduce.2 = f32[4]{{0}} {reduce}",
  )
  loop = (
    "%while = (s32[], f32[4]) while(%t), condition=%cond, body=%body.1, "
    'backend_config={"known_trip_count":{"n":"12"}}'
  )
  (found,) = hlo.collectives(program(loop, others=others), 8)
  assert found == hlo.Collective("all-reduce", 16, 8, 12)
  assert hlo.total_bytes([found]) == {"all-reduce": 16 * 12}


def test_a_loop_whose_length_only_its_condition_tells_counts_too():
  # As the TPU compiler writes loops.
  others = computation(
    "body (p: (s32[], f32[4])) -> (s32[], f32[4])",
    "%all-reduce.1 = f32[4]{0} all-reduce(%x), channel_id=1, "
    "replica_groups=[1,8]<=[8], to_apply=%add",
  ) + computation(
    "cond (p: (s32[], f32[4])) -> pred[]",
    "%constant.7 = s32[]{:T(128)} constant(12)",
    "%i = s32[]{:T(128)} get-tuple-element(%p), index=0",
    "ROOT %lt.1 = pred[]{:T(512)} compare(%i, %constant.7), direction=LT",
  )
  loop = "%while = (s32[], f32[4]) while(%t), condition=%cond, body=%body"
  (found,) = hlo.collectives(program(loop, others=others), 8)
  assert found.times == 12


def test_what_slices_exchange_is_counted_as_often_as_it_is_sent():
  # Each send of a multislice TPU has an all-reduce in its slice before it.
  send = (
    "%send.1 = (bf16[2,8]{1,0:T(2,128)(2,1)}, u32[], token[]) send(%x, %t), "
    "channel_id=4, is_host_transfer=true, frontend_attributes={"
    '_xla_host_transfer_rendezvous="all-reduce.1_0",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}'
  )
  body = computation("body.1 (p: (s32[])) -> (s32[])", send)
  loop = (
    "%while = (s32[]) while(%t), condition=%cond, body=%body.1, "
    'backend_config={"known_trip_count":{"n":"3"}}'
  )
  assert hlo.bytes_to_slices(program(send, loop, others=body)) == 32 + 3 * 32


def test_memory_traffic_is_what_operations_take_and_give():
  text = program(
    "%p = f32[256]{0:T(256)} parameter(0)",
    "%b = f32[16,16]{1,0} bitcast(%p)",
    "%a = bf16[16,16]{1,0:T(8,128)(2,1)} convert(%b)",
    # Into the chip's own memory and out of it.
    "%c = bf16[16,16]{1,0:T(8,128)(2,1)S(1)} copy(%a)",
    "%d = bf16[16]{0} reduce(%c, %zero), to_apply=%add",
  )
  convert = 1024 + 512
  assert hlo.memory_bytes(text) == convert + 512 + 32


def test_of_what_is_sliced_only_the_slice_is_moved():
  others = computation(
    "fused (a: f32[100,8], i: s32[]) -> f32[1,8]",
    "%a = f32[100,8]{1,0} parameter(0)",
    "%i = s32[] parameter(1)",
    "ROOT %s = f32[1,8]{1,0} dynamic-slice(%a, %i, %i), dynamic_slice_sizes={}",
  ) + computation(
    "put (a: f32[100,8], i: s32[], x: f32[1,8]) -> f32[100,8]",
    "%a.1 = f32[100,8]{1,0} parameter(0)",
    "%i.1 = s32[] parameter(1)",
    "%x.1 = f32[1,8]{1,0} parameter(2)",
    "ROOT %u = f32[100,8]{1,0} dynamic-update-slice(%a.1, %x.1, %i.1, %i.1)",
  )
  text = program(
    "%all = f32[100,8]{1,0} parameter(0)",
    "%i = s32[] parameter(1)",
    "%one = f32[1,8]{1,0} fusion(%all, %i), kind=kLoop, calls=%fused",
    "%new = f32[100,8]{1,0} fusion(%all, %i, %one), kind=kLoop, calls=%put",
    others=others,
  )
  slice_bytes, index = 32, 4
  take = slice_bytes + index + slice_bytes
  put = index + slice_bytes + slice_bytes
  assert hlo.memory_bytes(text) == take + put


def test_a_slice_is_seen_inside_a_fusion_of_fusions():
  inner = computation(
    "inner (a: f32[100,8], i: s32[]) -> f32[1,8]",
    "%a.2 = f32[100,8]{1,0} parameter(0)",
    "%b.2 = f32[100,8]{1,0} bitcast(%a.2)",
    "%i.2 = s32[] parameter(1)",
    "ROOT %s.2 = f32[1,8]{1,0} dynamic-slice(%b.2, %i.2, %i.2)",
  )
  outer = computation(
    "outer (a: f32[100,8], i: s32[]) -> f32[1,8]",
    "%a.1 = f32[100,8]{1,0} parameter(0)",
    "%i.1 = s32[] parameter(1)",
    "ROOT %f = f32[1,8]{1,0} fusion(%a.1, %i.1), kind=kLoop, calls=%inner",
  )
  text = program(
    "%all = f32[100,8]{1,0} parameter(0)",
    "%i = s32[] parameter(1)",
    "%one = f32[1,8]{1,0} fusion(%all, %i), kind=kOutput, calls=%outer",
    others=inner + outer,
  )
  assert hlo.memory_bytes(text) == 32 + 4 + 32


def test_memory_that_is_only_set_aside_is_not_moved():
  text = program(
    '%all = f32[100,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"',
  )
  assert hlo.memory_bytes(text) == 0


def test_a_slice_fetched_ahead_into_fast_memory_is_read_once():
  text = program(
    "%all = f32[100,8]{1,0} parameter(0)",
    "%ahead = ((f32[100,8]{1,0}), f32[25,8]{1,0:S(1)}, s32[]{:S(2)}) "
    "slice-start(%all), slice={[0:25], [0:8]}",
    "%part = f32[25,8]{1,0:S(1)} slice-done(%ahead)",
  )
  assert hlo.memory_bytes(text) == 25 * 8 * 4


def test_the_tpu_compilers_fused_operations_count_once_by_their_real_kind():
  gather = (
    "all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}"
  )
  fused = computation(
    "all-reduce-scatter.1 (a: f32[8]) -> f32[2]",
    "%all-reduce.3 = f32[8]{0} all-reduce(%a), channel_id=1, "
    "replica_groups={{0,2,4,6},{1,3,5,7}}",
  )
  # Two gathers of one channel; the first is spread over two computations.
  for i, chain in ((1, 0), (2, 0), (3, 1)):
    fused += computation(
      f"async_collective_fusion.{i} (p: bf16[4]) -> bf16[16]",
      f"%all-gather.{i} = bf16[16]{{0}} {gather}"
      f', frontend_attributes={{chain_id="{chain}"}}',
    )
  text = program(
    "%f1 = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1",
    "%f2 = bf16[16]{0} fusion(%p), calls=%async_collective_fusion.1",
    "%f3 = bf16[16]{0} fusion(%p), calls=%async_collective_fusion.2",
    "%f4 = bf16[16]{0} fusion(%p), calls=%async_collective_fusion.3",
    others=fused,
  )
  assert hlo.total_bytes(hlo.collectives(text, 8)) == {
    "reduce-scatter": 32,
    "all-gather": 64,
  }


def test_pallas_kernels_are_counted_and_end_no_computation():
  attributes = 'frontend_attributes={kernel_metadata={\n"block": "1"\n}}'
  target = (
    f'custom-call(%p), custom_call_target="tpu_custom_call", {attributes}'
  )
  text = program(
    f"%splash_mha_fwd_residuals.1 = f32[8]{{0}} {target}",
    "%x = f32[8]{0} get-tuple-element(%splash_mha_fwd_residuals.1), index=0",
    f"%splash_mha_dkv_no_residuals.2 = f32[8]{{0}} {target}",
    "%sum = f32[8]{0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add",
  )
  assert hlo.fused_attention(text) == {"forward": 1, "backward": 1}
  assert len(hlo.collectives(text, 8)) == 1


@pytest.mark.parametrize(
  ("groups", "num_nodes"),
  [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", 1),
    ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", 2),
    ("replica_groups=[2,4]<=[8]", 1),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", 1),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", 2),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", 2),
    ("replica_groups=mesh['a'=8] {'a':(2)4}", 1),
    ("replica_groups=mesh['a'=8] {'a':(1)2}", 2),
    ("replica_groups={}", 2),
  ],
)
def test_groups_that_span_machines_are_told_from_others(groups, num_nodes):
  text = program(f"%x = f32[8]{{0}} all-reduce(%p), {groups}, to_apply=%add")
  (found,) = hlo.collectives(text, 8, per_node=4)
  assert found.num_nodes == num_nodes
  (found,) = hlo.collectives(text, 8)
  assert found.num_nodes == 1


def test_fused_attention_is_counted_as_often_as_it_runs():
  """A scanned stack of blocks is a loop; its calls run once a block."""
  body = computation(
    "body (p: f32[8]) -> f32[8]",
    '%f = bf16[8]{0} custom-call(%p), custom_call_target="__cudnn$fmhaSoftmax"',
    "%b = bf16[8]{0} custom-call(%p), "
    'custom_call_target="__cudnn$fmhaSoftmaxBackward"',
  )
  text = program(
    "%w = f32[8]{0} while(%p), condition=%c, body=%body, "
    'backend_config={"known_trip_count":{"n":"12"}}',
    '%f = bf16[8]{0} custom-call(%p), custom_call_target="__cudnn$fmhaSoftmax"',
    '%g = bf16[8]{0} custom-call(%p), custom_call_target="__cublas$gemm"',
    others=body,
  )
  assert hlo.fused_attention(text) == {"forward": 13, "backward": 12}


def test_what_the_compiler_computes_twice_is_counted():
  fusion = computation(
    "fused_multiply (p: f32[8]) -> f32[8]",
    "%a.remat = f32[8]{0} add(%p, %p)",
  )
  text = program(
    "%fusion.1.remat = f32[8]{0} fusion(%p), calls=%fused_multiply",
    "%fusion.2.remat.1 = f32[8]{0} fusion(%p), calls=%fused_multiply",
    '%rematerialised = f32[8]{0} add(%p, %p), metadata={op_name="a.remat"}',
    others=fusion,
  )
  assert hlo.rematerialised(text) == 2
