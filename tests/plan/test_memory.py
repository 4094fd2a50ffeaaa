"""Table-sized buffers: in modules and buffer assignments written by hand."""

import pytest

from gemjax.plan import memory
from gemjax.plan.hlo import Shape, shapes
from gemjax.plan.target import PlanError

ROWS = {1009}
T = "f32[1009,8]{1,0}"
MODULE = f"""HloModule jit_step, is_scheduled=true

%in_place (a: f32[1009,8], i: s32[4]) -> f32[1009,8] {{
  %a = {T} parameter(0)
  %b = {T} bitcast(%a)
  %i = s32[4]{{0}} parameter(1)
  ROOT %s = {T} scatter(%b, %i, %i), to_apply=%add
}}

%fresh (i: s32[4]) -> f32[1009,8] {{
  %i = s32[4]{{0}} parameter(0)
  %z = {T} broadcast(%i), dimensions={{}}
  ROOT %s = {T} scatter(%z, %i, %i), to_apply=%add
}}

%two (a: f32[1009,8], i: s32[4]) -> (f32[1009,8], f32[1009,8]) {{
  %a = {T} parameter(0)
  %i = s32[4]{{0}} parameter(1)
  %s = {T} scatter(%a, %i, %i), to_apply=%add
  %n = {T} negate(%a)
  ROOT %t = ({T}, {T}) tuple(%s, %n)
}}

ENTRY %main (p: f32[1009,8], i: s32[4]) -> f32[1009,8] {{
  %p = {T} parameter(0)
  %i = s32[4]{{0}} parameter(1)
  LINE
  ROOT %end = f32[4]{{0}} fusion(%p), kind=kLoop, calls=%fresh
}}
"""


@pytest.mark.parametrize(
  "line, found",
  [
    (f"%f = {T} fusion(%p, %i), kind=kInput, calls=%in_place", []),
    (f"%f = {T} fusion(%i), kind=kInput, calls=%fresh", ["fusion"]),
    (f"%f = ({T}, /*index=1*/{T}) fusion(%p, %i), kind=kInput, calls=%two", ["fusion"]),
    (f"%f = {T} scatter(%p, %i, %i), to_apply=%add", []),
    (f"%f = {T} dynamic-update-slice(%p, %i, %i)", []),
    (f"%f = {T} copy(%p)", ["copy"]),
    ("%f = bf16[8,1009]{1,0} transpose(%p), dimensions={1,0}", ["transpose"]),
    (f"%f = {T} bitcast(%p)", []),
    (f"%f = (s32[4]{{0}}, {T}) tuple(%i, %p)", []),
    (f'%f = {T} custom-call(%p), custom_call_target="k"', ["custom-call"]),
    (f'%f = {T} custom-call(%p), custom_call_target="k", '
     "output_to_operand_aliasing={{}: (0, {})}", []),
    (f'%f = ({T}, {T}) custom-call(%p, %p), custom_call_target="k", '
     "output_to_operand_aliasing={{1}: (0, {})}", ["custom-call"]),
    (f"%s = (f32[4]{{0}}, {T}) all-gather-start(%i), replica_groups={{}}\n"
     f"  %f = {T} all-gather-done(%s)", ["all-gather-done"]),
  ],
)  # fmt: skip
def test_what_writes_a_whole_table_is_found(line, found):
  text = MODULE.replace("LINE", line)
  assert [b.opcode for b in memory.buffers_like(text, ROWS)] == found
  assert memory.buffers_like(text, {7}) == []


def test_results_are_listed_without_parameters_names_and_the_inside_of_fusions():
  text = MODULE.replace("LINE", "%c = s32[4]{0} copy(%i)\n  %b = s32[2,2]{1,0} bitcast(%c)")
  assert [(b.name, b.shape) for b in memory.temporary_shapes(text)] == [
    ("c", Shape("s32", (4,))),
    ("end", Shape("f32", (4,))),
  ]


def test_shapes_and_their_bytes():
  found = shapes("((bf16[3,5]{1,0:T(8,128)}, pred[]), /*index=2*/s4[3]{0}, f8e4m3fn[7]{0}, c64[2])")
  assert [s.bytes for s in found] == [30, 1, 2, 7, 16]
  assert shapes("f32[]")[0].dims == ()


ASSIGNMENT = """BufferAssignment:
allocation 0: size 32288, parameter 0, shape |f32[1009,8]| at ShapeIndex {}, maybe-live-out:
 value: <1 p @0> (size=32288,offset=0): f32[1009,8]{1,0}
 value: <2 input_scatter_fusion @0> (size=32288,offset=0): f32[1009,8]{1,0}
allocation 1: size 16, parameter 1, shape |s32[4]| at ShapeIndex {}:
 value: <3 i @0> (size=16,offset=0): s32[4]{0}
allocation 2: size 4, constant:
 value: <4 c @0> (size=4,offset=0): f32[]
allocation 3: size 4, thread-local:
 value: <5 add @0> (size=4,offset=0): f32[]
allocation 4: size 8, maybe-live-out:
 value: <6 tuple.1{} @0> (size=8,offset=0): (f32[1009,8]{1,0})
allocation 5: size 32800, preallocated-temp:
 value: <7 gradient @0> (size=32288,offset=512): f32[1009,8]{1,0}
 value: <8 while.1{1} (phi) @0> (size=16,offset=0): s32[4]{0}

Total bytes used: 65120 (63.6KiB)

Used values:
"""


def test_a_buffer_assignment_is_read():
  found = memory.parse_allocations(ASSIGNMENT)
  assert [(a.kind, a.bytes, a.parameter, a.live_out) for a in found] == [
    ("parameter", 32288, 0, True),
    ("parameter", 16, 1, False),
    ("constant", 4, None, False),
    ("thread-local", 4, None, False),
    ("output", 8, None, True),
    ("temporary", 32800, None, False),
  ]
  assert found[5].values[1] == memory.Value("while.1{1} (phi)", 16, 0, Shape("s32", (4,)))
  assert [v.name for v in memory.allocated_like(found, ROWS)] == ["gradient"]


def test_an_assignment_that_is_not_understood_or_not_there_is_refused(tmp_path):
  with pytest.raises(PlanError, match="not understood"):
    memory.parse_allocations(ASSIGNMENT.replace("<7 gradient @0>", "gradient"))
  with pytest.raises(PlanError, match="no allocation"):
    memory.parse_allocations("")
  with pytest.raises(PlanError, match="holds 0 buffer assignments of programs named 'jit_f'"):
    memory.allocations(tmp_path, "jit_f")
  for n in (1, 2):
    (tmp_path / f"module_000{n}.jit_f.sm_9.0a-buffer-assignment.txt").write_text(ASSIGNMENT)
  with pytest.raises(PlanError, match="holds 2 buffer assignments"):
    memory.allocations(tmp_path, "jit_f")
