"""The operations of `pallas_kernels` as programs: one layer of several, so that slicing one out would show."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from recycled_jax.config import LlamaConfig
from recycled_jax.planning.chips import Chip
from recycled_jax.planning.sizes import nbytes
from tpu_check.programs import BUDGET, PREFILL, STEPS, TOKENS, Built, LimitName, Program, array

_LAYERS = 2  # of the full cache; of a selection all that the model has: two might be moved to VMEM beforehand
_PAGE = 16  # tokens; Quest's page size
_CHUNK = 256  # tokens
_TRAINED = 8_192  # tokens of a training sequence
_STREAMING: dict[LimitName, float] = {"ratio": 1.25}


def operations() -> Iterator[Program]:
    for model in ("8B", "1B"):
        for batch in (1, 8):
            first = (model, batch) == ("8B", 1)
            yield Program("decode_attention", model, batch, "", _decode_attention, _STREAMING, short=batch == 1)
            yield Program("token_scores", model, batch, "", _token_scores, _STREAMING, short=batch == 1)
            yield Program("selection_attention", model, batch, "", _selection_attention, _STREAMING, short=batch == 1)
            yield Program("gather_attention", model, batch, "shared", _gather(1), {"bundles_per_token": 5}, short=first)
    # The scores of the two models have the same shape.
    for batch in (1, 8):
        yield Program("select_tokens", "8B", batch, "per head", _select(), {"select": 0.15}, short=batch == 1)
    yield Program("select_tokens", "8B", 1, "unordered", _select(ordered=False), {"select": 0.15})
    yield Program("select_tokens", "8B", 1, "shared by vote", _select(shared="sum"))
    for model in ("8B", "1B"):
        yield Program("decode_attention", model, 1, "with scores", _decode_attention_with_scores)
        steps = f"{STEPS} steps"
        yield Program("verify_attention", model, 1, steps, _verify_attention, _STREAMING, short=model == "8B")
        yield Program("gather_attention", model, 1, "per head", _gather(None))
        yield Program("gather_selection", model, 1, "per head", _gather_selection, short=model == "8B")
        yield Program("page_scores", model, 1, f"pages of {_PAGE}", _page_scores)
        yield Program("chunk_scores", model, 1, f"chunks of {_CHUNK}", _chunk_scores)
        yield Program("prefill_attention", model, 1, f"last {PREFILL}", _prefill_attention, short=model == "8B")
        yield Program("causal_attention", model, 1, f"{_TRAINED} tokens", _causal_attention)


def _cache(config: LlamaConfig, batch: int, capacity: int, layers: int = _LAYERS) -> pk.KVCache:
    def make() -> pk.KVCache:
        return pk.empty_cache(
            pk.preferred_layout(None),
            layers=layers,
            batch=batch,
            kv_heads=config.kv_heads,
            capacity=capacity,
            head_dim=config.head_dim,
            dtype=jnp.bfloat16,
        )

    return jax.eval_shape(make)


def _query(config: LlamaConfig, batch: int):
    return array((batch, config.query_heads, config.head_dim))


def _numbers(*shape: int):
    return array(shape, jnp.int32)


def _decode_attention(chip: Chip, config: LlamaConfig, batch: int) -> Built:
    q, cache = _query(config, batch), _cache(config, batch, TOKENS)
    return Built(
        lambda q, cache, lengths, layer: pk.decode_attention(q, cache, lengths, layer=layer),
        (q, cache, _numbers(batch), _numbers()),
        nbytes(cache) // cache.layers + 2 * nbytes(q),
        cache=cache,
    )


def _score_bytes(config: LlamaConfig, batch: int, count: int) -> int:
    return 4 * batch * config.kv_heads * count


def _decode_attention_with_scores(chip: Chip, config: LlamaConfig, batch: int) -> Built:
    q, cache = _query(config, batch), _cache(config, batch, TOKENS)
    return Built(
        lambda q, cache, lengths, layer: pk.decode_attention(q, cache, lengths, layer=layer, return_scores=True),
        (q, cache, _numbers(batch), _numbers()),
        nbytes(cache) // cache.layers + 2 * nbytes(q) + _score_bytes(config, batch, TOKENS),
        cache=cache,
    )


def _verify_attention(chip: Chip, config: LlamaConfig, batch: int) -> Built:
    q, cache = array((batch, config.query_heads, STEPS, config.head_dim)), _cache(config, batch, TOKENS)
    return Built(
        lambda q, cache, start, layer: pk.verify_attention(q, cache, start, layer=layer, return_scores=True),
        (q, cache, _numbers(batch), _numbers()),
        nbytes(cache) // cache.layers + 2 * nbytes(q) + STEPS * _score_bytes(config, batch, TOKENS),
        cache=cache,
    )


def _token_scores(chip: Chip, config: LlamaConfig, batch: int) -> Built:
    q, cache = _query(config, batch), _cache(config, batch, TOKENS)
    return Built(
        lambda q, cache, lengths, layer: pk.token_scores(q, cache, lengths, layer=layer),
        (q, cache, _numbers(batch), _numbers()),
        nbytes(cache) // cache.layers // 2 + nbytes(q) + _score_bytes(config, batch, TOKENS),
        cache=cache,
    )


def _page_scores(chip: Chip, config: LlamaConfig, batch: int) -> Built:
    q, bounds = _query(config, batch), _cache(config, batch, TOKENS // _PAGE, config.layers)
    return Built(
        lambda q, bounds, lengths, layer: pk.page_scores(q, bounds, lengths, page_size=_PAGE, layer=layer),
        (q, bounds, _numbers(batch), _numbers()),
        nbytes(bounds) // bounds.layers + nbytes(q) + _score_bytes(config, batch, TOKENS // _PAGE),
    )


def _chunk_scores(chip: Chip, config: LlamaConfig, batch: int) -> Built:
    q = _query(config, batch)
    chunks = array((batch, config.kv_heads, TOKENS // _CHUNK, config.head_dim))
    return Built(
        pk.chunk_scores,
        (q, chunks, _numbers(batch)),
        nbytes((q, chunks)) + _score_bytes(config, batch, TOKENS // _CHUNK),
    )


def _select(shared: str | None = None, ordered: bool = True) -> Callable[[Chip, LlamaConfig, int], Built]:
    def build(chip: Chip, config: LlamaConfig, batch: int) -> Built:
        scores = array((batch, config.kv_heads, TOKENS), jnp.float32)
        chosen = batch * (1 if shared else config.kv_heads) * BUDGET
        return Built(
            lambda scores, lengths: pk.select_tokens(
                scores, lengths, k=BUDGET, pool=7, sinks=4, shared=shared, ordered=ordered
            ),
            (scores, _numbers(batch)),
            nbytes(scores) + 4 * chosen,
            attention_bytes=nbytes(_cache(config, batch, TOKENS, 1)),
        )

    return build


def _gather(heads: int | None) -> Callable[[Chip, LlamaConfig, int], Built]:
    def build(chip: Chip, config: LlamaConfig, batch: int) -> Built:
        q, cache = _query(config, batch), _cache(config, batch, TOKENS)
        positions = _numbers(batch, heads or config.kv_heads, BUDGET)
        return Built(
            lambda q, cache, positions, layer: pk.gather_attention(q, cache, positions, layer=layer),
            (q, cache, positions, _numbers()),
            nbytes(_cache(config, batch, BUDGET, 1)) + 2 * nbytes(q) + nbytes(positions),
            cache=cache,
            tokens=batch * BUDGET if heads == 1 else None,
        )

    return build


def _gather_selection(chip: Chip, config: LlamaConfig, batch: int) -> Built:
    cache, into = _cache(config, batch, TOKENS), _cache(config, batch, BUDGET)
    positions = _numbers(batch, config.kv_heads, BUDGET)
    return Built(
        lambda cache, positions, into, layer: pk.gather_selection(cache, positions, into, layer=layer),
        (cache, positions, into, _numbers()),
        2 * nbytes(into) // into.layers + nbytes(positions),
        donate=(2,),
        cache=cache,
    )


def _selection_attention(chip: Chip, config: LlamaConfig, batch: int) -> Built:
    q, selection = _query(config, batch), _cache(config, batch, BUDGET, config.layers)
    valid = array((batch, config.kv_heads, BUDGET), jnp.bool_)
    return Built(
        lambda q, selection, valid, layer: pk.selection_attention(q, selection, valid, layer=layer),
        (q, selection, valid, _numbers()),
        nbytes(selection) // selection.layers + 2 * nbytes(q) + nbytes(valid),
        cache=selection,
    )


def _prefill_attention(chip: Chip, config: LlamaConfig, batch: int) -> Built:
    q = array((batch, config.query_heads, PREFILL, config.head_dim))
    cache = _cache(config, batch, TOKENS)
    return Built(
        lambda q, cache, start, layer: pk.prefill_attention(q, cache, start, layer=layer),
        (q, cache, _numbers(), _numbers()),
        nbytes(cache) // cache.layers + 2 * nbytes(q),
        4 * batch * config.query_heads * config.head_dim * PREFILL * TOKENS,
        cache=cache,
    )


def _causal_attention(chip: Chip, config: LlamaConfig, batch: int) -> Built:
    q = array((batch, config.query_heads, _TRAINED, config.head_dim))
    k = array((batch, config.kv_heads, _TRAINED, config.head_dim))
    return Built(
        pk.causal_attention,
        (q, k, k),
        2 * nbytes((q, k)),
        4 * batch * config.query_heads * config.head_dim * _TRAINED * _TRAINED // 2,
    )
