"""ActQKV, its decoding part: InfLLM's blocks by cosine, more of them for layers whose scores are spread out."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from recycled_jax.frame import Attended, Axes, Method
from recycled_jax.frame.method import in_words, selecting_trace
from recycled_jax.policies.infllm import BlockMemory, Blocks, Representatives, attend_and_weigh, representatives_read
from recycled_jax.policies.policy import Policy


@dataclass(frozen=True)
class EntropyBudgets:
    """Blocks for every layer in proportion to the entropy of its scores, `mean` a layer on average.

    The entropy of a layer is the mean of its last `samples`. Layers are served bottom up, each with its share of what
    is left, but not fewer than `fewest` (or the mean, where that is less: then none gets less than the mean, and
    together they get more) and not more than twice the mean. Until a row has `samples` of them, its layers get the
    mean.
    """

    mean: int
    samples: int
    fewest: int

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1")
        if self.fewest < 1:
            raise ValueError(f"fewest={self.fewest} must be at least 1 block")

    @property
    def most(self) -> int:
        """Blocks that a layer gets at the utmost."""
        return 2 * self.mean

    def grant(self, entropies: Float[Array, "layers batch"]) -> Int[Array, "layers batch"]:
        """Blocks per layer."""
        left = jnp.full(entropies.shape[1], self.mean * entropies.shape[0], jnp.int32)
        granted = []
        for layer in range(entropies.shape[0]):
            rest = jnp.sum(entropies[layer:], axis=0)
            share = jnp.where(rest > 0, entropies[layer] / jnp.where(rest > 0, rest, 1), 1 / (len(entropies) - layer))
            rounded = jnp.floor(share * left + 0.5).astype(jnp.int32)
            granted.append(jnp.clip(rounded, min(self.fewest, self.mean), self.most))
            left = left - granted[-1]
        return jnp.stack(granted)


@struct.dataclass
class ActMemory:
    """What is kept from step to step."""

    blocks: BlockMemory
    entropies: Float[Array, "layers batch samples"]  # the last ones, in a ring
    taken: Int[Array, "layers batch"]  # samples so far


@dataclass(frozen=True)
class ActQKV(Method):
    """One choice of blocks for all heads, anew at every step, as many as the layer is granted."""

    blocks: Blocks
    representatives: Representatives
    budgets: EntropyBudgets

    @property
    def axes(self):
        scorer = f"cosine with representatives({self.representatives.count} of a block)"
        return Axes(scorer, f"{in_words(self.blocks)}, by {in_words(self.budgets)}", "every-step")

    @property
    def observers(self):
        return self.representatives.observers

    def begin(self, prefilled, *, implementation):
        layers, batch = prefilled.cache.layers, prefilled.cache.batch
        return ActMemory(
            self.representatives.begin(prefilled),
            jnp.zeros((layers, batch, self.budgets.samples)),
            jnp.zeros((layers, batch), jnp.int32),
        )

    def before_layers(self, state: ActMemory, cache) -> Int[Array, "layers batch"]:
        """The blocks granted to every layer in this step, from the entropies of those before it."""
        full = jnp.all(state.taken >= self.budgets.samples, axis=0)
        granted = self.budgets.grant(jnp.mean(state.entropies, axis=-1))
        return jnp.where(full[None, :], granted, self.budgets.mean)

    def attend(self, role, token, cache, state: ActMemory, handed, here):
        assert cache is not None
        with jax.named_scope("attention/select"):
            memory = self.representatives.append(state.blocks, cache, here)
            reps = memory.representatives[here.layer]
            # A probe over a window of one query is that query, so no statistics are kept.
            scores = _cosines(token.q.astype(jnp.float32), reps)
            positions = self.blocks.select(
                scores[:, None, :], here.lengths, granted=handed[here.layer], most=self.budgets.most
            )
        with jax.named_scope("attention/selection"):
            output, probabilities = attend_and_weigh(token.q, cache, positions, here.layer)
            memory = self.representatives.receive(memory, probabilities, positions, here)
        state = self._sample(ActMemory(memory, state.entropies, state.taken), scores, here)
        return Attended(
            output, state, handed, selecting_trace(positions, representatives_read(reps, cache, here), here), positions
        )

    def _sample(self, state: ActMemory, scores: Float[Array, "batch blocks"], here) -> ActMemory:
        """One more entropy, from rows with at least two blocks to choose from."""
        capacity = state.blocks.received.shape[-1]
        candidates = self.blocks.candidates(here.lengths, capacity)
        entropy, counts = normalized_entropy(scores, candidates), jnp.sum(candidates, axis=-1) > 1
        counts &= here.active
        taken = state.taken[here.layer]
        place = jnp.where(counts, taken % self.budgets.samples, self.budgets.samples)  # past the end: no write
        rows = jnp.arange(taken.shape[0])
        return ActMemory(
            state.blocks,
            state.entropies.at[here.layer, rows, place].set(entropy, mode="drop"),
            state.taken.at[here.layer].add(counts),
        )


def normalized_entropy(scores: Float[Array, "batch blocks"], counts: Array) -> Float[Array, " batch"]:
    """Of the softmax over the blocks that count, as a share of the largest possible, which is log(number of blocks)."""
    logits = jnp.where(counts, scores, -jnp.inf)
    p = jax.nn.softmax(logits, axis=-1, where=counts)
    entropy = -jnp.sum(jnp.where(counts, p * jnp.log(jnp.where(p > 0, p, 1.0)), 0.0), axis=-1)
    return entropy / jnp.log(jnp.maximum(jnp.sum(counts, axis=-1), 2))


def _cosines(
    q: Float[Array, "batch query_heads head_dim"], reps: Float[Array, "batch query_heads blocks head_dim"]
) -> Float[Array, "batch blocks"]:
    """Of the query heads taken together, as one long vector."""
    norms = jnp.linalg.norm(q, axis=(1, 2))[:, None] * jnp.sqrt(jnp.sum(reps * reps, axis=(1, 3)))
    return jnp.einsum("bhd,bhpd->bp", q, reps) / jnp.maximum(norms, 1e-30)


def act_qkv(
    k: int = 2048,
    block: int = 32,
    sinks: int = 64,
    recent: int = 512,
    representatives: int = 4,
    samples: int = 100,
    fewest: int = 32,
) -> Policy:
    """ActQKV while decoding, where its probe is the present query: blocks by the cosine with their representative keys,
    one set for all heads; layers with spread-out scores are granted more, `k` is their mean (Xiao et al.,
    arXiv 2502.13542)."""
    blocks = Blocks(k, block, sinks, recent)
    budgets = EntropyBudgets(blocks.budget, samples, fewest)
    return Policy("act-qkv", ActQKV(blocks, Representatives(blocks, representatives), budgets))
