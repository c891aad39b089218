"""What happened during a generation, read off the steps' traces on the host: schedule, overlap, bytes."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from recycled_jax.config import LlamaConfig
from recycled_jax.policies import Policy


@dataclass(frozen=True)
class Telemetry:
    """The trace of a generation; the derived figures are methods.

    Step 0 of the arrays is the first decode step. Row b was active in its first `steps[b]` steps; later entries of
    it are meaningless. `prompt_lengths` and `steps` are in tokens.
    """

    config: LlamaConfig
    policy: Policy
    bytes_per_element: int
    prompt_lengths: Int[np.ndarray, " batch"]
    steps: Int[np.ndarray, " batch"]
    requested: Bool[np.ndarray, "steps layers batch"]
    refreshed: Bool[np.ndarray, "steps layers batch"]
    similarity: Float[np.ndarray, "steps layers batch"]
    overlap: Float[np.ndarray, "steps layers batch"]
    attended: Float[np.ndarray, "steps layers batch"]
    scored: Float[np.ndarray, "steps layers batch"]
    coverage: Float[np.ndarray, "steps layers batch"]

    def slots(self) -> Int[np.ndarray, "steps batch"]:
        """Slots in use at each step, the present token included."""
        return self.prompt_lengths[None, :] + 1 + np.arange(len(self.refreshed))[:, None]

    def refreshes(self) -> Int[np.ndarray, "layers batch"]:
        """Refreshes after prefill."""
        return self.refreshed.sum(axis=0)

    def effective_stride(self) -> Float[np.ndarray, "layers batch"]:
        """Decode steps per refresh; infinite where none happened."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.steps[None, :] / self.refreshes()

    def requested_stride(self) -> Float[np.ndarray, "layers batch"]:
        """As `effective_stride`, from the rows' own wishes, before the row rule."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.steps[None, :] / self.requested.sum(axis=0)

    def mean_overlap(self) -> Float[np.ndarray, "layers batch"]:
        """Mean Jaccard overlap of successive selections; NaN where no refresh happened."""
        return _mean_where(self.overlap, ~np.isnan(self.overlap))

    def mean_coverage(self) -> Float[np.ndarray, "layers batch"]:
        """Mean share of attention mass on the selection over the row's steps; NaN when it was not recorded."""
        return _mean_where(self.coverage, ~np.isnan(self.coverage) & self._running())

    def mean_attended(self) -> Float[np.ndarray, "layers batch"]:
        """Mean slots attended per step and kv head."""
        return _mean_where(self.attended, self._running())

    def density(self) -> Float[np.ndarray, " batch"]:
        """Slots attended over slots in use, mean over the row's steps and layers; NaN without steps."""
        shares = self.attended / self.slots()[:, None, :]
        return _mean_where(shares, np.broadcast_to(self._running(), shares.shape)).mean(axis=0)

    def kv_bytes_per_token(self) -> Float[np.ndarray, " batch"]:
        """Bytes that a decode step had to read to attend and to score, mean over the row's steps; 0 without steps.

        Valid slots by the observed schedule, whatever a back end reads beyond them: keys and values of what is
        attended, what the scorer reads (keys, or what it keeps in their place), and selections that are copied.
        """
        return self._mean_over_steps(2 * self.attended + self.scored)

    def dense_kv_bytes_per_token(self) -> Float[np.ndarray, " batch"]:
        """What the dense policy would have read for the same tokens."""
        slots = self.slots()[:, None, :] * np.ones((1, self.config.layers, 1))
        return self._mean_over_steps(2 * slots)

    def _running(self) -> Bool[np.ndarray, "steps 1 batch"]:
        """Whether the row was active at the step."""
        return np.arange(len(self.refreshed))[:, None, None] < self.steps[None, None, :]

    def _mean_over_steps(self, slots: Float[np.ndarray, "steps layers batch"]) -> Float[np.ndarray, " batch"]:
        total = np.where(self._running(), slots, 0).sum(axis=(0, 1))
        per_slot = self.config.kv_heads * self.config.head_dim * self.bytes_per_element
        return total * per_slot / np.maximum(self.steps, 1)


@dataclass(frozen=True)
class Rounds:
    """What the drafts of a lossless generation came to (`lossless`); -1 in rounds in which a row was idle.

    Steps of the `Telemetry` beside it are tokens: those of a draft that stood read what their draft step did, the last
    of a round what the verifying pass, the tokens that were refused and the new selection did.
    """

    drafted: Int[np.ndarray, "rounds batch"]
    accepted: Int[np.ndarray, "rounds batch"]
    near_ties: Int[np.ndarray, "rounds batch"]

    def counts(self) -> Int[np.ndarray, " batch"]:
        """Rounds of each row."""
        return self._ran().sum(axis=0)

    def mean_accepted(self) -> Float[np.ndarray, " batch"]:
        """Drafted tokens that stood per round; one more comes from the verifying pass. NaN without rounds."""
        return _mean_where(self.accepted, self._ran())

    def acceptance(self) -> Float[np.ndarray, " batch"]:
        """Share of the drafted tokens that stood; NaN where none was drafted."""
        with np.errstate(invalid="ignore"):
            return np.where(self._ran(), self.accepted, 0).sum(axis=0) / np.where(self._ran(), self.drafted, 0).sum(
                axis=0
            )

    def distribution(self) -> Int[np.ndarray, " accepted"]:
        """Rounds of all rows in which so many drafted tokens stood: none, one, …"""
        return np.bincount(self.accepted[self._ran()])

    def near_tie_count(self) -> Int[np.ndarray, " batch"]:
        """Tokens of a greedy text that rounding may have decided (`acceptance.near_ties`)."""
        return np.where(self._ran(), self.near_ties, 0).sum(axis=0)

    def ideal_speedup(self, telemetry: Telemetry, weight_bytes: int) -> float:
        """Bytes of full decoding over bytes of what ran, for the whole batch: `weight_bytes` for every pass through the
        model, which the rows share, and the KV cache of every row. What it would be if bytes were all that counts."""
        passes = int(np.sum(1 + self.drafted.max(axis=1, initial=-1)))
        steps = telemetry.steps
        full = steps.max(initial=0) * weight_bytes + np.sum(telemetry.dense_kv_bytes_per_token() * steps)
        return float(full / (passes * weight_bytes + np.sum(telemetry.kv_bytes_per_token() * steps)))

    def _ran(self) -> Bool[np.ndarray, "rounds batch"]:
        return self.accepted >= 0


def _mean_where(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.where(where, values, 0).sum(axis=0) / where.sum(axis=0)
