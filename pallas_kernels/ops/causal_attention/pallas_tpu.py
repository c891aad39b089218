"""causal_attention on TPU: the splash attention that ships with JAX, forward and backward.

Splash attention takes whole sequences, head by head, and a mask that is known when the program is traced: exactly what
training has. A chunk of a prompt over a cache has neither (see prefill_attention's own kernel).
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

# Blocks are multiples of the 128 lanes.
LANES = 128
# The largest block of queries and of keys.
MAX_BLOCK = 512
# Head sizes that were compiled for every chip.
HEAD_DIMS = (64, 128)


def causal_attention(
    q: Float[Array, "batch query_heads tokens head_dim"],
    k: Float[Array, "batch kv_heads tokens head_dim"],
    v: Float[Array, "batch kv_heads tokens head_dim"],
    *,
    scale: float,
) -> Float[Array, "batch query_heads tokens head_dim"]:
    """Products have JAX's default precision for TPU, which for float32 is that of `xla` too."""
    query_heads, tokens, head_dim = q.shape[1:]
    if head_dim not in HEAD_DIMS:
        raise NotImplementedError(f"needs head_dim {' or '.join(map(str, HEAD_DIMS))}, got {head_dim}")
    block, padded = blocks_of(tokens)
    mask = masks.MultiHeadMask([masks.CausalMask((padded, padded)) for _ in range(query_heads)])
    attend = splash.make_splash_mha(mask, block_sizes=_block_sizes(block), head_shards=1, q_seq_shards=1)
    # No token sees those after it: padding at the end changes nothing, and its own outputs are cut off.
    padding = ((0, 0), (0, 0), (0, padded - tokens), (0, 0))
    # Splash has no scale of its own.
    queries = (q * scale).astype(k.dtype)
    out = jax.vmap(attend)(*(jnp.pad(x, padding) for x in (queries, k, v)))
    return out[:, :, :tokens].astype(q.dtype)


def blocks_of(tokens: int) -> tuple[int, int]:
    """Size of a block and the length padded to whole blocks: as few blocks as possible, then as little padding."""
    blocks = -(-tokens // MAX_BLOCK)
    block = -(-tokens // (blocks * LANES)) * LANES
    return block, blocks * block


def _block_sizes(block: int) -> splash.BlockSizes:
    return splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
