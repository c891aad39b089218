"""Prompts that have been read, read on: more tokens after them, and several rows that begin with the same one.

A second question about a context, a further turn of a conversation: what was read is kept, only the new tokens go
through the model. `repeat_rows`, then `extend`, asks several questions about one context at once.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels import KVCache
from pallas_kernels.mesh import parts
from recycled_jax.decode import Params, read_on
from recycled_jax.frame import Observer, Prefilled, PromptRecord
from recycled_jax.generate import pad
from recycled_jax.model import Llama
from recycled_jax.sharding import on_its_mesh

_PIECE = 16  # tokens; chunks are multiples of it, so that suffixes of all lengths need few programs
_ALIGNMENT = 128  # slots; as `generate.read` rounds capacities


@on_its_mesh
def extend(
    model: Llama,
    params: Params,
    prefilled: Prefilled,
    suffixes: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    capacity: int | None = None,
    chunk: int = 512,
    keep: bool = True,
    implementation: str | None = None,
) -> Prefilled:
    """What `generate.read` makes of each row's prompt and its suffix together, but only the suffix goes through the
    model, in equal pieces of at most `chunk` tokens.

    `model` and `params` are those that read the prompts; a suffix is token ids, at least one, without the special ones
    that begin a prompt. Room for `max_new_tokens` more is kept. `capacity` is the number of cache slots per row
    (default: what is needed), rounded up to a multiple of 128 and to where each row's last piece ends; there are never
    fewer than before. Policies that may go on from here are those that could from `prefilled`.

    The cache is copied once, into more slots where these are needed, and `prefilled` can be extended again in another
    way. `keep=False` gives it up: its cache is written in place where it has the slots, and must not be read again.

    Raises ValueError for a number of suffixes other than that of rows, an empty one, an id outside the vocabulary, a
    capacity that will not do, and prompts whose reading depends on where chunks begin: all ways but the dense one.
    """
    record = prefilled.prompts
    for name, value in (("max_new_tokens", max_new_tokens), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if len(suffixes) != len(record.lengths):
        raise ValueError(f"suffixes has {len(suffixes)} rows, expected {len(record.lengths)}, one for each prompt")
    if not record.prefill.extends:
        raise ValueError(f"prompts read with {record.prefill} cannot be extended, expected prompts read densely")
    tokens, counts = pad(suffixes, model.config.vocab, 1, argument="suffixes")
    longest = tokens.shape[1]
    piece = min(chunk, _up_to_multiple(-(-longest // -(-longest // chunk)), _PIECE))
    tokens = np.pad(tokens, ((0, 0), (0, -longest % piece)))

    lengths, had = np.asarray(record.lengths), prefilled.cache.capacity
    needed = int((lengths + counts).max()) + max_new_tokens
    if capacity is not None and capacity < needed:
        raise ValueError(
            f"capacity={capacity} is too small for the longest prompt with its suffix and {max_new_tokens=}: "
            f"{needed} slots are needed"
        )
    ends = lengths + _up_to_multiple(counts, piece)  # of each row's last piece
    slots = max(capacity or needed, int(ends.max()))
    slots = had if slots <= had else _up_to_multiple(slots, _ALIGNMENT * parts())
    run = _extend if keep or slots > had else _extend_donating
    return run(
        model,
        params,
        prefilled.cache,
        record,
        tokens,
        counts,
        capacity=slots,
        chunk=piece,
        # Rows that stand at one slot are read as prompts are: whole chunks written, and kernels that know one start.
        abreast=bool(np.all(lengths == lengths[0])) and int(lengths[0]) + tokens.shape[1] <= slots,
        implementation=implementation,
    )


def _extended(
    model: Llama,
    params: Params,
    cache: KVCache,
    record: PromptRecord,
    tokens: Int[Array, "batch tokens"],
    counts: Int[Array, " batch"],
    *,
    capacity: int,
    chunk: int,
    abreast: bool,
    implementation: str | None,
) -> Prefilled:
    sizes = {"batch": cache.batch, "capacity": capacity, "dtype": model.dtype}
    observed = tuple(
        _at_the_beginning(
            way.start(model.config, **sizes), way.resume(seen, counts) if isinstance(way, Observer) else seen
        )
        for way, seen in zip(record.observers, record.observed, strict=True)
    )
    if capacity > cache.capacity:
        cache = cache.extended(capacity=capacity)
    resumed = PromptRecord(record.lengths, record.logits, observed, record.observers, record.config)
    first = record.lengths[0] if abreast else record.lengths
    return read_on(
        model,
        params,
        Prefilled(cache, resumed),
        tokens,
        counts,
        first=first,
        chunk=chunk,
        implementation=implementation,
    )


_STATIC = ("model", "capacity", "chunk", "abreast", "implementation")
_extend = jax.jit(_extended, static_argnames=_STATIC)
_extend_donating = jax.jit(_extended, static_argnames=_STATIC, donate_argnames=("cache",))


def repeat_rows(prefilled: Prefilled, rows: Sequence[int]) -> Prefilled:
    """Prompts in which row i is row `rows[i]` of those given, as often as it is named: one context for several
    questions.

    The rows are copied, so each takes the memory of a prompt that was read; it is the reading that is saved.

    Raises ValueError for no rows, and for one that there is not.
    """
    batch = len(prefilled.prompts.lengths)
    if not rows:
        raise ValueError("rows is empty, expected at least one")
    outside = [row for row in rows if not 0 <= row < batch]
    if outside:
        raise ValueError(f"rows holds {outside[0]}, expected rows from 0 to {batch - 1}")
    return _take(prefilled, np.asarray(rows, np.int32))


@jax.jit
def _take(prefilled: Prefilled, rows: Int[Array, " taken"]) -> Prefilled:
    def of_layers(tree):  # of a stack of layers, rows are the second axis
        return jax.tree.map(lambda stack: stack[:, rows], tree)

    record = prefilled.prompts
    record = PromptRecord(
        record.lengths[rows], record.logits[rows], of_layers(record.observed), record.observers, record.config
    )
    return Prefilled(of_layers(prefilled.cache), record)


def _at_the_beginning[Tree](of: Tree, tree: Tree) -> Tree:
    """The arrays of `of`, that begin with those of `tree`, none of which is larger."""
    return jax.tree.map(lambda larger, x: lax.dynamic_update_slice(larger, x, (0,) * x.ndim), of, tree)


def _up_to_multiple[Number: int | np.ndarray](number: Number, of: int) -> Number:
    return -(-number // of) * of  # pyright: ignore[reportReturnType]
