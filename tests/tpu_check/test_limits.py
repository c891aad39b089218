"""Limits, and the exceptions granted to them."""

import pytest

from tests.tpu_check.made_up import failed, row
from tpu_check.limits import Verdict, Waiver, verdicts


@pytest.mark.parametrize(
    ("limit", "bound", "figures", "value"),
    [
        ("ratio", 1.25, {"hbm_us": 1200.0, "bundle_us": 900.0}, 1.2),
        ("ratio", 1.25, {"hbm_us": 900.0, "bundle_us": 1200.0}, 1.2),
        ("select", 0.15, {"hbm_us": 20.0, "bundle_us": 90.0, "attention_us": 900.0}, 0.1),
        ("bundles_per_token", 5, {"bundles": 18_000, "tokens": 4_096}, 18_000 / 4_096),
        ("temporaries", 0.02, {"temporaries": 15_000, "cache_bytes": 1_000_000}, 0.015),
        ("copies", 1, {"copies": ["copy c.1[8]"]}, 1),
        ("unaliased", 0.5, {"aliased": 600, "donated": 1000}, 0.4),
        ("unaliased", 0.0, {"aliased": 1024, "donated": 1000}, 0.0),
    ],
)
def test_what_a_limit_bounds(limit, bound, figures, value):
    (kept,) = verdicts(row({limit: bound}, **figures), ())
    assert kept == Verdict(limit, pytest.approx(value), bound, "kept")
    (broken,) = verdicts(row({limit: value - 0.001}, **figures), ())
    assert (broken.status, broken.value) == ("broken", kept.value)


def test_a_lower_bound_keeps_no_limit_on_time():
    (verdict,) = verdicts(row({"ratio": 1.25}, unknown=["fusion.1 (2)"]), ())
    assert verdict.status == "broken"
    assert str(verdict) == "ratio 1.1, at most 1.25: at least, not knowing the trips of fusion.1 (2)"
    (copies,) = verdicts(row({"copies": 0}, unknown=["fusion.1 (2)"]), ())
    assert copies.status == "kept"


def test_a_waiver_loosens_one_limit_of_one_program():
    limits = {"ratio": 1.05, "copies": 0}
    waiver = Waiver("decode_attention/8B/b1", "v5e", "ratio", 1.2, "its blocks are short")
    broken, copies = verdicts(row(limits), ())
    excepted, untouched = verdicts(row(limits), (waiver,))
    assert (broken.status, excepted.status) == ("broken", "excepted")
    assert str(excepted) == "ratio 1.1, at most 1.2: its blocks are short"
    assert copies == untouched
    assert verdicts(row(limits, chip="v6e"), (waiver,))[0].status == "broken"
    assert verdicts(row(limits, hbm_us=1300.0), (waiver,))[0].status == "broken"
    assert verdicts(row(limits, hbm_us=1300.0), (waiver,))[0].bound == 1.2


def test_a_waiver_may_name_an_operation_on_any_chip():
    waiver = Waiver("decode_attention", None, "ratio", 1.2, "why")
    assert verdicts(row({"ratio": 1.05}, chip="v6e"), (waiver,))[0].status == "excepted"
    other = Waiver("token_scores", None, "ratio", 1.2, "why")
    assert verdicts(row({"ratio": 1.05}), (other,))[0].status == "broken"


def test_what_does_not_compile_has_no_verdicts():
    assert verdicts(failed("exit status 1"), ()) == []
