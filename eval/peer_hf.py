"""Hugging Face transformers beside us: its model with the same weights, on the same machine, in the same run.

Every attention (sdpa, eager) goes with every cache (DynamicCache, StaticCache), and the fastest counts: greedy steps of
one token from a prompt that has been read. Before anything is timed, its logits have to be ours. PyTorch is in the
extra `parity`.
"""

import functools
import importlib.util
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval.timing import Clock, Measured, Workload
from recycled_jax.checkpoint import load_model
from recycled_jax.orbax_io import is_orbax

ATTENTIONS = ("sdpa", "eager")
CACHES = ("DynamicCache", "StaticCache")
TOLERANCE = 1e-3  # between logits in float32, in units of the largest of them, or of 1
SLOWER = 2  # times the fastest setting so far: a first run that slow is not repeated
_DEVICES = {"cpu": "cpu", "gpu": "cuda"}


@dataclass(frozen=True)
class Peer:
    """transformers' model of a checkpoint, ready to be timed; `device` is PyTorch's name of it."""

    model: Any
    device: str


def load(folder: Path, dtype: str) -> Peer:
    """The model in a folder of Hugging Face's format, computing in `dtype` where JAX computes.

    Raises ValueError without PyTorch, for an orbax checkpoint, where PyTorch has no such device, and when its logits
    for a short prompt are not ours.
    """
    if importlib.util.find_spec("torch") is None:
        raise ValueError("peer='hf' needs PyTorch, which is not installed; install the extra `parity`")
    if is_orbax(folder):
        raise ValueError(f"peer='hf' needs a Hugging Face checkpoint, and {folder} is orbax's; convert it first")
    import torch  # pyright: ignore[reportMissingImports]

    backend = jax.default_backend()
    device = _DEVICES.get(backend)
    if device is None or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"peer='hf' runs where PyTorch does, on CPU or GPU, and PyTorch has no {backend} here")
    check_logits(folder, device)
    return Peer(_model(folder, dtype, device), device)


def check_logits(folder: Path, device: str) -> None:
    """Raises ValueError unless both give the same logits for 16 tokens, in float32."""
    import torch  # pyright: ignore[reportMissingImports]

    network, params = load_model(folder, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, network.config.vocab, (1, 16))
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(network.apply(params, jnp.asarray(tokens, jnp.int32)))
    del params
    with torch.inference_mode():
        theirs = _model(folder, "float32", device)(input_ids=torch.tensor(tokens, device=device)).logits.cpu().numpy()
    apart = float(np.abs(ours - theirs).max()) / max(1.0, float(np.abs(ours).max()))
    if not apart <= TOLERANCE:
        raise ValueError(
            f"peer='hf' computes other logits than ours from {folder}: they are {apart:.2g} of the largest apart, "
            f"expected at most {TOLERANCE:g}"
        )


def measure(peer: Peer, workload: Workload, clock: Clock = time.perf_counter) -> Measured:
    """Times prefill (sdpa, whole prompts at once) and decoding in every setting; the fastest median is the peer's.

    `details`: under `peer` the versions, the fastest setting, and the median ms per step of each.
    """
    import torch  # pyright: ignore[reportMissingImports]

    runs, peak = workload.runs, None
    tokens = torch.tensor(np.asarray(workload.tokens)[:, : int(workload.lengths.max())].astype(np.int64))
    tokens = tokens.to(peer.device)
    with torch.inference_mode():
        peer.model.set_attn_implementation("sdpa")
        prefill_ms, prompt = [], None
        for _ in range(runs.prefill_warmups + runs.prefill_repeats if runs.prefill_repeats else 0):
            prompt = None
            started = _now(peer, clock)
            prompt = _prefill(peer, tokens)
            prefill_ms.append(1e3 * (_now(peer, clock) - started))
        prompt = _made_up(peer, workload) if prompt is None else prompt
        times: dict[str, tuple[float, ...]] = {}
        for attention in ATTENTIONS:
            peer.model.set_attn_implementation(attention)
            for cache in CACHES:
                fastest = min(map(np.median, times.values()), default=np.inf)
                times[f"{attention}, {cache}"] = _time_steps(peer, workload, prompt, cache, clock, SLOWER * fastest)
        if peer.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
    medians = {setting: float(np.median(milliseconds)) for setting, milliseconds in times.items()}
    fastest = min(medians, key=medians.__getitem__)
    told = {"versions": {name: version(name) for name in ("torch", "transformers")}, "threads": torch.get_num_threads()}
    details = {"peer": {"name": "hf", **told, "fastest": fastest, "decode_ms_per_step": medians}}
    return Measured(tuple(prefill_ms[runs.prefill_warmups :]), times[fastest], peak_memory_bytes=peak, details=details)


@dataclass(frozen=True)
class _Prompt:
    """What was read: keys and values of each layer, and the first token, `[batch, 1]`."""

    layers: list[tuple[Any, Any]]
    token: Any


def _prefill(peer: Peer, tokens: Any) -> _Prompt:
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=peer.model.config)
    done = peer.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return _Prompt([(layer.keys, layer.values) for layer in cache.layers], done.logits[:, -1:].argmax(-1))


def _made_up(peer: Peer, workload: Workload) -> _Prompt:
    """Keys and values of random numbers, as ours are then."""
    import torch  # pyright: ignore[reportMissingImports]

    config = workload.model.config
    shape = (workload.batch, config.kv_heads, int(workload.lengths.max()), config.head_dim)
    kind = {"device": peer.device, "dtype": peer.model.dtype}
    layers = [(torch.randn(shape, **kind), torch.randn(shape, **kind)) for _ in range(config.layers)]
    return _Prompt(layers, torch.zeros((workload.batch, 1), dtype=torch.int64, device=peer.device))


def _time_steps(
    peer: Peer, workload: Workload, prompt: _Prompt, cache: str, clock: Clock, limit: float
) -> tuple[float, ...]:
    """Milliseconds per step of each timed run, every one from the prompt anew; of one run, if that is above `limit`."""
    runs, milliseconds = workload.runs, []
    for _ in range(runs.warmups + runs.repeats):
        if milliseconds and milliseconds[0] > limit:
            return tuple(milliseconds[:1])
        held = _filled(peer, prompt, cache, int(workload.lengths.max()) + runs.decode_steps)
        token = prompt.token
        started = _now(peer, clock)
        for _ in range(runs.decode_steps):
            done = peer.model(input_ids=token, past_key_values=held, use_cache=True)
            token = done.logits[:, -1:].argmax(-1)
        milliseconds.append(1e3 * (_now(peer, clock) - started) / runs.decode_steps)
    return tuple(milliseconds[runs.warmups :])


def _filled(peer: Peer, prompt: _Prompt, cache: str, capacity: int) -> Any:
    """A cache with a copy of the prompt's keys and values."""
    from transformers import DynamicCache, StaticCache

    config = peer.model.config
    held = DynamicCache(config=config) if cache == "DynamicCache" else StaticCache(config, max_cache_len=capacity)
    for index, (k, v) in enumerate(prompt.layers):
        held.update(k, v, index)
    return held


def _now(peer: Peer, clock: Clock) -> float:
    if peer.device == "cuda":
        import torch  # pyright: ignore[reportMissingImports]

        torch.cuda.synchronize()
    return clock()


@functools.cache
def _silence() -> None:
    """transformers draws a bar for every file that it reads."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _model(folder: Path, dtype: str, device: str) -> Any:
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    _silence()
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    return loaded.to(device).eval()
