"""Recycled attention of a whole sequence by its N × N mask, forward and backward, in plain numpy (float64)."""

import numpy as np


def allowed(q, k, *, stride, chunks, budget, pool, anchor, evict, reduce):
    """bool `[heads, tokens, tokens]`, for one row: `q` and `k` are `[heads or kv heads, tokens, head_dim]`."""
    heads, tokens, _ = q.shape
    group = heads // len(k)
    prefix = tokens - chunks * stride
    mask = np.tril(np.ones((heads, tokens, tokens), bool))
    for kv_head in range(len(k)):
        of_group = slice(kv_head * group, (kv_head + 1) * group)
        sets = [
            _selection(q[of_group, at], k[kv_head, : at + 1], budget, pool, reduce)
            for at in range(prefix - 1, tokens, stride)
        ]
        for chunk in range(chunks):
            start = prefix + chunk * stride
            for x in range(1, stride + 1):
                token = start + x - 1
                row = np.zeros(tokens, bool)
                row[sets[chunk][: budget - x] if evict else sets[chunk]] = True
                row[start : token + 1] = True
                if x == stride and anchor == "own":
                    row[:] = False
                    row[sets[chunk + 1]] = True
                if x == stride and anchor == "full":
                    row[: token + 1] = True
                mask[of_group, token] = row
    return mask


def _selection(q, k, budget, pool, reduce):
    """The tokens that the last one selects, strongest first, itself before all others."""
    logits = q @ k.T / np.sqrt(q.shape[-1])
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores = reduce(p / p.sum(axis=1, keepdims=True), axis=0)[:-1]
    half = pool // 2
    pooled = [scores[max(0, at - half) : at + half + 1].max() for at in range(len(scores))]
    best = sorted(range(len(scores)), key=lambda at: (-pooled[at], at))
    return [len(scores), *best[: budget - 1]]


def attention(q, k, v, mask):
    """`[heads, tokens, head_dim]`."""
    return np.einsum("htu,hud->htd", _weights(q, k, mask), _per_head(v, q))


def gradients(q, k, v, mask, of_output):
    """Those of q, k and v, when the output's is `of_output`."""
    scale, p = q.shape[-1] ** -0.5, _weights(q, k, mask)
    of_p = np.einsum("htd,hud->htu", of_output, _per_head(v, q))
    of_logits = p * (of_p - (of_p * p).sum(axis=-1, keepdims=True)) * scale
    of_q = np.einsum("htu,hud->htd", of_logits, _per_head(k, q))
    of_k = np.einsum("htu,htd->hud", of_logits, q)
    of_v = np.einsum("htu,htd->hud", p, of_output)
    return of_q, *(x.reshape(len(k), -1, *x.shape[1:]).sum(axis=1) for x in (of_k, of_v))


def _weights(q, k, mask):
    logits = np.einsum("htd,hud->htu", q, _per_head(k, q)) * q.shape[-1] ** -0.5
    weights = np.where(mask, np.exp(logits - logits.max()), 0)
    return weights / weights.sum(axis=-1, keepdims=True)


def _per_head(x, q):
    return np.repeat(x, len(q) // len(x), axis=0)
