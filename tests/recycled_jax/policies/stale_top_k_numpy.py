"""Top-k of an earlier row in plain numpy: what the token `delay` steps ago would have kept, and the tokens since."""

from collections import defaultdict

from tests.recycled_jax.policies.numpy_llama import NumpyPolicy
from tests.recycled_jax.policies.top_k_numpy import ranked_past


class NumpyStaleTopK(NumpyPolicy):
    """The row may be one of the prompt. Where there is none so early, all slots are newer."""

    def __init__(self, *, k, delay, pool=1, group_reduction="max"):
        self.k, self.delay, self.pool, self.group_reduction = k, delay, pool, group_reduction
        self.selected = defaultdict(list)

    def attention(self, layer, step):
        then = layer.length - 1 - self.delay  # the slot whose row it is
        newer = list(range(max(then + 1, 0), layer.length))
        chosen = []
        for head in range(layer.config.kv_heads):
            kept = []
            if then >= 0:
                past = ranked_past(layer, head, self.pool, self.group_reduction, present=then)
                kept = [then, *past[: self.k - 1 - self.delay]]
            chosen.append(sorted(kept + newer))
        self.selected[layer.number].append(chosen)
        return layer.attend(layer.q[-1], chosen)
