"""What a TPU's compiler writes: a whole program and single lines that it has given, by hand."""

import pathlib

import pytest

from unigrpo_jax.tools.plan import hlo

PROGRAMS = pathlib.Path(__file__).parent / "tpu_programs"

# Products as they were compiled for a v5p; batches become axes of a window with holes.
PRODUCTS = [
  # q . k, [2, 256, 8, 64] each
  ("2,256,8,64", "2,256,8,64", "2,8,256,256", "size=2x8 stride=1x7 lhs_dilate=2x8",
   "0b1f_0o1i->01bf", 2 * 2 * 8 * 256 * 256 * 64),
  # its gradient, where the window is turned round
  ("2,256,8,64", "2,8,256,256", "2,8,256,64",
   "size=2x8 stride=2x8 pad=1_1x7_7 lhs_dilate=1x7 rhs_reversal=1x1", "0f1b_01oi->01fb",
   2 * 2 * 8 * 256 * 256 * 64),
  # [2, 256, 512] by [512, 1024]
  ("2,256,512", "512,1024,1", "2,256,1024", "size=1", "0bf_io0->0bf", 2 * 2 * 256 * 512 * 1024),
  # the gradient of its weights: the batch is summed over
  ("2,256,512", "2,256,1024", "512,1024,1", "size=2", "0fb_0io->bf0", 2 * 2 * 256 * 512 * 1024),
]

REDUCE_SCATTER = """HloModule jit_step, is_scheduled=true, num_partitions=4

%add (x.1: bf16[], y.1: bf16[]) -> bf16[] {
  %x.1 = bf16[]{:T(256)} parameter(0)
  %y.1 = bf16[]{:T(256)} parameter(1)
  ROOT %add.1 = bf16[]{:T(256)} add(%x.1, %y.1)
}

%all-reduce-scatter.2.clone.1 (input_0.2: bf16[1024,512], input_1.2: bf16[512,1024]) -> (bf16[1024,256], bf16[256,1024]) {
  %input_0.2 = bf16[1024,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %input_1.2 = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(1)
  %all-reduce.17 = (bf16[1024,512]{1,0:T(8,128)(2,1)}, bf16[512,1024]{1,0:T(8,128)(2,1)}) all-reduce(%input_0.2, %input_1.2), channel_id=1, replica_groups={{0,2},{1,3}}, use_global_device_ids=true, to_apply=%add
  %get-tuple-element.344 = bf16[1024,512]{1,0:T(8,128)(2,1)} get-tuple-element(%all-reduce.17), index=0
  %constant.254 = u32[] constant(0)
  %constant.shard_id_table.4 = u32[4]{0:T(128)} constant({0, 0, 1, 1})
  %partition-id.11 = u32[] partition-id()
  %dynamic-slice.53 = u32[1]{0:T(128)} dynamic-slice(%constant.shard_id_table.4, %partition-id.11), dynamic_slice_sizes={1}
  %bitcast.164 = u32[]{:T(128)} bitcast(%dynamic-slice.53)
  %constant.255 = u32[] constant(256)
  %multiply.8 = u32[]{:T(128)} multiply(%bitcast.164, %constant.255)
  %dynamic-slice.54 = bf16[1024,256]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%get-tuple-element.344, %constant.254, %multiply.8), dynamic_slice_sizes={1024,256}
  %get-tuple-element.345 = bf16[512,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%all-reduce.17), index=1
  %dynamic-slice.55 = bf16[256,1024]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%get-tuple-element.345, %multiply.8, %constant.254), dynamic_slice_sizes={256,1024}
  ROOT %tuple.75 = (bf16[1024,256]{1,0:T(8,128)(2,1)S(1)}, bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}) tuple(%dynamic-slice.54, %dynamic-slice.55)
}

ENTRY %main (a: bf16[1024,512], b: bf16[512,1024]) -> (bf16[1024,256], bf16[256,1024]) {
  %a = bf16[1024,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %b = bf16[512,1024]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %fusion.149 = (bf16[1024,256]{1,0:T(8,128)(2,1)S(1)}, bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}) fusion(%a, %b), kind=kCustom, calls=%all-reduce-scatter.2.clone.1, metadata={op_name="jit(step)/dot_general"}
}
"""  # noqa: E501

