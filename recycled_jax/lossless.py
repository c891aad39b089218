"""Lossless recycling: a policy drafts a few tokens, one full-attention pass verifies them all and refreshes.

A round drafts up to S tokens with the policy's cheap steps. Then one pass with full attention reads the cache once for
those tokens and the one before them: the longest prefix that the model agrees with stands, and after it one token more,
the model's own. Keys and values of what stands are exact, and the next selection is made from the pass's scores. So the
text is that of full decoding, whatever the policy; a bad one only makes rounds short. Where the two first choices are
so close that rounding decides, the text is by definition the verifying pass's; such tokens are counted.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.mesh import everywhere
from recycled_jax.acceptance import accept_greedy, accept_sampled, near_ties, probabilities
from recycled_jax.blocks import Block, LoopState, empty_block, is_eos
from recycled_jax.decode import Params
from recycled_jax.drafting import Draft, draft_tokens
from recycled_jax.frame import LayerTrace
from recycled_jax.frame.method import dense_trace
from recycled_jax.frame.verifying import Read, after_verification
from recycled_jax.model import Llama
from recycled_jax.policies import Policy
from recycled_jax.sampling import Sampling
from recycled_jax.state import DecodeState
from recycled_jax.verification import verify


@struct.dataclass
class LosslessState:
    """Between two rounds. The selection of `loop.decode` was made by its last token, and its cache is exact."""

    loop: LoopState
    left: Int[Array, " batch"]  # tokens that the row may still give
    window: Int[Array, " batch"]  # most tokens that its next draft may have
    round: Int[Array, ""]  # rounds so far

    @property
    def active(self) -> Bool[Array, " batch"]:
        """Rows that have not stopped."""
        return self.loop.active


class Round(NamedTuple):
    """What a round gave every row: the first `given` of its `tokens`. -1 in the tallies of an idle row."""

    tokens: Int[Array, "*rounds columns batch"]
    log_probs: Float[Array, "*rounds columns batch"]
    trace: LayerTrace  # [columns, layers, batch], of each token as `run_rounds` tells
    given: Int[Array, "*rounds batch"]
    drafted: Int[Array, "*rounds batch"]
    accepted: Int[Array, "*rounds batch"]
    near_ties: Int[Array, "*rounds batch"]  # tokens given whose two first choices are as good as equal


@functools.partial(jax.jit, static_argnames=("draft", "adapt"), donate_argnames=("loop",))
def begin_rounds(loop: LoopState, left: Int[Array, " batch"], *, draft: int, adapt: bool) -> LosslessState:
    """Before the first round, in which drafts have 4 tokens at most where they are to adapt."""
    window = jnp.full_like(left, min(draft, 4) if adapt else draft)
    loop = LoopState(loop.decode, loop.token, loop.active & (left > 0), loop.key)
    return LosslessState(loop, left, window, jnp.zeros((), jnp.int32))


@functools.partial(
    jax.jit,
    static_argnames=("model", "policy", "sampling", "draft", "adapt", "rounds", "coverage", "implementation"),
    donate_argnames=("state",),
)
def run_rounds(
    model: Llama,
    params: Params,
    state: LosslessState,
    *,
    policy: Policy,
    sampling: Sampling,
    draft: int,
    adapt: bool,
    rounds: int,
    coverage: bool,
    implementation: str | None,
) -> tuple[LosslessState, Round]:
    """Up to `rounds` rounds, fewer when all rows stop; drafts have at most `draft` tokens. What they gave has rounds as
    its first axis, with nothing in those that did not run.

    Each token counts as a step in the trace. Those of the policy that stand have what their draft step did; the last of
    a round has that of a full step, with all else that the round read, refused tokens for instance, as `scored`.
    """
    one_round = functools.partial(
        _round,
        model,
        params,
        policy=policy,
        sampling=sampling,
        draft=draft,
        adapt=adapt,
        coverage=coverage,
        implementation=implementation,
    )

    def unfinished(carry):
        done, state, _ = carry
        return (done < rounds) & jnp.any(state.active)

    def body(carry):
        done, state, given = carry
        state, of_round = one_round(state)
        return done + 1, state, jax.tree.map(lambda all, one: all.at[done].set(one), given, of_round)

    carry = (jnp.int32(0), state, _no_rounds(model, rounds, draft + 1, state.left.shape[0]))
    _, state, given = lax.while_loop(unfinished, body, carry)
    return state, everywhere(given)


def joined(rounds: Round) -> Block:
    """What rounds gave, on the host, as a block of steps: of each row one token after the other."""
    given = np.asarray(rounds.given)
    _, columns, batch = rounds.tokens.shape
    stands = np.arange(columns)[None, :, None] < given[:, None, :]
    first = np.argsort(~stands.reshape(-1, batch), axis=0, kind="stable")

    def join(x: Array | np.ndarray) -> np.ndarray:
        flat = np.asarray(x).reshape(-1, *x.shape[2:])
        return np.take_along_axis(flat, first if flat.ndim == 2 else first[:, None, :], axis=0)

    tokens, log_probs, trace = jax.tree.map(join, (rounds.tokens, rounds.log_probs, rounds.trace))
    steps: Any = given.sum(axis=0)
    return Block(tokens, log_probs, trace, steps)


def _no_rounds(model: Llama, rounds: int, columns: int, batch: int) -> Round:
    empty = empty_block(model, rounds * columns, batch)
    tokens, log_probs, trace = jax.tree.map(
        lambda x: x.reshape(rounds, columns, *x.shape[1:]), (empty.tokens, empty.log_probs, empty.trace)
    )
    idle = jnp.full((rounds, batch), -1, jnp.int32)
    return Round(tokens, log_probs, trace, jnp.zeros_like(idle), idle, idle, idle)


def _round(
    model: Llama,
    params: Params,
    state: LosslessState,
    *,
    policy: Policy,
    sampling: Sampling,
    draft: int,
    adapt: bool,
    coverage: bool,
    implementation: str | None,
) -> tuple[LosslessState, Round]:
    """One draft and its verification."""
    loop, method = state.loop, policy.method
    before, active = loop.decode, loop.active
    key = jax.random.fold_in(loop.key, state.round + 1)
    # One token always comes from the pass, and none is drafted beyond the last that may be given.
    drafted, after = draft_tokens(
        model,
        params,
        loop,
        jnp.where(active, jnp.minimum(state.window, state.left - 1), 0),
        key,
        policy=policy,
        sampling=sampling,
        draft=draft,
        coverage=coverage,
        implementation=implementation,
    )
    assert after.cache is not None  # `check_drafter`
    tokens = jnp.concatenate([loop.token[:, None], drafted.tokens], axis=1)
    logits, cache, seen = verify(
        model, params, after.cache, tokens, before.lengths, method=method, implementation=implementation
    )
    with jax.named_scope("accept"):
        if drafted.probabilities is None:
            accepted, following = everywhere(accept_greedy(drafted.tokens, drafted.counts, logits))
        else:
            target = probabilities(sampling, logits)
            accepted, following = everywhere(
                accept_sampled(
                    jax.random.fold_in(key, draft), drafted.tokens, drafted.counts, drafted.probabilities, target
                )
            )
    given = _given(model, drafted, accepted, following, active)
    last = jnp.take_along_axis(given.tokens, jnp.maximum(given.counts - 1, 0)[:, None], axis=1)[:, 0]
    last = jnp.where(active, last, loop.token)
    seen = seen._replace(counts=given.counts)
    kept, read = after_verification(method, before.kept, seen, cache, implementation=implementation)
    left = state.left - given.counts
    window = jnp.where(accepted == drafted.counts, 2 * state.window, accepted + 1) if adapt else state.window
    decode = DecodeState(cache, before.lengths + given.counts, jnp.zeros_like(before.step), kept)
    running = active & ~is_eos(model, last) & (left > 0)
    columns = jnp.arange(draft + 1)[None, :]
    ties = near_ties(logits, jnp.dtype(model.dtype)) & (columns < given.counts[:, None])
    ties &= drafted.probabilities is None  # a draw has none
    tallies = drafted.counts, accepted, jnp.sum(ties, axis=1, dtype=jnp.int32)
    of_round = Round(
        given.tokens.T,
        _log_probs(logits, given.tokens).T,
        _trace(drafted, given.counts, before.lengths, read),
        given.counts,
        *(jnp.where(active, count, -1) for count in tallies),
    )
    state = LosslessState(LoopState(decode, last, running, loop.key), left, jnp.clip(window, 1, draft), state.round + 1)
    return state, of_round


class Given(NamedTuple):
    """Tokens that a round adds to the text, of each row the first `counts`."""

    tokens: Int[Array, "batch draft+1"]
    counts: Int[Array, " batch"]


def _given(
    model: Llama,
    drafted: Draft,
    accepted: Int[Array, " batch"],
    following: Int[Array, " batch"],
    active: Bool[Array, " batch"],
) -> Given:
    """What stands of a draft, then the token that follows it, unless the draft ends the text (no draft goes on after
    its end)."""
    columns = jnp.arange(drafted.tokens.shape[1] + 1)[None, :]
    tokens = jnp.where(columns < accepted[:, None], jnp.pad(drafted.tokens, ((0, 0), (0, 1))), following[:, None])
    last = jnp.take_along_axis(tokens, jnp.maximum(accepted - 1, 0)[:, None], axis=1)[:, 0]
    ended = (accepted > 0) & is_eos(model, last)
    return Given(tokens, jnp.where(active, accepted + ~ended, 0))


def _log_probs(
    logits: Float[Array, "batch columns vocab"], tokens: Int[Array, "batch columns"]
) -> Float[Array, "batch columns"]:
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _trace(drafted: Draft, counts: Int[Array, " batch"], first: Int[Array, " batch"], read: Read) -> LayerTrace:
    """Of the tokens given, [draft + 1, layers, batch], as `run_rounds` tells."""
    steps = jnp.arange(drafted.tokens.shape[1])[:, None, None]
    bytes_of_last = (steps >= counts[None, None, :] - 1) & (steps < drafted.counts[None, None, :])
    others = 2 * drafted.trace.attended + drafted.trace.scored
    verified = dense_trace(first + drafted.counts + 1, counts > 0)
    scored = read + jnp.sum(jnp.where(bytes_of_last, others, 0.0), axis=0)
    is_last = (jnp.arange(len(steps) + 1)[:, None] == counts[None, :] - 1)[:, None, :]

    def join(drafts: Array, full: Array) -> Array:
        full = jnp.broadcast_to(full if full.ndim == 2 else full[None, :], drafts.shape[1:])
        return jnp.where(is_last, full[None], jnp.concatenate([drafts, full[None]]))

    return jax.tree.map(join, drafted.trace, verified._replace(scored=scored))
