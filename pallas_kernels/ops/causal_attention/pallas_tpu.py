"""causal_attention on TPU: the splash attention that ships with JAX, forward and backward.

Splash attention takes whole sequences, head by head, and a mask known when the program is traced, which is what
training has; the chunk of a prompt that prefill_attention is given has neither, and a kernel of its own.
"""

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

LANES = 128  # blocks are multiples of it
# Large blocks use the matrix units best (bundles of the compiled kernels for v5e, forward and backward: a fifth fewer
# in blocks of 1,024 than of 512), but of those on the diagonal half is wasted, and short sequences are mostly diagonal.
BLOCK, LONG_BLOCK = 512, 1024
LONG = 4096  # tokens from which LONG_BLOCK is used


def causal_attention(
    q: Float[Array, "batch query_heads tokens head_dim"],
    k: Float[Array, "batch kv_heads tokens head_dim"],
    v: Float[Array, "batch kv_heads tokens head_dim"],
    *,
    scale: float,
) -> Float[Array, "batch query_heads tokens head_dim"]:
    """Products have JAX's default precision, as in `xla`: on TPU that is bfloat16 for float32 too."""
    batch, query_heads, tokens, head_dim = q.shape
    block, padded = blocks_of(tokens)
    attend = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((padded, padded))] * (batch * query_heads)),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
    )
    queries = (q * scale).astype(k.dtype)  # splash has no scale of its own
    # The heads of all rows are one axis, for splash has none for rows; head h of it still uses kv head h // group.
    # No token sees those after it: padding at the end changes nothing, and what comes out there is cut off.
    out = attend(*(_padded(x.reshape(-1, tokens, head_dim), padded) for x in (queries, k, v)))
    # (asarray for the type checker: without residuals to return, splash returns an array.)
    return jnp.asarray(out)[:, :tokens].reshape(q.shape).astype(q.dtype)


def _padded(x: Float[Array, "heads tokens head_dim"], tokens: int) -> Float[Array, "heads {tokens} head_dim"]:
    return jnp.pad(x, ((0, 0), (0, tokens - x.shape[1]), (0, 0)))


def blocks_of(tokens: int) -> tuple[int, int]:
    """Tokens in a block and in all blocks together: as few blocks as possible, then as little padding."""
    largest = LONG_BLOCK if tokens >= LONG else BLOCK
    blocks = -(-tokens // largest)
    block = -(-tokens // (blocks * LANES)) * LANES
    return block, blocks * block
