"""Attention operations over a KV cache: arrays in, arrays out, nothing about models.

Whole sequences
    causal_attention     self-attention of a sequence, differentiable
    prefill_attention    a chunk of a prompt over everything up to it in the cache

One query step over the full cache
    decode_attention     attention, with or without the scores of the slots
    token_scores         the scores alone: keys are read, values are not
    page_scores          an upper bound for the slots of every page, from the page's smallest and largest keys
    page_bounds, update_page_bounds   those smallest and largest keys, of a whole layer or after one more token
    chunk_scores         the query against one vector per chunk

A few query steps over the full cache
    verify_attention     causal attention of the last steps of every row, with or without the scores of each

Making a selection
    select_tokens        the k slots to keep, from their scores
    gather_selection     their keys and values, copied into a compact buffer

One query step over a selection
    selection_attention  attention over a compact buffer
    gather_attention     attention straight over the selected slots of the cache

The cache is a `KVCache`, a stack of layers in one of two layouts (`cache.py`); a compact buffer is one too.

Every operation has one function and one folder in `ops/`. Its argument `implementation` is None (chosen by platform),
"reference" (float32 oracle), "xla" (portable) or "pallas_tpu". A named one that cannot take its arguments, or cannot
run here, raises NotImplementedError; None goes on to the next. On several TPU devices kernels run in a `jax.shard_map`
over batch and kv heads; outside of one, None means "xla" there. Query head h uses kv head h // group, where
group = query_heads // kv_heads. Differentiable are causal_attention and selection_attention.
"""

from pallas_kernels.cache import HeadMajor, KVCache, PerLayer, TokenMajor, empty_cache, from_heads
from pallas_kernels.dispatch import for_decoding, interpreted, layers_are_copied, preferred_layout
from pallas_kernels.divided import Divided, on_mesh
from pallas_kernels.int8_cache import Int8HeadMajor
from pallas_kernels.ops.causal_attention.api import causal_attention
from pallas_kernels.ops.chunk_scores.api import chunk_scores
from pallas_kernels.ops.decode_attention.api import decode_attention
from pallas_kernels.ops.gather_attention.api import gather_attention
from pallas_kernels.ops.gather_selection.api import gather_selection
from pallas_kernels.ops.page_scores.api import page_scores
from pallas_kernels.ops.page_scores.bounds import page_bounds, update_page_bounds
from pallas_kernels.ops.prefill_attention.api import prefill_attention
from pallas_kernels.ops.select_tokens.api import select_tokens
from pallas_kernels.ops.selection_attention.api import selection_attention
from pallas_kernels.ops.token_scores.api import token_scores
from pallas_kernels.ops.verify_attention.api import verify_attention

__all__ = [
    "Divided",
    "HeadMajor",
    "Int8HeadMajor",
    "KVCache",
    "PerLayer",
    "TokenMajor",
    "causal_attention",
    "chunk_scores",
    "decode_attention",
    "empty_cache",
    "for_decoding",
    "from_heads",
    "gather_attention",
    "gather_selection",
    "interpreted",
    "layers_are_copied",
    "on_mesh",
    "page_bounds",
    "page_scores",
    "preferred_layout",
    "prefill_attention",
    "select_tokens",
    "selection_attention",
    "token_scores",
    "update_page_bounds",
    "verify_attention",
]
