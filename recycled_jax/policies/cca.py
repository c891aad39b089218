"""CCA-Attention while prompts are read and while decoding (Chen et al., ICML 2025, arXiv 2412.12465): for models that
were trained with it (`recycled_jax.cca`)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels import KVCache, empty_cache, gather_selection, prefill_attention, selection_attention
from recycled_jax import rope
from recycled_jax.cca import CCA, core, core_weights
from recycled_jax.config import LlamaConfig
from recycled_jax.frame import Attended, Axes, Here, LayerTrace, Method, PrefillAttention, PromptChunk, Token
from recycled_jax.policies.policy import Policy
from recycled_jax.prefill.attention import attend_gathered, by_kv_head, gather_slots

_QUERIES_AT_ONCE = 64  # of a prompt's chunk, so that no array of chunk × (cores + chunk + window) is made


@struct.dataclass
class PromptCores:
    """Keys and values of the cores, a slot each. Those of groups that are not complete hold padding, and are made anew
    when they are."""

    cores: KVCache
    config: LlamaConfig = struct.field(pytree_node=False)


@struct.dataclass
class CCAState:
    """`held`: first `cores` cores, then the latest tokens, each in the place of the oldest."""

    held: KVCache
    cores: int = struct.field(pytree_node=False)
    config: LlamaConfig = struct.field(pytree_node=False)


def make_cores(
    config: LlamaConfig,
    last_q: Float[Array, "batch query_heads groups head_dim"],
    k: Float[Array, "batch kv_heads groups group head_dim"],
    v: Float[Array, "batch kv_heads groups group head_dim"],
) -> tuple[Float[Array, "batch kv_heads groups head_dim"], Float[Array, "batch kv_heads groups head_dim"]]:
    """Keys and values of cores, float32, from rotated keys: turned on to where their group's last token stands, their
    mean is that of keys before rotation, turned there."""
    weights, size = core_weights(last_q, k), k.shape[3]
    behind = size - 1 - jnp.arange(size, dtype=jnp.int32)
    batch, kv_heads, groups, _, head_dim = k.shape
    turned = rope.rotate(
        k.astype(jnp.float32).reshape(batch, kv_heads * groups, size, head_dim), *rope.angles(config, behind[None, :])
    )
    return core(weights, turned.reshape(k.shape)), core(weights, v)


@dataclass(frozen=True)
class CCAPrefill(PrefillAttention):
    """Prompts are read by the rule, and the cores that decoding goes on with are made on the way."""

    rule: CCA

    def check(self, config, chunk):
        if chunk % self.rule.group:
            raise ValueError(
                f"prompts are read {chunk} tokens at a time, expected a multiple of group={self.rule.group} (of cca)"
            )

    def start(self, config, *, batch, capacity, dtype):
        cores = empty_cache(
            "head_major",
            layers=config.layers,
            batch=batch,
            kv_heads=config.kv_heads,
            capacity=max(capacity // self.rule.group, 1),
            head_dim=config.head_dim,
            dtype=dtype,
        )
        return PromptCores(cores, config)

    def attend(self, carried, handed, chunk, cache):
        read = chunk.q.shape[2]
        memory = self._add(carried, chunk)

        def dense():
            return prefill_attention(
                chunk.q, cache, chunk.start, layer=chunk.layer, implementation=chunk.implementation
            )

        def with_cores():
            return self._attend(memory, chunk, cache)

        attended = lax.cond(chunk.start + read < self.rule.window + self.rule.group, dense, with_cores)
        return attended, memory, handed

    def _add(self, memory: PromptCores, chunk: PromptChunk) -> PromptCores:
        """The memory with the cores of the chunk's groups."""
        size = self.rule.group

        def by_group(x: Float[Array, "batch kv_heads chunk head_dim"]):
            return x.reshape(*x.shape[:2], -1, size, x.shape[3])

        with jax.named_scope("attention/cores"):
            k, v = make_cores(memory.config, chunk.q[:, :, size - 1 :: size], by_group(chunk.k), by_group(chunk.v))
            return PromptCores(memory.cores.write(chunk.layer, chunk.start // size, k, v), memory.config)

    def _attend(
        self, memory: PromptCores, chunk: PromptChunk, cache: KVCache
    ) -> Float[Array, "batch query_heads chunk head_dim"]:
        read, cores, layer = chunk.q.shape[2], memory.cores, chunk.layer
        near = min(read + self.rule.longest - 1, cache.capacity)
        first = jnp.maximum(chunk.start + read - near, 0)
        slots = first + jnp.arange(near)
        near_k, near_v = cache.block(layer, first, near)
        k = jnp.concatenate([cores.keys(layer), near_k], axis=2)
        v = jnp.concatenate([cores.values(layer), near_v], axis=2)
        step = next(size for size in range(min(_QUERIES_AT_ONCE, read), 0, -1) if read % size == 0)
        grouped = by_kv_head(chunk.q, cache.kv_heads)

        def attend(number: Int[Array, ""]):
            queries = lax.dynamic_slice_in_dim(grouped, number * step, step, axis=3)
            lengths = chunk.start + number * step + 1 + jnp.arange(step)
            visible = self.rule.visible(lengths, cores.capacity, slots[None, :])
            return attend_gathered(queries, k, v, jnp.broadcast_to(visible, (cache.batch, 1, *visible.shape)))

        attended = lax.map(attend, jnp.arange(read // step))
        return jnp.moveaxis(attended, 0, 3).reshape(chunk.q.shape)


@dataclass(frozen=True)
class CCADecoding(Method):
    """The present token sees the cores and the latest tokens; the last of a group makes its core. No step reads the
    full cache; `keep_cache` True keeps it nevertheless, to measure coverage by: that of the tokens seen as themselves.
    """

    rule: CCA
    keep_cache: bool = True

    @property
    def axes(self):
        return Axes("none", f"every core(group={self.rule.group}), recent(window={self.rule.window})", "every-step")

    @property
    def prefill(self) -> CCAPrefill:
        """How its prompts have to be read."""
        return CCAPrefill(self.rule)

    @property
    def keeps_cache(self):
        return self.keep_cache

    def begin(self, prefilled, *, implementation):
        cache, prompts = prefilled.cache, prefilled.prompts
        cores, config = prompts.seen(self.prefill).cores, prompts.seen(self.prefill).config
        recent = min(self.rule.longest, cache.capacity)
        # nothing is copied to the places of the cores
        positions = jnp.pad(_latest(prompts.lengths, recent), ((0, 0), (cores.capacity, 0)), constant_values=-1)
        positions = jnp.broadcast_to(positions[:, None, :], (cache.batch, cache.kv_heads, cores.capacity + recent))

        def fill(layer: Int[Array, ""], held: KVCache) -> KVCache:
            held = gather_selection(cache, positions, held, layer=layer, implementation=implementation)
            return held.write(layer, 0, cores.keys(layer), cores.values(layer))

        held = cache.empty_like(capacity=cores.capacity + recent)
        return CCAState(lax.fori_loop(0, cache.layers, fill, held), cores.capacity, config)

    def attend(self, role, token, cache, state, handed, here):
        held, recent = state.held, state.held.capacity - state.cores
        # past the end: the row writes nothing
        at = jnp.where(here.active, state.cores + (here.lengths - 1) % recent, held.capacity)
        state = CCAState(held.append(here.layer, at, token.k, token.v), state.cores, state.config)
        complete = here.active & (here.lengths % self.rule.group == 0)
        with jax.named_scope("attention/cores"):
            state = self._add(state, token, complete, here)
        slots = _latest(here.lengths, recent)
        visible = self.rule.visible(here.lengths, state.cores, slots)
        with jax.named_scope("attention/selection"):
            output = selection_attention(token.q, state.held, visible[:, None, :], **here.to_op)
        no, nothing = jnp.zeros(here.lengths.shape, bool), jnp.full(here.lengths.shape, jnp.nan)
        trace = LayerTrace(
            requested=no,
            refreshed=no,
            similarity=nothing,
            overlap=nothing,
            attended=jnp.sum(visible, axis=1).astype(jnp.float32),
            scored=jnp.where(complete, 2.0 * self.rule.group, 0.0),  # what goes into a new core
            coverage=nothing,
        )
        local = jnp.where(visible[:, state.cores :], slots, -1)
        return Attended(output, state, handed, trace, local[:, None, :])

    def _add(self, state: CCAState, token: Token, complete, here: Here) -> CCAState:
        """The state with one more core in rows whose group is complete."""
        size, held, cores = self.rule.group, state.held, state.cores

        def made():
            slots = here.lengths[:, None] - size + jnp.arange(size)[None, :]
            entries = (cores + slots % (held.capacity - cores))[:, None]
            # On TPU this copies what the layer holds, once in `group` steps of a row.
            k, v = (gather_slots(x, entries) for x in (held.keys(here.layer), held.values(here.layer)))
            k, v = make_cores(state.config, token.q[:, :, None], k[:, :, None], v[:, :, None])
            return k[:, :, 0], v[:, :, 0]

        # Only the new cores leave the conditional: a branch that returned all of them would copy them.
        zeros = jnp.zeros(token.k.shape, jnp.float32)
        k, v = lax.cond(jnp.any(complete), made, lambda: (zeros, zeros))
        at = jnp.where(complete, here.lengths // size - 1, held.capacity)
        return CCAState(held.append(here.layer, at, k, v), cores, state.config)


def _latest(lengths: Int[Array, " batch"], recent: int) -> Int[Array, "batch recent"]:
    """The slot whose token each place holds when every token has gone to place slot % recent; -1 where none has yet."""
    last = lengths[:, None] - 1
    return jnp.maximum(last - (last - jnp.arange(recent, dtype=jnp.int32)[None, :]) % recent, -1)


def cca(group: int = 16, window: int = 1024, keep_cache: bool = True) -> Policy:
    """CCA-Attention, for models trained with it: at least the `window` latest tokens, and all before them through one
    core for each `group`, while prompts are read, too. `keep_cache=False` drops the full cache (Chen et al., ICML 2025,
    arXiv 2412.12465)."""
    rule = CCA(group, window)
    return Policy("cca", CCADecoding(rule, keep_cache), CCAPrefill(rule))