GATHER_BESIDE_PRODUCTS = """HloModule jit_step, is_scheduled=true, num_partitions=4

%fused_computation.1 (input_0.1: bf16[256,512]) -> (bf16[256,512], bf16[1024,512]) {
  %input_0.1 = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[1024,512]{1,0:T(8,128)(2,1)} all-gather(%input_0.1), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  ROOT %tuple.1 = (bf16[256,512]{1,0:T(8,128)(2,1)}, bf16[1024,512]{1,0:T(8,128)(2,1)}) tuple(%input_0.1, %all-gather.1)
}

%async_collective_fusion.2 (input_0.2: bf16[256,512], input_1.2: bf16[64,128], input_2.2: bf16[128,32]) -> (bf16[64,32], bf16[1024,512]) {
  %input_0.2 = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %input_1.2 = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %input_2.2 = bf16[128,32]{1,0:T(8,128)(2,1)} parameter(2)
  %all-gather.2 = bf16[1024,512]{1,0:T(8,128)(2,1)} all-gather(%input_0.2), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
  %dot.2 = bf16[64,32]{1,0:T(8,128)(2,1)} dot(%input_1.2, %input_2.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %tuple.2 = (bf16[64,32]{1,0:T(8,128)(2,1)}, bf16[1024,512]{1,0:T(8,128)(2,1)}) tuple(%dot.2, %all-gather.2)
}

%fused_computation.3 (input_0.3: bf16[256,512]) -> bf16[1024,512] {
  %input_0.3 = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.3 = bf16[1024,512]{1,0:T(8,128)(2,1)} all-gather(%input_0.3), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
}

ENTRY %main (a: bf16[256,512], b: bf16[64,128], c: bf16[128,32]) -> (bf16[64,32], bf16[1024,512]) {
  %a = bf16[256,512]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %c = bf16[128,32]{1,0:T(8,128)(2,1)} parameter(2)
  %fusion.1 = (bf16[256,512]{1,0:T(8,128)(2,1)}, bf16[1024,512]{1,0:T(8,128)(2,1)}) fusion(%a), kind=kCustom, calls=%fused_computation.1
  %fusion.2 = (bf16[64,32]{1,0:T(8,128)(2,1)}, bf16[1024,512]{1,0:T(8,128)(2,1)}) fusion(%a, %b, %c), kind=kOutput, calls=%async_collective_fusion.2
  %fusion.3 = bf16[1024,512]{1,0:T(8,128)(2,1)} fusion(%a), kind=kCustom, calls=%fused_computation.3
  %get-tuple-element.1 = bf16[64,32]{1,0:T(8,128)(2,1)} get-tuple-element(%fusion.2), index=0
  ROOT %tuple.3 = (bf16[64,32]{1,0:T(8,128)(2,1)}, bf16[1024,512]{1,0:T(8,128)(2,1)}) tuple(%get-tuple-element.1, %fusion.3)
}
"""  # noqa: E501

UPDATE_IN_PLACE = """HloModule jit_step, is_scheduled=true, num_partitions=8

%fused_computation.35.clone.1 (param_0.141: bf16[3,128,512], param_1.111: s32[], param_2.53: bf16[128,512]) -> bf16[3,128,512] {
  %param_0.141 = bf16[3,128,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_2.53 = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(2)
  %bitcast.117 = bf16[1,128,512]{2,1,0:T(8,128)(2,1)} bitcast(%param_2.53)
  %param_1.111 = s32[]{:T(128)S(6)} parameter(1)
  %constant.214 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-update-slice.12 = bf16[3,128,512]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%param_0.141, %bitcast.117, %param_1.111, %constant.214, %constant.214)
}

ENTRY %main (stack: bf16[3,128,512], layer: s32[], gradient: bf16[128,512]) -> bf16[3,128,512] {
  %stack = bf16[3,128,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %layer = s32[]{:T(128)S(6)} parameter(1)
  %gradient = bf16[128,512]{1,0:T(8,128)(2,1)} parameter(2)
  ROOT %bitcast_dynamic-update-slice_fusion.8 = bf16[3,128,512]{2,1,0:T(8,128)(2,1)} fusion(%stack, %layer, %gradient), kind=kLoop, calls=%fused_computation.35.clone.1
}
"""  # noqa: E501

