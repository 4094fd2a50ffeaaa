"""The roofline on programs written by hand, whose times can be summed on paper."""

import pytest

from gemjax.plan import collectives, rates
from gemjax.plan.estimate import by_module, estimate, module_of
from gemjax.plan.rates import Rates

GEMM = """custom_call_target="__cublas$lt$matmul", \
metadata={op_name="jit(f)/net/mlp/dot_general"}, \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}"""

# 2 x 4 devices on two hosts. Rows are scattered into a table of 10^6, in place; a loop turns three
# times; another as often as the data say.
PROGRAM = f"""HloModule jit_f, is_scheduled=true, num_partitions=8

%update (t: f32[1000000,64], i: s32[100,1], r: f32[100,64]) -> f32[1000000,64] {{
  %t = f32[1000000,64]{{1,0}} parameter(0)
  %i = s32[100,1]{{1,0}} parameter(1)
  %r = f32[100,64]{{1,0}} parameter(2)
  ROOT %s = f32[1000000,64]{{1,0}} scatter(%t, %i, %r), to_apply=%add
}}

%body (b: (s32[], bf16[4096,4096])) -> (s32[], bf16[4096,4096]) {{
  %b = (s32[], bf16[4096,4096]{{1,0}}) parameter(0)
  %n = s32[] get-tuple-element(%b), index=0
  %x = bf16[4096,4096]{{1,0}} get-tuple-element(%b), index=1
  %g = (bf16[4096,4096]{{1,0}}, s8[33554432]{{0}}) custom-call(%x, %x), {GEMM}
  %y = bf16[4096,4096]{{1,0}} get-tuple-element(%g), index=0
  ROOT %o = (s32[], bf16[4096,4096]{{1,0}}) tuple(%n, %y)
}}

%condition (b.1: (s32[], bf16[4096,4096])) -> pred[] {{
  %b.1 = (s32[], bf16[4096,4096]{{1,0}}) parameter(0)
  ROOT %p = pred[] constant(true)
}}

ENTRY %main (table: f32[1000000,64], at: s32[100,1], rows: f32[100,64], w: bf16[4096,4096]) -> () {{
  %table = f32[1000000,64]{{1,0}} parameter(0)
  %at = s32[100,1]{{1,0}} parameter(1)
  %rows = f32[100,64]{{1,0}} parameter(2)
  %w = bf16[4096,4096]{{1,0}} parameter(3)
  %zero = s32[] constant(0)
  %start = (bf16[4096,4096]{{1,0}}, bf16[16384,4096]{{1,0}}) all-gather-start(%w), channel_id=1, \
replica_groups=[2,4]<=[8], dimensions={{0}}, use_global_device_ids=true
  %first = (bf16[4096,4096]{{1,0}}, s8[33554432]{{0}}) custom-call(%w, %w), {GEMM}
  %done = bf16[16384,4096]{{1,0}} all-gather-done(%start)
  %new = f32[1000000,64]{{1,0}} fusion(%table, %at, %rows), kind=kInput, calls=%update, \
metadata={{op_name="jit(f)/update/scatter"}}
  %h = bf16[4096,4096]{{1,0}} get-tuple-element(%first), index=0
  %in = (s32[], bf16[4096,4096]{{1,0}}) tuple(%zero, %h)
  %loop = (s32[], bf16[4096,4096]{{1,0}}) while(%in), condition=%condition, body=%body, \
backend_config={{"known_trip_count":{{"n":"3"}}}}
  ROOT %rounds = (s32[], bf16[4096,4096]{{1,0}}) while(%loop), condition=%condition, body=%body
}}
"""
PEAKS = {"bf16": 1e15, "f32": 5e14, "f8e4m3fn": 2e15}
GPU = Rates(PEAKS, memory=3e12, nvlink=4e11, network=5e10, reached=0.5)
LAUNCH = 2e-6
PRODUCT = LAUNCH + 2 * 4096**3 / 0.5e15
GATHER = 10e-6 + 3 * 2 * 4096**2 / 2e11


def of_program(text=PROGRAM):
  found = collectives.collectives(text, {"data": 2, "model": 4})
  return estimate(text, found, GPU, gpus_per_host=4)


