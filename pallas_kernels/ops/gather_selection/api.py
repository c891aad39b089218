"""Copying a selection out of the cache into a compact buffer."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.checks import check_cache, check_positions
from pallas_kernels.ops.gather_selection import reference, xla

IMPLEMENTATIONS = {
    "reference": reference.gather_selection,
    "xla": xla.gather_selection,
}


def gather_selection(
    k: Float[Array, "batch kv_heads tokens head_dim"],
    v: Float[Array, "batch kv_heads tokens head_dim"],
    positions: Int[Array, "batch kv_heads budget"],
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch kv_heads budget head_dim"], Float[Array, "batch kv_heads budget head_dim"]]:
    """The keys and values at `positions`, in that order, contiguous.

    Args:
        k, v: the full cache.
        positions: slots to copy, per kv head, in any order and with repeats; -1 is an empty entry.
        implementation: see the package.

    Returns:
        The selected keys and values in the dtypes of k and v; empty entries are zeros.

    Raises:
        ValueError: shapes do not fit, a position out of range (seen outside a trace only), unknown
            `implementation`.
    """
    check_cache(k, v)
    check_positions(positions, k)
    return dispatch.run("gather_selection", IMPLEMENTATIONS, implementation, k, v, positions)
