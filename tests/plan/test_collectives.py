"""The reader of collectives against modules written by hand."""

import pytest

from gemjax.plan.collectives import collectives, parse_groups
from gemjax.plan.target import PlanError

MESH = {"data": 2, "model": 4}
HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=8\n\n"
MODEL = "channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true"
DATA = "channel_id=1, replica_groups=[4,2]<=[2,4]T(1,0), use_global_device_ids=true"


def entry(*lines):
  body = "\n".join(f"  {line}" for line in ("%p = f32[64,8]{1,0} parameter(0)", *lines))
  return f"ENTRY %main (p: f32[64,8]) -> f32[] {{\n{body}\n}}\n"


ADD = """%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}

"""


def one(*lines, before=""):
  (found,) = collectives(HEADER + ADD + before + entry(*lines), MESH)
  return found


@pytest.mark.parametrize(
  "attributes, groups",
  [
    ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
    ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ("replica_groups={}", (tuple(range(8)),)),
    (
      "replica_groups=mesh['a'=1,'b'=4,'c'=1,'d'=2], device_ids=([2,4]T(1,0)) {'b'}",
      ((0, 1, 2, 3), (4, 5, 6, 7)),
    ),
    (
      "replica_groups=mesh['a'=1,'b'=4,'c'=1,'d'=2], device_ids=([2,4]T(1,0)) {'d'}",
      ((0, 4), (1, 5), (2, 6), (3, 7)),
    ),
  ],
)
def test_groups_are_read_in_every_form(attributes, groups):
  assert parse_groups(f"{attributes}, dimensions={{0}}", "all-to-all", 8) == groups
  with_flag = f"channel_id=1, {attributes}, use_global_device_ids=true"
  assert parse_groups(with_flag, "all-reduce", 8) == groups


def test_groups_of_replicas_are_not_taken_for_groups_of_devices():
  everyone = (tuple(range(8)),)
  assert parse_groups("channel_id=1, replica_groups={{0}}", "all-reduce", 8) == everyone
  assert len(parse_groups("replica_groups={{0}}", "all-reduce", 8)) == 8


def test_groups_of_an_unknown_form_are_refused():
  with pytest.raises(PlanError, match="unknown form"):
    parse_groups("replica_groups=@mesh{a}", "all-to-all", 8)


S = 64 * 8 * 4


