"""The parser on small dumps, written by hand in the compiler's form, and what it makes of them."""

import pytest

from tpu_check.bundles import Cost, Loop, Transfer, cost, parse, read_dump

# A grid of 4 pipelined steps (6 trips: one ahead, one behind) around a loop of 31 around one of 16, the exit test of
# the outer one hoisted into the inner one; then a loop with a bound from memory. Four delay slots after each branch.
NESTED = """
= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = smov 0 /* copy for cssa */ }
   0x1 LB: > { %s3_s2 = sphi %s1_s0, %s9_s2  ;;  %s4_s3 = sadd.s32 1, %s3_s2 } /* Start region 10 :: Start region 11 */
   0x2   : > { %20 = dma.hbm_to_vmem (%p1_p1), /*hbm=*/%s5_s4, /*size_in_granules=*/2048, /*vmem=*/%s6_s5 /*
base_bounds: (64, 1)
dynamic_base_bounds: (64, 1)
window_bounds: (16, 1)
iteration_bounds: (2, 2)
element_size_in_bytes: 4096
second_minor_factor: 1 */ }
   0x3   : > { %s7_s6 = smov 0 }
   0x4 LB: >> { %s8_s6 = sphi %s7_s6, %s30_s6  ;;  %s31_s7 = smov 0 } /* Start region 20 */
   0x5 LB: >>> { %s32_s7 = sphi %s31_s7, %s33_s7  ;;  %s33_s7 = sadd.s32 1, %s32_s7 } /* Start region 30 */
   0x6   : >>> { %p2_p2 = scmp.ge.s32.totalorder %s33_s7, 16 /* loop exit test */ }
   0x7   : >>> { %s30_s6 = sadd.s32 (%p2_p2), 1, %s8_s6 }
   0x8   : >>> { %40 = sbr.rel (!%p2_p2) target = $region30  ;;  %p3_p3 = scmp.ge.s32.totalorder (%p2_p2), %s30_s6, 31 }
   0x9   :  {}
   0xa   : >>> { %v1_v1 = vadd.f32 %v1_v1, %v1_v1 }
   0xb   :  {}
   0xc   :  {}
   0xd   : >> { %41 = sbr.rel (!%p3_p3) target = $region20 }
   0xe   :  {}
   0xf   :  {}
  0x10   :  {}
  0x11   :  {}
  0x12 PF: > { %s50_s9 = sld [smem:[#allocation4]]  ;;  %s51_s8 = smov 0 }
  0x13 LB: >> { %s52_s8 = sphi %s51_s8, %s53_s8  ;;  %s53_s8 = sadd.s32 1, %s52_s8 } /* Start region 40 */
  0x14   : >> { %p4_p4 = scmp.ge.s32.totalorder %s53_s8, %s50_s9  ;;  %42 = sbr.rel (!%p4_p4) target = $region40 }
  0x15   :  {}
  0x16   :  {}
  0x17   :  {}
  0x18   :  {}
  0x19 PF: > { %9 = sst [smem:[#allocation7_spill]] %s4_s3  ;;  %p9_p9 = scmp.ne.s32.totalorder %s3_s2, 127 }
  0x1a   : > { %s9_s2 = sld [smem:[#allocation7_spill]]  ;;  %43 = sbr.rel (%p9_p9) target = $region44 }
  0x1b   : > { %p5_p5 = scmp.ge.s32.totalorder %s9_s2, 6 /* loop exit test */ }
  0x1c   : > { %44 = sbr.rel (!%p5_p5) target = $region10 }
  0x1d   :  {}
  0x1e   :  {}
  0x1f   :  {}
  0x20   :  {}
  0x21   :  { %99 = vsyncpa [#allocation6], 1 } /* exit bundle: %kernel.1 = custom-call() */
"""
FETCHED = 65_536  # bytes of one window: 2048 granules of 32


def test_nested_loops():
    root = parse("kernel.1", NESTED).root
    assert (root.bundles, root.trips) == (2, 1)
    (grid,) = root.inner
    # 0x1 to 0x20 without the 14 bundles 0x4 to 0x11 and the 6 bundles 0x13 to 0x18; 4 steps, not the 6 of the exit test
    assert (grid.bundles, grid.trips, grid.grid) == (32 - 14 - 6, 4, True)
    outer, dynamic = grid.inner
    assert (outer.bundles, outer.trips) == (14 - 8, 31)
    assert outer.inner == (Loop(8, 16),)
    assert dynamic == Loop(6, None)
    assert grid.transfers == (Transfer(FETCHED, 4 * FETCHED),)