KERNEL_AND_PERMUTE = """HloModule jit_f, is_scheduled=true, num_partitions=8

%wrapped (x: f32[4,64,512]) -> f32[4,64,512] {
  %x = f32[4,64,512]{2,1,0:T(8,128)} parameter(0)
  ROOT %all_to_all.15 = f32[4,64,512]{2,1,0:T(8,128)} all-to-all(%x), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}

ENTRY %main (param.4: f32[256,512]) -> f32[4,64,512] {
  %param.4 = f32[256,512]{1,0:T(8,128)} parameter(0)
  %doubled.1 = f32[256,512]{1,0:T(8,128)} custom-call(%param.4), custom_call_target="tpu_custom_call", operand_layout_constraints={f32[256,512]{1,0}}, frontend_attributes={kernel_metadata={}}, metadata={op_name="jit(f)/shard_map/doubled/pallas_call"}, backend_config={"flag_configs":[],"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"123456","transcendentals":"0","bytes_accessed":"10"}}}
  %collective-permute-start = (f32[256,512]{1,0:T(8,128)}, f32[256,512]{1,0:T(8,128)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%doubled.1), channel_id=1, source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}, metadata={op_name="jit(f)/shard_map/ppermute"}
  %collective-permute-done = f32[256,512]{1,0:T(8,128)} collective-permute-done(%collective-permute-start), metadata={op_name="jit(f)/shard_map/ppermute"}
  %bitcast.11 = f32[4,64,512]{2,1,0:T(8,128)} bitcast(%collective-permute-done)
  %copy-start = (f32[4,64,512]{2,1,0:T(8,128)S(1)}, f32[4,64,512]{2,1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%bitcast.11)
  %copy-done = f32[4,64,512]{2,1,0:T(8,128)S(1)} copy-done(%copy-start)
  %exchange-start = ((f32[4,64,512]{2,1,0:T(8,128)S(1)}), f32[4,64,512]{2,1,0:T(8,128)}, u32[]{:S(2)}) async-start(%copy-done), calls=%wrapped, metadata={op_name="jit(f)/shard_map/all_to_all"}
  %exchange-update = ((f32[4,64,512]{2,1,0:T(8,128)S(1)}), f32[4,64,512]{2,1,0:T(8,128)}, u32[]{:S(2)}) async-update(%exchange-start), calls=%wrapped
  ROOT %exchange-done = f32[4,64,512]{2,1,0:T(8,128)} async-done(%exchange-update), calls=%wrapped
}
"""  # noqa: E501


@pytest.mark.parametrize("left, right, result, window, labels, flops", PRODUCTS)
def test_products_written_as_convolutions(left, right, result, window, labels, flops):
  program = hlo.read(f"""HloModule jit_step
ENTRY %main (a: bf16[{left}], b: bf16[{right}]) -> bf16[{result}] {{
  %a = bf16[{left}]{{0}} parameter(0)
  %b = bf16[{right}]{{0}} parameter(1)
  ROOT %c = bf16[{result}]{{0}} convolution(%a, %b), window={{{window}}}, dim_labels={labels}
}}
""")
  assert program.flops == flops


def test_a_recorded_program_of_two_loops():
  """Up to 100 tokens through 4 layers of [4, 512] x [512, 1024] x [1024, 512], tensor 2."""
  text = (PROGRAMS / "decode_v5p.txt").read_text()
  token = hlo.read(text)
  assert token.flops == 4 * 2 * (2 * 4 * 512 * 1024)
  layers, stop = hlo.read(text, unknown_trips=100).collectives
  mesh = {"fsdp": 4, "tensor": 2}
  assert (layers.kind, layers.bytes) == ("all-reduce", 4 * 512 * 2)
  assert (layers.times, hlo.axes(layers.groups, mesh)) == (400, ("tensor",))
  assert (stop.times, stop.bytes, hlo.axes(stop.groups, mesh)) == (101, 2, ("fsdp",))