@pytest.mark.parametrize(
  "line, received, axes",
  [
    (f"f32[256,8]{{1,0}} all-gather(%p), {MODEL}", 3 * S, ("model",)),
    (f"f32[128,8]{{1,0}} all-gather(%p), {DATA}", S, ("data",)),
    (f"f32[16,8]{{1,0}} reduce-scatter(%p), {MODEL}, to_apply=%add", 3 * S // 4, ("model",)),
    (f"f32[64,8]{{1,0}} all-reduce(%p), {MODEL}, to_apply=%add", 3 * S // 2, ("model",)),
    ("f32[64,8]{1,0} all-reduce(%p), channel_id=1, replica_groups={}, use_global_device_ids=true",
     2 * 7 * S // 8, ("data", "model")),
    ("f32[64,8]{1,0} all-to-all(%p), channel_id=1, replica_groups=[2,4]<=[8]", 3 * S // 4,
     ("model",)),
    ("(f32[64,8]{1,0}, f32[64,8]{1,0}) all-to-all(%p, %p), replica_groups=[4,2]<=[2,4]T(1,0)",
     S, ("data",)),
    ("f32[64,8]{1,0} all-to-all(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", 0, ()),
    ("f32[64,8]{1,0} ragged-all-to-all(%p, %p, %p), replica_groups=[2,4]<=[8]", 3 * S // 4,
     ("model",)),
    ("f32[64,8]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}", S, ("model",)),
    ("f32[64,8]{1,0} collective-permute(%p), source_target_pairs={{0,4},{4,0}}", S, ("data",)),
    ("f32[64,8]{1,0} collective-permute(%p), source_target_pairs={{0,0},{1,1}}", 0, ()),
  ],
)  # fmt: skip
def test_bytes_and_axes_of_every_kind(line, received, axes):
  found = one(f"ROOT %c = {line}")
  assert (found.bytes, found.axes, found.async_, found.overlapped_ops) == (
    received,
    axes,
    False,
    {},
  )


STARTED = "%s = ((f32[64,8]{1,0}), f32[64,8]{1,0}) all-to-all-start(%p), replica_groups=[2,4]<=[8]"
DONE = '%d = f32[64,8]{1,0} all-to-all-done(%s), metadata={op_name="jit(step)/x"}'
MATMUL = '%m = (f32[64,8]{1,0}, s8[9]{0}) custom-call(%p), custom_call_target="__cublas$lt$matmul"'


def test_what_is_scheduled_between_start_and_done_is_counted():
  found = one(MATMUL.replace("%m", "%m0"), STARTED, MATMUL, "%t = tuple(%m)".replace(
    "= ", "= (s8[9]{0}) "), "%f = f32[] fusion(%p), kind=kLoop, calls=%add", DONE,
    MATMUL.replace("%m", "%m2"))  # fmt: skip
  assert found.overlapped_ops == {"__cublas$lt$matmul": 1, "fusion": 1}
  assert (found.matmuls, found.async_, found.axes, found.bytes) == (1, True, ("model",), 3 * S // 4)


def test_a_synchronous_start_is_not_async():
  sync = STARTED + ', backend_config={"collective_backend_config":{"is_sync":true}}'
  assert not one(sync, DONE).async_


def test_a_start_without_done_is_refused():
  with pytest.raises(PlanError, match="s has no done"):
    one(STARTED)


def test_a_wrapped_collective_is_seen_with_the_window_of_its_wrapper():
  wrapped = f"""%wrapped (q: f32[64,8]) -> f32[16,8] {{
  %q = f32[64,8]{{1,0}} parameter(0)
  ROOT %r = f32[16,8]{{1,0}} reduce-scatter(%q), {MODEL}, to_apply=%add, metadata={{op_name="in"}}
}}

"""
  found = one(
    "%s = ((f32[64,8]{1,0}), f32[16,8]{1,0}, s32[]) async-start(%p), calls=%wrapped",
    "%u = ((f32[64,8]{1,0}), f32[16,8]{1,0}, s32[]) async-update(%s)",
    MATMUL,
    "ROOT %d = f32[16,8]{1,0} async-done(%u)",
    before=wrapped,
  )
  assert (found.kind, found.bytes, found.matmuls, found.async_, found.op_name) == (
    "reduce-scatter", 3 * S // 4, 1, True, "in",
  )  # fmt: skip
  fused = one("ROOT %f = f32[16,8]{1,0} fusion(%p), kind=kCustom, calls=%wrapped", before=wrapped)
  assert (fused.kind, fused.async_) == ("reduce-scatter", False)


LOOPS = f"""%inner (q: f32[64,8]) -> f32[64,8] {{
  %q = f32[64,8]{{1,0}} parameter(0)
  %m = (f32[64,8]{{1,0}}, s8[9]{{0}}) custom-call(%q), custom_call_target="__cublas$gemm"
  ROOT %r = f32[64,8]{{1,0}} all-reduce(%q), {MODEL}, to_apply=%add
}}

%cond (c: f32[64,8]) -> pred[] {{
  ROOT %c = pred[] parameter(0)
}}

%outer (o: f32[64,8]) -> f32[64,8] {{
  %o = f32[64,8]{{1,0}} parameter(0)
  ROOT %w = f32[64,8]{{1,0}} while(%o), condition=%cond, body=%inner, KNOWN(3)
}}

"""


def known(n):
  return f'backend_config={{"known_trip_count":{{"n":"{n}"}}}}'


def test_trips_multiply_and_an_unknown_count_is_told():
  before = LOOPS.replace("KNOWN(3)", known(3))
  loop = "ROOT %w = f32[64,8]{1,0} while(%p), condition=%cond, body=%outer"
  assert one(f"{loop}, {known(5)}", before=before)[6:8] == (15, False)
  assert one(loop, before=before)[6:8] == (3, True)
  branch = "ROOT %b = f32[64,8]{1,0} conditional(%p), branch_computations={%cond, %inner}"
  assert one(branch, before=before)[6:8] == (1, True)


def test_a_loop_between_start_and_done_counts_with_its_turns():
  before = LOOPS.replace("KNOWN(3)", known(3))
  loop = f"%w = f32[64,8]{{1,0}} while(%p), condition=%cond, body=%outer, {known(5)}"
  found = collectives(HEADER + before + entry(STARTED, loop, DONE), MESH)
  assert {c.kind: c.overlapped_ops for c in found}["all-to-all"] == {"__cublas$gemm": 15}


def test_what_cannot_be_judged_is_refused():
  text = HEADER + entry(STARTED, DONE)
  with pytest.raises(PlanError, match="differ in size"):
    collectives(text, {"data": 2, "model": 2})
  with pytest.raises(PlanError, match="scheduled"):
    collectives(text.replace("is_scheduled=true, ", ""), MESH)
  with pytest.raises(PlanError, match="between devices"):
    one("%s = (f32[64,8]{1,0}, u32[], token[]) send(%p), channel_id=3")
  with pytest.raises(PlanError, match="no whole entry"):
    collectives(text[:-3], MESH)