def test_cost_counts_every_trip_and_names_what_it_cannot():
    kernel = parse("kernel.1", NESTED)
    bundles = 2 + 4 * (12 + 31 * (6 + 16 * 8) + 6)
    assert cost(kernel) == Cost(bundles, 4 * FETCHED, ("kernel.1 (1)",), (("kernel.1", bundles),))
    given = cost(kernel, (None, None, 10))  # in all, and not for each of the 4 grid steps
    assert given.unknown == ()
    assert given.bundles == bundles + (10 - 4) * 6
    skipped = cost(kernel, (3, None, 10))  # a constant in the code can be overruled
    assert given.bundles - skipped.bundles == (4 * 31 - 3) * (6 + 16 * 8)


@pytest.mark.parametrize("runs", [(10,), (None, None, 10, 10)])
def test_runs_of_other_code_are_left_aside(runs):
    kernel = parse("kernel.1", NESTED)
    assert cost(kernel, runs) == cost(kernel)


def test_a_loop_without_a_constant_counter_is_unknown():
    for broken in (
        NESTED.replace("%s31_s7 = smov 0", "%s31_s7 = sld [smem:[0]]"),
        NESTED.replace(", 16 /*", ", %s9 /*"),
    ):
        assert parse("k", broken).root.inner[0].inner[0].inner[0].trips is None


@pytest.mark.parametrize(("first", "step", "test", "trips"), [(0, 4, "ge", 4), (2, 1, "ge", 14), (0, 1, "gt", 17)])
def test_trip_count_of_a_counter(first, step, test, trips):
    text = NESTED.replace("%s31_s7 = smov 0", f"%s31_s7 = smov {first}")
    text = text.replace("%s33_s7 = sadd.s32 1", f"%s33_s7 = sadd.s32 {step}")
    text = text.replace("scmp.ge.s32.totalorder %s33_s7, 16", f"scmp.{test}.s32.totalorder %s33_s7, 16")
    assert parse("k", text).root.inner[0].inner[0].inner[0].trips == trips


def test_a_window_is_moved_no_oftener_than_its_array_is_large():
    kernel = parse(
        "k", NESTED.replace("iteration_bounds: (2, 2)", "iteration_bounds: (1, 2)").replace(", 6 /*", ", 400 /*")
    )
    assert kernel.root.inner[0].trips == 400
    assert cost(kernel).bytes == 4 * FETCHED
    by_hand = parse("k", NESTED.replace("\nbase_bounds", "\nbounds"))
    assert by_hand.root.inner[0].transfers == (Transfer(FETCHED),)
    assert cost(by_hand).bytes == 4 * FETCHED
    in_vmem = parse("k", NESTED.replace("dma.hbm_to_vmem", "dma.vmem_to_smem"))
    assert cost(in_vmem).bytes == 0


def test_a_grid_over_blocks_in_vmem_is_a_grid_too():
    text = NESTED.replace("iteration_bounds", "bounds")
    assert not parse("k", text).root.inner[0].grid
    marked = text.replace(
        "%s3_s2 = sphi %s1_s0, %s9_s2", "%s3_s2 = sphi %s1_s0, %s9_s2 /* iteration index, stage = 0 */"
    )
    assert parse("k", marked).root.inner[0].grid


def test_a_size_in_a_register_is_that_of_the_window():
    kernel = parse("k", NESTED.replace("/*size_in_granules=*/2048", "/*size_in_granules=*/%s9_s9"))
    assert kernel.root.inner[0].transfers == (Transfer(16 * 4096, 64 * 4096),)


def test_two_cores_move_twice_the_bytes_of_one():
    by_hand = NESTED.replace("\nbase_bounds", "\nbounds")
    first = "%s1_s0 = smov 0 /* copy for cssa */"
    asks = f"{first}  ;;  %s60_s60 = sld [smem:[#allocation0]] /* megacore core id :: core id */"
    both = parse("k", by_hand.replace(first, asks))
    assert both.split
    assert cost(both).bytes == 8 * FETCHED
    # and share the runs that are given
    assert cost(both, (None, None, 10)).bundles == cost(parse("k", by_hand), (None, None, 5)).bundles
    leaves = asks + "  ;;  %p60_p0 = scmp.ne.s32.totalorder %s60_s60, 0  ;;  %15 = sbr.rel (%p60_p0) target = $region4"
    one = parse("k", by_hand.replace(first, leaves))
    assert not one.split
    assert cost(one).bytes == 4 * FETCHED


def test_read_dump(tmp_path):
    (tmp_path / "1795-kernel.1-71-final_bundles.txt").write_text(NESTED)
    (tmp_path / "1795-kernel.1-70-schedule-analysis_final_bundles.txt").write_text("Schedule analysis")
    (tmp_path / "1795-<late-initialization>-71-final_bundles.txt").write_text(NESTED)
    assert list(read_dump(tmp_path)) == ["kernel.1"]
