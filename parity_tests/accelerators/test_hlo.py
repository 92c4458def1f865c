"""What is read of a compiled program's text, of both compilers."""

import pytest

from benchmarks.accelerators import hlo

# As XLA:TPU writes a loop over four layers inside one of three steps, and XLA:GPU one of five.
TPU = """
%inner.condition (x: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(4)
  %counter.1 = s32[]{:T(128)} get-tuple-element(%x), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%counter.1, %constant.1), direction=LT
}

%inner.body (y: (s32[], f32[8])) -> (s32[], f32[8]) {
  %y = (s32[], f32[8]{0}) parameter(0)
  %part.1 = f32[8]{0} get-tuple-element(%y), index=1
  %sum.1 = f32[8]{0} all-reduce(%part.1), to_apply=%add
  ROOT %result.1 = (s32[], f32[8]{0}) tuple(%part.1, %sum.1)
}

%outer.condition (x: (s32[], f32[8])) -> pred[] {
  %other = s32[] constant(9)
  %limit = s32[] constant(3)
  %counter.2 = s32[] get-tuple-element(%x), index=0
  ROOT %lt.2 = pred[] compare(%counter.2, %limit), direction=LT
}

%outer.body (z: (s32[], f32[8])) -> (s32[], f32[8]) {
  %z = (s32[], f32[8]{0}) parameter(0)
  ROOT %while.1 = (s32[], f32[8]{0}) while(%z), condition=%inner.condition, body=%inner.body
}

ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]{0}) parameter(0)
  ROOT %while.2 = (s32[], f32[8]{0}) while(%a), condition=%outer.condition, body=%outer.body
}
"""
GPU = """
%body (y: (s32[], f32[8])) -> (s32[], f32[8]) {
  %y = (s32[], f32[8]{0}) parameter(0)
  %part = f32[8]{0} get-tuple-element(%y), index=1
  %twice = f32[8]{0} add(%part, %part)
  ROOT %result = (s32[], f32[8]{0}) tuple(%part, %twice)
}

ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]{0}) parameter(0)
  ROOT %while = (s32[], f32[8]{0}) while(%a), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_operations_of_a_loop_count_as_often_as_it_runs() -> None:
    assert [(one.kind, one.times, one.bytes) for one in hlo.operations(TPU)] == [("all-reduce", 12, 64)]
    assert hlo.exchanged(TPU) == {"all-reduce": 12 * 32}
    assert [(one.kind, one.times) for one in hlo.operations(GPU)] == [("add", 5)]


# XLA:TPU's reduce-scatter over 64 devices of an array and a vector, beside a fusion that sends nothing.
SCATTER = """
%all-reduce-scatter.1 (input.1: bf16[512,64], input.2: bf16[64]) -> (bf16[8,64], bf16[1]) {
  %input.1 = bf16[512,64]{1,0:T(8,128)(2,1)} parameter(0)
  %input.2 = bf16[64]{0} parameter(1)
  %sum = (bf16[512,64]{1,0:T(8,128)(2,1)}, bf16[64]{0}) all-reduce(%input.1, %input.2), channel_id=1, to_apply=%add
  %part = bf16[512,64]{1,0:T(8,128)(2,1)} get-tuple-element(%sum), index=0
  ROOT %cut = (bf16[8,64]{1,0}, bf16[1]{0}) tuple(%part, %part)
}

%twice (x: bf16[64]) -> bf16[64] {
  %x = bf16[64]{0} parameter(0)
  ROOT %sum.2 = bf16[64]{0} add(%x, %x)
}

ENTRY %main (a: bf16[512,64], b: bf16[64]) -> bf16[64] {
  %a = bf16[512,64]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[64]{0} parameter(1)
  %scattered = (bf16[8,64]{1,0}, bf16[1]{0}) fusion(%a, %b), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %fusion.2 = bf16[64]{0} fusion(%b), kind=kLoop, calls=%twice
}
"""


def test_a_reduce_scatter_that_is_a_fusion_counts_with_the_whole_arrays() -> None:
    assert hlo.exchanged(SCATTER) == {"reduce-scatter": 2 * (512 * 64 + 64)}


def test_a_loop_of_unknown_length_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a loop of unknown length: %outer\.condition"):
        hlo.operations(TPU.replace("direction=LT", "direction=NE"))
