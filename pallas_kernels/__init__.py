"""Attention operations over a KV cache: arrays in, arrays out, nothing about models.

Whole sequences
    causal_attention     self-attention of a sequence, differentiable
    prefill_attention    a chunk of a prompt over everything up to it in the cache

One query step over the full cache
    decode_attention     attention, with or without the scores of the slots
    token_scores         the scores alone: keys are read, values are not

Making a selection
    select_tokens        the k slots to keep, from their scores
    gather_selection     their keys and values, copied into a compact buffer

One query step over a selection
    selection_attention  attention over a compact buffer
    gather_attention     attention straight over the selected slots of the cache

Every operation has one function and one folder in `ops/`. Its argument `implementation` is None (chosen by
platform), "reference" (float32 oracle), "xla" (portable), or any other name in the operation's table. Query
head h uses kv head h // group, where group = query_heads // kv_heads.
"""

from pallas_kernels.ops.causal_attention.api import causal_attention
from pallas_kernels.ops.decode_attention.api import decode_attention
from pallas_kernels.ops.gather_attention.api import gather_attention
from pallas_kernels.ops.gather_selection.api import gather_selection
from pallas_kernels.ops.prefill_attention.api import prefill_attention
from pallas_kernels.ops.select_tokens.api import select_tokens
from pallas_kernels.ops.selection_attention.api import selection_attention
from pallas_kernels.ops.token_scores.api import token_scores

__all__ = [
    "causal_attention",
    "decode_attention",
    "gather_attention",
    "gather_selection",
    "prefill_attention",
    "select_tokens",
    "selection_attention",
    "token_scores",
]
