"""Reading optimised HLO: what runs how often, and what copies the cache."""

import pytest

from tpu_check import hlo
from tpu_check.bundles import Cost

# The cache is bf16[2,1,1024,2,8,128], one layer of it 2,097,152 elements.
MODULE = """HloModule jit_step, is_scheduled=true

%fused_update (p.0: bf16[2,1,1024,2,8,128], p.1: bf16[1,1,1,2,8,128], p.2: s32[]) -> bf16[2,1,1024,2,8,128] {
  %p.0 = bf16[2,1,1024,2,8,128]{5,4,3,2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[1,1,1,2,8,128]{5,4,3,2,1,0:T(8,128)(2,1)} parameter(1)
  %p.2 = s32[] parameter(2)
  ROOT %dus.1 = bf16[2,1,1024,2,8,128]{5,4,3,2,1,0:T(8,128)(2,1)} dynamic-update-slice(%p.0, %p.1, %p.2)
}

%body (arg: (s32[], bf16[2,1,1024,2,8,128])) -> (s32[], bf16[2,1,1024,2,8,128]) {
  %arg = (s32[]{:T(128)}, bf16[2,1,1024,2,8,128]{5,4,3,2,1,0:T(8,128)(2,1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %cache.1 = bf16[2,1,1024,2,8,128]{5,4,3,2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %update.1 = bf16[2,1,1024,2,8,128]{5,4,3,2,1,0:T(8,128)(2,1)} fusion(%cache.1, %i.1), kind=kLoop, calls=%fused_update
  %attend.1 = bf16[1,32,128]{2,1,0:T(8,128)(2,1)} custom-call(%update.1), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/while/body/decode_attention/pallas_tpu/pallas_call"}, \
backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"139264"}]}
  ROOT %out.1 = (s32[]{:T(128)}, bf16[2,1,1024,2,8,128]{5,4,3,2,1,0:T(8,128)(2,1)}) tuple(%i.1, %update.1)
}

%condition (arg.1: (s32[], bf16[2,1,1024,2,8,128])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[2,1,1024,2,8,128]{5,4,3,2,1,0:T(8,128)(2,1)}) parameter(0)
  %constant.1 = s32[]{:T(128)} constant(2), backend_config={"flag_configs":[]}
  %i.2 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i.2, %constant.1), direction=LT
}

%refresh (arg.2: bf16[8]) -> bf16[8] {
  %arg.2 = bf16[8]{0} parameter(0)
  ROOT %dear.1 = bf16[8]{0} custom-call(%arg.2), custom_call_target="tpu_custom_call"
}

%reuse (arg.3: bf16[8]) -> bf16[8] {
  %arg.3 = bf16[8]{0} parameter(0)
  ROOT %cheap.1 = bf16[8]{0} custom-call(%arg.3), custom_call_target="tpu_custom_call"
}

ENTRY %main (cache: bf16[2,1,1024,2,8,128], x: bf16[8]) -> bf16[2,1,1024,2,8,128] {
  %cache = bf16[2,1,1024,2,8,128]{5,4,3,2,1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[8]{0} parameter(1)
  %start = (s32[]{:T(128)}, bf16[2,1,1024,2,8,128]{5,4,3,2,1,0:T(8,128)(2,1)}) tuple(%x, %cache)
  %while.1 = (s32[]{:T(128)}, bf16[2,1,1024,2,8,128]{5,4,3,2,1,0:T(8,128)(2,1)}) while(%start), \
condition=%condition, body=%body
  %choice.1 = bf16[8]{0} conditional(%x, %x, %x), branch_computations={%refresh, %reuse}
  ROOT %result = bf16[2,1,1024,2,8,128]{5,4,3,2,1,0:T(8,128)(2,1)} get-tuple-element(%while.1), index=1
}
""".replace("\\\n", "")
# A fusion that takes a layer out of the cache.
SLICE = """%fused_slice (p.3: bf16[2,1,1024,2,8,128], p.4: s32[]) -> bf16[1024,2,8,128] {
  %p.3 = bf16[2,1,1024,2,8,128]{5,4,3,2,1,0:T(8,128)(2,1)} parameter(0)
  %p.4 = s32[] parameter(1)
  %ds.1 = bf16[1,1,1024,2,8,128]{5,4,3,2,1,0:T(8,128)(2,1)} dynamic-slice(%p.3, %p.4)
  ROOT %bitcast.1 = bf16[1024,2,8,128]{3,2,1,0:T(8,128)(2,1)} bitcast(%ds.1)
}

"""
CAPACITY = 1024
LAYER = 2 * 1024 * 8 * 128
SIZES = {2 * LAYER, LAYER, LAYER // 2}
COSTS = {"attend.1": Cost(100, 1000), "dear.1": Cost(70, 10), "cheap.1": Cost(60, 20)}


def copies(text):
    return hlo.cache_copies(hlo.parse(text), CAPACITY, SIZES)


def test_loops_multiply_and_the_dearer_branch_counts():
    assert hlo.total(hlo.parse(MODULE), COSTS.get) == Cost(2 * 100 + 70, 2 * 1000 + 10)


def test_a_loop_with_a_bound_that_is_not_constant_is_named():
    text = MODULE.replace("%constant.1 = s32[]{:T(128)} constant(2)", "%constant.1 = s32[]{:T(128)} add(%i.2, %i.2)")
    assert hlo.total(hlo.parse(text), COSTS.get) == Cost(100 + 70, 1000 + 10, ("while.1",))


@pytest.mark.parametrize(
    ("instruction", "moved"),
    [
        ("(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, bf16[8,128]{1,0}, u32[]{:S(2)}) copy-start(%x)", 2 * 8 * 128),
        ("(f32[8,128]{1,0}, f32[8,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%x)", 4 * 8 * 128),
        ("((pred[9,128]{1,0}), pred[8,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x)", 8 * 128),
        ("(f32[8,128]{1,0}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%x)", 0),
        ("f32[8,128]{1,0:S(1)} copy-done(%x)", 0),
    ],
)
def test_what_the_program_fetches_ahead_is_moved_too(instruction, moved):
    text = MODULE.replace("  %choice.1", f"  %c.1 = {instruction}\n  %choice.1")
    assert hlo.total(hlo.parse(text), COSTS.get).bytes == 2 * 1000 + 10 + moved


def test_an_update_in_place_is_no_copy():
    assert copies(MODULE) == []


@pytest.mark.parametrize(
    ("shape", "operation", "written"),
    [
        ("bf16[2,1,1024,2,8,128]{5,4,3,2,1,0}", "copy(%cache)", "copy c.1[2,1,1024,2,8,128]"),
        ("bf16[1024,1,2,8,128]{4,3,2,1,0}", "copy(%cache)", "copy c.1[1024,1,2,8,128]"),
        ("bf16[8,1024,128]{2,1,0:T(8,128)(2,1)}", "transpose(%cache)", "transpose c.1[8,1024,128]"),
        (
            "(bf16[1,1024,2,8,128]{4,3,2,1,0}, bf16[1,1024,2,8,128]{4,3,2,1,0}, u32[]{:S(2)})",
            "copy-start(%cache)",
            "copy-start c.1[1,1024,2,8,128]",
        ),
        ("bf16[1024,2,8,128]{3,2,1,0}", "fusion(%cache), calls=%fused_slice", "dynamic-slice c.1[1024,2,8,128]"),
    ],
)
def test_cache_shaped_copies(shape, operation, written):
    text = MODULE.replace("  %choice.1", f"  %c.1 = {shape} {operation}\n  %choice.1")
    assert copies(text.replace("%body (", SLICE + "%body (") if "fused_slice" in operation else text) == [written]


def test_other_shapes_are_no_copies_of_the_cache():
    # as many elements, but no dimension of slots; and half a layer's keys
    for shape in ("512,32,128", "1024,4,128"):
        line = f"%c.1 = bf16[{shape}]{{2,1,0}} copy(%x)"
        assert copies(MODULE.replace("  %choice.1", f"  {line}\n  %choice.1")) == []


def test_vmem_is_the_most_that_one_instruction_takes():
    assert hlo.vmem_bytes(MODULE) == 139_264
    assert hlo.vmem_bytes(MODULE + MODULE.replace('"139264"', '"9"')) == 139_264
    assert hlo.vmem_bytes("") == 0
