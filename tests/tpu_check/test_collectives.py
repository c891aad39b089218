"""What devices exchange, read from the text of a compiled program."""

from tpu_check import hlo
from tpu_check.collectives import bytes_by_kind, collectives

# Three layers: in each a gather of 2 weights (one exchange that waits, one that does not), a ring of two steps, and a
# reduce-scatter written as the TPU compiler does. Around them the gather of a table and a plain reduce-scatter.
STEP = """HloModule jit_step, is_scheduled=true

%add (x.1: f32[], y.1: f32[]) -> f32[] {
  %x.1 = f32[] parameter(0)
  %y.1 = f32[] parameter(1)
  ROOT %sum.1 = f32[] add(%x.1, %y.1)
}

%all-reduce-scatter.1 (input.1: f32[16,8]) -> f32[2,8] {
  %input.1 = f32[16,8]{1,0} parameter(0)
  %all-reduce.1 = f32[16,8]{1,0} all-reduce(%input.1), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %slice.1 = f32[2,8]{1,0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={2,8}
}

%ring (ring.1: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %ring.1 = (s32[], bf16[4]{0}) parameter(0)
  %number.1 = s32[] get-tuple-element(%ring.1), index=0
  %start.1 = (bf16[4]{0}, bf16[4]{0}, u32[], u32[]) collective-permute-start(%ring.1#1), source_target_pairs={{0,1}}
  %done.1 = bf16[4]{0} collective-permute-done(%start.1)
  ROOT %next.1 = (s32[], bf16[4]{0}) tuple(%number.1, %done.1)
}

%twice (ring.2: (s32[], bf16[4])) -> pred[] {
  %ring.2 = (s32[], bf16[4]{0}) parameter(0)
  %number.2 = s32[] get-tuple-element(%ring.2), index=0
  %two.1 = s32[] constant(2)
  ROOT %less.1 = pred[] compare(%number.2, %two.1), direction=LT
}

%layer (carry.1: (s32[], bf16[2,8], bf16[4], f32[16,8])) -> (s32[], bf16[2,8], bf16[4], f32[16,8]) {
  %carry.1 = (s32[], bf16[2,8]{1,0}, bf16[4]{0}, f32[16,8]{1,0}) parameter(0)
  %weight.1 = bf16[2,8]{1,0} get-tuple-element(%carry.1), index=1
  %gather.1 = bf16[16,8]{1,0} all-gather(%weight.1), dimensions={0}, metadata={op_name="jit(step)/layers/mlp"}
  %gather.2 = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%weight.1), dimensions={0}
  %loop.2 = (s32[], bf16[4]{0}) while(%start.9), condition=%twice, body=%ring
  %fusion.1 = f32[2,8]{1,0} fusion(%gradient.1), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %tuple.1 = (s32[], bf16[2,8]{1,0}, bf16[4]{0}, f32[16,8]{1,0}) tuple(%carry.1)
}

%thrice (carry.2: (s32[], bf16[2,8], bf16[4], f32[16,8])) -> pred[] {
  %carry.2 = (s32[], bf16[2,8]{1,0}, bf16[4]{0}, f32[16,8]{1,0}) parameter(0)
  %number.3 = s32[] get-tuple-element(%carry.2), index=0
  %three.1 = s32[] constant(3)
  ROOT %less.2 = pred[] compare(%number.3, %three.1), direction=LT
}

ENTRY %main (table.1: bf16[32,8]) -> f32[] {
  %table.1 = bf16[32,8]{1,0} parameter(0)
  %gradients.1 = f32[64]{0} fusion(%table.1), kind=kLoop, calls=%add
  %gather.3 = bf16[256,8]{1,0} all-gather(%table.1), dimensions={0}, metadata={op_name="jit(step)/logits"}
  %scatter.1 = f32[8]{0} reduce-scatter(%gradients.1), dimensions={0}, to_apply=%add
  %loop.1 = (s32[], bf16[2,8]{1,0}, bf16[4]{0}, f32[16,8]{1,0}) while(%first.1), condition=%thrice, body=%layer
  ROOT %sum.2 = (f32[], f32[3]{0}) all-reduce(%loss.1, %counts.1), to_apply=%add
}
"""


def test_exchanges_count_as_often_as_they_run():
    found = collectives(hlo.parse(STEP))
    assert {(exchange.name, exchange.kind, exchange.size, exchange.times) for exchange in found} == {
        ("gather.1", "all-gather", 2 * 16 * 8, 3),
        ("gather.2", "all-gather", 2 * 16 * 8, 3),
        ("start.1", "collective-permute", 2 * 4, 3 * 2),
        ("all-reduce.1", "reduce-scatter", 4 * 16 * 8, 3),
        ("gather.3", "all-gather", 2 * 256 * 8, 1),
        ("scatter.1", "reduce-scatter", 4 * 64, 1),
        ("sum.2", "all-reduce", 4 * (1 + 3), 1),
    }
    assert bytes_by_kind(found) == {
        "all-gather": 2 * 3 * 256 + 4096,
        "reduce-scatter": 3 * 512 + 256,
        "collective-permute": 48,
        "all-reduce": 16,
    }
