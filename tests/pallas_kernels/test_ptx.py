"""Counting instructions of PTX, and the report of ptxas, in texts written by hand."""

import pytest

from pallas_kernels.deviceless import ptx
from pallas_kernels.deviceless.target import DevicelessError, has_cuda_wheels

KERNEL = """
.version 8.8
.target sm_90a
.visible .entry scatter(
	.param .u64 scatter_param_0
)
{
	.reg .pred 	%p<4>;
	.reg .b32 	%red<18>;
	// atom.global.cas.b32 in a comment
$L__BB0_2:
	atom.relaxed.sys.global.cas.b32 	%r5, [%rd3], %r17, %r16;
	@%p3 atom.global.v4.f32.add 	{%f1, %f2, %f3, %f4}, [%rd1], {%f5, %f6, %f7, %f8};
	red.global.add.noftz.bf16x2 [%rd1], %r2;
	red.relaxed.gpu.global.add.f32 [%rd1], %f1; atom.global.max.s32 %r1, [%rd1], %r2;
	// begin inline asm
	{ @!%p1 wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e5m2 {%f1}, %rd1, %rd2, 1; }
	// end inline asm
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}, {%r1}, {%r2}, {%f1};
	tcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r3, 1;
	cvt.rn.satfinite.e4m3x2.f32 %rs1, %f1, %f2;
	ret;
}
"""


def test_instructions_are_counted():
  assert ptx.count(KERNEL) == ptx.Code(
    kernels=("scatter",), cas=1, adds=3, vector_adds=2, mma=1, wgmma=1, tcgen05=1, fp8=2
  )


def test_a_folder_is_scanned_and_an_empty_one_refused(tmp_path):
  with pytest.raises(DevicelessError, match="no PTX of a program named 'jit_f'"):
    ptx.cas_loops(tmp_path, "jit_f")
  (tmp_path / "module_0001.jit_f.1.ptx").write_text(KERNEL)
  (tmp_path / "module_0001.jit_f.2.ptx").write_text("")
  (tmp_path / "module_0002.jit_g.1.ptx").write_text(KERNEL.replace(".cas.", ".exch."))
  assert ptx.cas_loops(tmp_path, "jit_f") == ["scatter"]
  assert ptx.cas_loops(tmp_path, "jit_g") == []
  assert len(ptx.scan(tmp_path)) == 3


REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for one
    64 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 1024 bytes smem
ptxas info    : Compiling entry function 'two' for 'sm_90a'
ptxas info    : Function properties for two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""


def test_the_report_of_ptxas_is_read():
  assert ptx.parse_report(REPORT) == [
    ptx.Report("one", 168, 64, 8, 16, 1024),
    ptx.Report("two", 12, 0, 0, 0, 0),
  ]


@pytest.mark.skipif(not has_cuda_wheels(), reason="the CUDA wheels, which bring ptxas, are absent")
def test_ptxas_refuses_what_is_no_program(tmp_path):
  path = tmp_path / "k.ptx"
  path.write_text("nothing")
  with pytest.raises(DevicelessError, match=r"names no \.target"):
    ptx.ptxas(path)
  path.write_text(KERNEL)
  with pytest.raises(DevicelessError, match="ptxas refuses"):
    ptx.ptxas(path)


def test_a_kernels_block_and_tensor_memory_are_read():
  text = ".entry k(\n.reqntid 128, 2, 1\n" + (
    "@%p2 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r19], 128;\n"
    "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r20], 64;\n"
  )
  assert (ptx.threads(text), ptx.tensor_columns(text)) == (256, 192)
  assert ptx.threads(".maxntid 384, 1, 1") == 384
  assert ptx.tensor_columns(KERNEL) == 0 and ptx.arch(KERNEL) == "sm_90a"
  with pytest.raises(DevicelessError, match="how many threads"):
    ptx.threads(KERNEL)
