"""Drafts: tokens that a policy's cheap steps propose, before anybody has verified them."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.mesh import everywhere
from recycled_jax.acceptance import probabilities
from recycled_jax.blocks import LoopState, empty_trace, is_eos
from recycled_jax.decode import Params, decode_step
from recycled_jax.frame import DensePrefill, FixedStride, LayerTrace, Never, PrefillAttention, Recycling, StepKind
from recycled_jax.model import Llama
from recycled_jax.policies import Policy
from recycled_jax.sampling import Sampling, sample
from recycled_jax.state import DecodeState

DraftLength = int | Literal["auto"]  # tokens of a draft; `auto` adapts it to how much of the last one stood
LONGEST = 16  # of `auto`


class Draft(NamedTuple):
    """Tokens of the policy, of each row the first `counts`."""

    tokens: Int[Array, "batch draft"]
    counts: Int[Array, " batch"]
    probabilities: Float[Array, "batch draft vocab"] | None  # with which each was drawn; None when greedy
    trace: LayerTrace  # [draft, layers, batch]


def check_draft_length(draft: DraftLength) -> int:
    """The most tokens that a draft may have. Raises ValueError for less than one."""
    if draft == "auto":
        return LONGEST
    if not isinstance(draft, int) or draft < 1:
        raise ValueError(f"{draft=} must be at least 1 token, or 'auto'")
    return draft


def check_drafter(policy: Policy, prefill: PrefillAttention) -> None:
    """Raises ValueError for a policy that cannot draft for the full model, and for prompts that are not read as that
    reads them."""
    if not policy.method.keeps_cache:
        raise ValueError(
            f"policy {policy.name!r} drops the full cache, by which lossless=True verifies; expected one that keeps it"
        )
    if policy.correct_every is not None:
        raise ValueError(
            f"correct_every={policy.correct_every} is of no use with lossless=True, whose cache is exact after every "
            "round; expected None"
        )
    for way in (policy.prefill, prefill):
        if not isinstance(way, DensePrefill):
            raise ValueError(
                f"prompts read with {way} are not those of full attention; lossless=True expects a dense prefill"
            )


def draft_tokens(
    model: Llama,
    params: Params,
    loop: LoopState,
    limit: Int[Array, " batch"],
    key: jax.Array,
    *,
    policy: Policy,
    sampling: Sampling,
    draft: int,
    coverage: bool,
    implementation: str | None,
) -> tuple[Draft, DecodeState]:
    """Up to `limit` tokens for every row, fewer where one ends the text, and the decode state they leave behind.

    Steps count from 1 in every draft, so a schedule refreshes inside one only where its stride is shorter than that.
    """
    batch, greedy, kind = loop.token.shape[0], sampling.temperature == 0, _kind(policy, draft)
    chances = None if greedy else jnp.zeros((batch, draft, model.config.vocab), jnp.float32)
    nothing = jnp.zeros(batch, jnp.int32)
    empty = Draft(jnp.zeros((batch, draft), jnp.int32), nothing, chances, empty_trace(model, draft, batch))

    def step(carry):
        index, decode, token, going, drafted = carry
        logits, decode, trace = decode_step(
            model,
            params,
            decode,
            token,
            policy=policy,
            active=going,
            kind=kind,
            coverage=coverage,
            implementation=implementation,
        )
        chosen, _ = everywhere(sample(sampling, logits, jax.random.fold_in(key, index)))
        token = jnp.where(going, chosen, token)
        counts = drafted.counts + going
        drafted = Draft(
            drafted.tokens.at[:, index].set(token),
            counts,
            None if greedy else drafted.probabilities.at[:, index].set(probabilities(sampling, logits)),
            jax.tree.map(lambda buffer, value: buffer.at[index].set(value), drafted.trace, trace),
        )
        return index + 1, decode, token, going & (counts < limit) & ~is_eos(model, token), drafted

    start = DecodeState(loop.decode.cache, loop.decode.lengths, jnp.zeros_like(loop.decode.step), loop.decode.kept)
    carry = (jnp.int32(0), start, loop.token, limit > 0, empty)
    with jax.named_scope("draft"):
        _, decode, _, _, drafted = lax.while_loop(lambda carry: jnp.any(carry[3]), step, carry)
    return drafted, decode


def _kind(policy: Policy, draft: int) -> StepKind:
    """`recycled` where no schedule asks for a refresh within a draft: then the program has no conditional."""
    schedule = policy.method.schedule if isinstance(policy.method, Recycling) else None
    never = isinstance(schedule, Never) or (isinstance(schedule, FixedStride) and schedule.stride > draft)
    return "recycled" if never else "scheduled"