def test_of_a_stack_of_weights_a_trip_reads_its_layer():
  """A layer's weights, seven activations of [4, 512] in bf16, and little before and after the loop.

  The fused products read one and write one, the all-reduce too, the sum reads two and writes one;
  the outer loop's condition reads one.
  """
  text = (PROGRAMS / "decode_v5p.txt").read_text()
  trips = [hlo.read(text, unknown_trips=trips).bytes for trips in (1, 2)]
  weights, activation = 2 * (512 * 1024) * 2, 4 * 512 * 2
  assert trips[1] - trips[0] == 4 * (weights + 7 * activation) + activation
  assert trips[0] - (trips[1] - trips[0]) < 8 * activation


def test_the_compilers_estimate_counts_as_often_as_it_runs():
  """A fusion of a loop: not what is fused, nor what the loop itself is noted to take."""
  noted = lambda cycles: f'backend_config={{"estimated_cycles":"{cycles}"'
  text = f"""HloModule jit_f, is_scheduled=true, num_partitions=1

%fused (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  ROOT %sine = f32[8]{{0}} sine(%a), {noted(1000)}}}
}}

%body (b: f32[8]) -> f32[8] {{
  %b = f32[8]{{0}} parameter(0)
  ROOT %fusion.1 = f32[8]{{0}} fusion(%b), kind=kLoop, calls=%fused, {noted(7)}}}
}}

%condition (c: f32[8]) -> pred[] {{
  %c = f32[8]{{0}} parameter(0)
  ROOT %go = pred[] custom-call(%c), custom_call_target="go", {noted(2)}}}
}}

ENTRY %main (d: f32[8]) -> f32[8] {{
  %d = f32[8]{{0}} parameter(0)
  %loop = f32[8]{{0}} while(%d), condition=%condition, body=%body, {noted(500)},"known_trip_count":{{"n":"10"}}}}
  ROOT %negated = f32[8]{{0}} negate(%loop), {noted(30)}}}
}}
"""  # noqa: E501
  assert hlo.read(text).cycles == 10 * 7 + 11 * 2 + 30
  assert hlo.read(REDUCE_SCATTER).cycles == 0


def test_a_reduce_scatter_in_a_fusion():
  """Of two arrays of 2**20 bytes at once; one of them lies in VMEM, and so do the results."""
  program = hlo.read(REDUCE_SCATTER)
  (collective,) = program.collectives
  assert (collective.kind, collective.bytes) == ("reduce-scatter", 2 * 2**20)
  assert hlo.axes(collective.groups, {"fsdp": 2, "tensor": 2}) == ("fsdp",)
  assert hlo.wire_bytes(collective) == 2**20
  assert program.bytes == 2**20


def test_a_gather_beside_products_counts_once():
  """It starts in one fusion, goes on in that of a product, and ends in another one."""
  program = hlo.read(GATHER_BESIDE_PRODUCTS)
  (collective,) = program.collectives
  assert (collective.kind, collective.bytes) == ("all-gather", 1024 * 512 * 2)
  assert program.flops == 2 * 64 * 128 * 32
  # Two that are not the same one.
  other = GATHER_BESIDE_PRODUCTS.replace("channel_id=1", "channel_id=2", 1)
  assert len(hlo.read(other).collectives) == 2


def test_an_update_in_place_moves_the_update():
  assert hlo.read(UPDATE_IN_PLACE).bytes == 2 * (128 * 512 * 2)


def test_kernels_and_asynchronous_exchanges_count_once():
  program = hlo.read(KERNEL_AND_PERMUTE)
  (kernel,) = program.custom_calls
  assert (kernel.name, kernel.flops, kernel.times) == ("doubled.1", 123456, 1)
  assert [(array.dtype, array.dims) for array in kernel.operands] == [("f32", (256, 512))]
  permute, exchange = program.collectives
  size = 256 * 512 * 4
  assert (permute.kind, permute.bytes) == ("collective-permute", size)
  assert hlo.axes(permute.groups, {"fsdp": 4, "tensor": 2}) == ("fsdp",)
  assert (exchange.kind, exchange.bytes) == ("all-to-all", size)
  # The kernel, the permute and the exchange read and write; the copy to VMEM only reads. What the
  # exchange is given lies in VMEM, which its own computation does not say.
  assert program.bytes == 7 * size
