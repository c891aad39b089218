"""The named policies. A factory's signature is its knobs, its docstring what `recycled policies` prints."""

from collections.abc import Callable

from recycled_jax.named import make
from recycled_jax.policies.act_qkv import act_qkv
from recycled_jax.policies.attention_predictor import attention_predictor
from recycled_jax.policies.cca import cca
from recycled_jax.policies.composed import composed
from recycled_jax.policies.double_sparse import double_sparse
from recycled_jax.policies.full import full
from recycled_jax.policies.h2o import h2o
from recycled_jax.policies.infllm import infllm
from recycled_jax.policies.less_is_more import less_is_more
from recycled_jax.policies.long_heads import long_heads
from recycled_jax.policies.policy import Policy
from recycled_jax.policies.quest import quest
from recycled_jax.policies.random_slots import random_slots
from recycled_jax.policies.recycled import recycled, recycled_dynamic, recycled_v1
from recycled_jax.policies.recycled_tidal import recycled_tidal
from recycled_jax.policies.snapkv import snapkv
from recycled_jax.policies.squeezed import squeezed
from recycled_jax.policies.stale_top_k import stale_top_k
from recycled_jax.policies.streaming import streaming
from recycled_jax.policies.tactic import tactic
from recycled_jax.policies.tidal import tidal
from recycled_jax.policies.token_select import token_select
from recycled_jax.policies.top_k import top_k
from recycled_jax.policies.top_p import top_p
from recycled_jax.policies.tova import tova

POLICIES: dict[str, Callable[..., Policy]] = {
    "full": full,
    # recycling over steps, over layers, over both, and per head from chunks
    "recycled": recycled,
    "recycled-dynamic": recycled_dynamic,
    "recycled-v1": recycled_v1,
    "tidal": tidal,
    "recycled-tidal": recycled_tidal,
    "long-heads": long_heads,
    # the cache loses what is not kept
    "streaming": streaming,
    "h2o": h2o,
    "snapkv": snapkv,
    "tova": tova,
    # a selection at every step, or nearly
    "quest": quest,
    "double-sparse": double_sparse,
    "token-select": token_select,
    "tactic": tactic,
    "squeezed": squeezed,
    "infllm": infllm,
    "act-qkv": act_qkv,
    "attention-predictor": attention_predictor,
    "less-is-more": less_is_more,
    # for models that were trained with it
    "cca": cca,
    # references
    "top-k": top_k,
    "top-p": top_p,
    "stale-top-k": stale_top_k,
    "random": random_slots,
    # of one's own
    "composed": composed,
}


def make_policy(name: str, **knobs: object) -> Policy:
    """The policy registered as `name` with its knobs set. Raises as `make`."""
    return make("policy", POLICIES, name, knobs)
