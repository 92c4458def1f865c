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


def test_a_loop_of_unknown_length_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a loop of unknown length: %outer\.condition"):
        hlo.operations(TPU.replace("direction=LT", "direction=NE"))