def test_a_step_is_the_sum_of_its_kernels_and_of_what_is_not_hidden():
  # 25,600 bytes read, 400 of places, 25,600 written, where the table has 256 million.
  rows = LAUNCH + 51_600 / 1.5e12
  done = of_program()
  assert done.exposed == pytest.approx(GATHER - PRODUCT)
  assert done.seconds == pytest.approx(GATHER + rows + 3 * PRODUCT + LAUNCH)
  assert done.flops() == done.flops("bf16") == 4 * 2 * 4096**3 and not done.flops("f8")
  assert by_module(done.operations) == pytest.approx({"net/mlp": 4 * PRODUCT, "update": rows})
  assert done.transfers[0].exposed == pytest.approx(done.exposed)


KERNELS = """HloModule jit_f, is_scheduled=true, num_partitions=1

ENTRY %main (x: f32[6000000], sums: f32[900000000]) -> f32[900000000] {
  %x = f32[6000000]{0} parameter(0)
  %sums = f32[900000000]{0} parameter(1)
  %one = f32[6000000]{0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(f)/block/pallas_call"}, backend_config={name = "jagged_attention_forward"}
  %two = f32[6000000]{0} custom-call(%one), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(f)/pool/pallas_call"}, backend_config={name = "jagged_pool_forward"}
  ROOT %three = f32[900000000]{0} custom-call(%two, %sums), \
custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{}: (1, {})}, \
metadata={op_name="jit(f)/add/pallas_call"}, backend_config={name = "sum_runs_combine_1"}
}
"""


def test_flops_of_kernels_are_of_those_that_multiply_and_in_place_is_no_traffic():
  done = estimate(KERNELS, [], GPU, gpus_per_host=1, kernel_flops=7e11)
  one_pass = 24e6 / 1.5e12  # Of 6,000,000 floats.
  assert by_module(done.operations) == pytest.approx(
    {"block": LAUNCH + 7e11 / 0.5e15, "pool": LAUNCH + 2 * one_pass, "add": LAUNCH + one_pass}
  )
  assert done.flops("bf16") == 7e11
  mosaic = KERNELS.replace("__gpu$xla.gpu.triton", "mosaic_gpu_v2", 1)
  mosaic = mosaic.replace('name = "jagged_attention_forward"', "")
  again = estimate(mosaic, [], GPU, gpus_per_host=1, kernel_flops=7e11)
  assert again.seconds == done.seconds and again.flops("bf16") == 7e11


def test_a_profile_tells_the_cost_of_one_execution_of_every_instruction():
  lines = of_program().profile(queued=2).splitlines()
  # In microseconds; of the links twice.
  product, rows = 1e6 * PRODUCT, 2 + 51_600 / 1.5e6
  expected = {"start": 2e6 * GATHER, "first": product, "new": rows, "g": product}
  expected |= {"loop": 3 * product, "rounds": 2}
  assert lines == [
    f'costs {{ name: "{name}" cost_us: {cost:.4f} }}' for name, cost in expected.items()
  ]


def test_what_is_scheduled_behind_the_end_hides_nothing():
  lines = PROGRAM.splitlines()
  at = next(i for i, line in enumerate(lines) if "%done =" in line)
  lines.insert(at - 1, lines.pop(at))
  assert of_program("\n".join(lines)).exposed == pytest.approx(GATHER)


def gather_of(name):
  return f"""(bf16[4096,4096]{{1,0}}, bf16[16384,4096]{{1,0}}) all-gather-start(%{name}), \
channel_id=1, replica_groups=[2,4]<=[8], dimensions={{0}}, use_global_device_ids=true"""


