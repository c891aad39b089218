"""TidalDecode: a few layers select at every step, the layers between take over what they found."""

from recycled_jax.frame import AttentionScorer, GroupReduction, LayerPlan, RefreshAttention, Selecting, TopK
from recycled_jax.frame.selectors import Shared
from recycled_jax.policies.policy import Policy


def tidal(
    k: int = 1024,
    dense_layers: tuple[int, ...] = (0, 1),
    selection_layers: tuple[int, ...] = (2, 13),
    group_reduction: GroupReduction = "max",
    shared: Shared | None = None,
    attends: RefreshAttention = "full",
    correct_every: int | None = None,
) -> Policy:
    """TidalDecode: at every step the `selection_layers` read the whole cache and select `k` slots, which the layers
    above them, up to the next one, attend; the `dense_layers` read everything (Yang et al., arXiv 2410.05076). Per kv
    head, where the paper keeps a selection for each query head; `shared` makes it one for all of them. The second
    selection layer depends on the model: 13 for Llama-3-8B, 7 for the Llama 2 family (`tidal_calibration` finds it).
    Every `correct_every` steps the keys and values of the new tokens are computed anew with dense attention."""
    layers = LayerPlan(tuple(dense_layers), tuple(selection_layers))
    method = Selecting(AttentionScorer(group_reduction), TopK(k, shared=shared), layers, attends)
    return Policy("tidal", method, correct_every=correct_every)