def beside_a_loop(products):
  """A gather that starts before a loop of three turns and ends behind it; in each turn another one
  beside some products.
  """
  product = f"(bf16[4096,4096]{{1,0}}, s8[33554432]{{0}}) custom-call(%x, %x), {GEMM}"
  lines = "\n".join(f"  %g{i} = {product}" for i in range(products))
  return f"""HloModule jit_f, is_scheduled=true, num_partitions=8

%body (b: (s32[], bf16[4096,4096])) -> (s32[], bf16[4096,4096]) {{
  %b = (s32[], bf16[4096,4096]{{1,0}}) parameter(0)
  %n = s32[] get-tuple-element(%b), index=0
  %x = bf16[4096,4096]{{1,0}} get-tuple-element(%b), index=1
  %inner = {gather_of("x")}
{lines}
  %end = bf16[16384,4096]{{1,0}} all-gather-done(%inner)
  ROOT %o = (s32[], bf16[4096,4096]{{1,0}}) tuple(%n, %x)
}}

%condition (c: (s32[], bf16[4096,4096])) -> pred[] {{
  %c = (s32[], bf16[4096,4096]{{1,0}}) parameter(0)
  ROOT %p = pred[] constant(true)
}}

ENTRY %main (w: bf16[4096,4096]) -> bf16[16384,4096] {{
  %w = bf16[4096,4096]{{1,0}} parameter(0)
  %zero = s32[] constant(0)
  %outer = {gather_of("w")}
  %in = (s32[], bf16[4096,4096]{{1,0}}) tuple(%zero, %w)
  %loop = (s32[], bf16[4096,4096]{{1,0}}) while(%in), condition=%condition, body=%body, \
backend_config={{"known_trip_count":{{"n":"3"}}}}
  ROOT %done = bf16[16384,4096]{{1,0}} all-gather-done(%outer)
}}
"""


def test_what_is_under_way_beside_a_loop_shares_the_links_with_it():
  assert PRODUCT < GATHER < 2 * PRODUCT
  # Links that never rest: the gathers of the turns, then the one that waited for them.
  busy = of_program(beside_a_loop(products=1))
  assert busy.seconds == pytest.approx(4 * GATHER)
  assert busy.exposed == pytest.approx(4 * GATHER - 3 * PRODUCT)
  # Three products a turn leave the links alone for long enough.
  idle = of_program(beside_a_loop(products=3))
  assert idle.seconds == pytest.approx(9 * PRODUCT) and idle.exposed == pytest.approx(0)


def test_a_product_of_fp8_takes_half_the_time():
  fp8 = PROGRAM.replace(
    "bf16[4096,4096]{1,0} parameter(3)", "f8e4m3fn[4096,4096]{1,0} parameter(3)"
  )
  assert of_program(fp8).flops("f8") == 2 * 4096**3
  assert of_program(fp8).operations[0].seconds == pytest.approx(LAUNCH + 4096**3 / 0.5e15)


@pytest.mark.parametrize(
  "kind, groups, size, seconds",
  [
    # Inside a host all over NVLink; of 7/8 S and so on `bytes` already tells.
    ("all-gather", [range(8)], 4e9, 10e-6 + 4e9 / 450e9),
    # Two hosts of 8: 8 of the 15 shares come from outside, once for the host, through 8 cards.
    ("all-gather", [range(16)], 15e9, 30e-6 + max(15e9 / 450e9, 8e9 / 8 / 50e9)),
    ("all-to-all", [range(16)], 15e9, 30e-6 + 8e9 / 50e9),
    # One device of every host: nothing goes over NVLink.
    ("all-reduce", [(0, 8), (1, 9)], 1e9, 30e-6 + 1e9 / 50e9),
    ("collective-permute", [(0, 1), (1, 0)], 1e9, 10e-6 + 1e9 / 450e9),
    ("collective-permute", [(7, 8), (8, 7)], 1e9, 30e-6 + 1e9 / 50e9),
    ("all-gather", [(0,), (1,)], 0, 0.0),
  ],
)
def test_seconds_of_links(kind, groups, size, seconds):
  found = collectives.Collective(
    kind, int(size), (), tuple(map(tuple, groups)), True, {}, 1, False, "c", ""
  )
  datasheet = rates.RATES["h100"]._replace(reached=1.0)
  assert rates.link_seconds(found, datasheet, 8) == pytest.approx(seconds)


@pytest.mark.parametrize(
  "op_name, module",
  [
    ("jit(f)/shard_map/jvp(net)/while/body/closed_call/mlp/bi,io->bo/dot_general", "net/mlp"),
    ("jit(f)/jvp()/eval_jaxpr/net/mlp/add", "net/mlp"),
    ("jit(f)/transpose(jvp(net))/mlp/transpose(bi,io->bo)/dot_general", "net/mlp (backward)"),
    ("jit(step)/shard_map/(update/all_gather:plan/all_gather)", "update"),
    ("", "step"),
  ],
)  # fmt: skip
def test_modules_are_named_by_their_scopes(op_name, module):
  assert module_of(op_name) == module
