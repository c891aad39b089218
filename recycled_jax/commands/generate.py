"""`recycled generate`: continues one prompt on the terminal, or many from a JSONL file into another."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from recycled_jax.commands.loading import Checkpoint
from recycled_jax.commands.prompts import Prompt, read_jsonl, read_prompt_file
from recycled_jax.commands.results import FIELDS, Results
from recycled_jax.commands.streaming import Streamer
from recycled_jax.config import LlamaConfig
from recycled_jax.decode import Params
from recycled_jax.drafting import DraftLength, check_draft_length, check_drafter
from recycled_jax.flags import PolicyChoice, PrefillChoice
from recycled_jax.generate import Generation
from recycled_jax.generate import generate as decode_prompts
from recycled_jax.mesh import check_decoding, make_mesh, mesh_sizes, rows_together
from recycled_jax.model import Llama
from recycled_jax.policies import make_policy
from recycled_jax.prefill.registry import make_prefill
from recycled_jax.sampling import Sampling
from recycled_jax.state import CacheDtype

Load = Callable[[], tuple[Llama, Params]]
STREAM_BLOCK = 8  # decode steps between two looks at a row that is printed as it grows


def generate(
    *,
    model: str | None = None,
    prompt_file: Path | None = None,
    question: str | None = None,
    answer_prefix: str = "",
    prompts: Path | None = None,
    out: Path | None = None,
    policy: PolicyChoice = PolicyChoice(),  # noqa: B008 (frozen)
    prefill: PrefillChoice = PrefillChoice(),  # noqa: B008
    lossless: bool = False,
    draft: DraftLength = 8,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch: int = 8,
    capacity: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    cache_dtype: CacheDtype | None = None,
    mesh: dict[str, int] | None = None,
) -> None:
    """Continues one prompt on the terminal, or many from a JSONL file into another.

    With --prompt-file the text appears as it is generated, then a line of figures on standard error. Every line of
    --out, one with --prompt-file and one for each of --prompts, is an object with index, text, tokens (how many),
    log_prob_sum, log_prob_mean, stop (eos or limit), policy, effective_stride (decode steps per refresh, mean over
    layers; null when there was none), kv_bytes_per_token, prompt_sha256 and all further fields of the prompt. An
    interrupted run is taken up by the same command.

    Args:
        model: Folder of a checkpoint, or name of a model in the local Hugging Face cache; the embedded model when not
            given.
        prompt_file: UTF-8 text to continue.
        question: Asked about the text of --prompt-file, on a line of its own after it.
        answer_prefix: How the answer to the question begins. For the embedded model, --question "What is the magic
            number for apple?" --answer-prefix "The magic number for apple is ".
        prompts: JSON Lines, on each line an object with prompt, or with context and question (and answer_prefix).
        out: JSON Lines file for the results.
        lossless: The policy only drafts tokens, which passes with full attention verify: the text is the full model's.
        draft: With --lossless, most tokens between two such passes, or auto, which adapts to how many stand.
        max_new_tokens: Most tokens to generate for a prompt.
        temperature: 0 is greedy.
        top_k: Sample from this many likeliest tokens.
        top_p: Sample from the fewest tokens whose probability reaches this.
        seed: Of the sampling. The batch whose first prompt has index i draws with seed + i.
        batch: Prompts decoded together.
        capacity: Cache slots per prompt, for the prompt and its continuation; as many as needed, up to the model's
            length, when not given.
        dtype: Of weights, cache and computation.
        cache_dtype: Of the cache alone; int8 halves bfloat16's bytes.
        mesh: Devices that the model lies on, '{data: 2, tensor: 4}': data divides prompts, tensor heads, sequence the
            cache of a prompt; one device when not given.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed={seed} must be between 0 and 2**31 - 1")
    check_draft_length(draft)
    sampling = Sampling(temperature, top_k, top_p)
    chosen = make_policy(policy.name, **policy.knobs)
    if prefill.name != "policy":
        chosen = replace(chosen, prefill=make_prefill(prefill.name, **prefill.knobs))
    if lossless:
        check_drafter(chosen, chosen.prefill)
    items = _read_prompts(prompt_file, question, answer_prefix, prompts, out)
    checkpoint = Checkpoint.find(model)
    load = partial(checkpoint.load, dtype, None if mesh is None else _find_mesh(mesh, checkpoint.config))
    rows = _encode(checkpoint, items, max_new_tokens, capacity)
    settings = {"policy": chosen, "max_new_tokens": max_new_tokens, "sampling": sampling, "cache_dtype": cache_dtype}
    settings |= {"lossless": lossless, "draft": draft}
    if out is None:
        _stream(checkpoint, load, rows[0], {**settings, "seed": seed, "capacity": capacity})
        return
    # one capacity for all batches, so that one compiled program serves them all
    settings["capacity"] = capacity or max(map(len, rows)) + max_new_tokens
    written = {
        "model": "embedded" if model is None else str(checkpoint.folder.resolve()),
        "dtype": dtype,
        # only where given, so that runs of before can be taken up
        **({} if cache_dtype is None else {"cache_dtype": cache_dtype}),
        **({"lossless": lossless, "draft": draft} if lossless else {}),
        "policy": {"name": policy.name, **policy.knobs},
        "prefill": {"name": prefill.name, **prefill.knobs},
        "max_new_tokens": max_new_tokens,
        "sampling": asdict(sampling),
        "seed": seed,
        "batch": batch,
    }
    with Results(out, written, items) as results:
        if prompt_file is not None:
            if not results.finished:
                done = _stream(checkpoint, load, rows[0], {**settings, "seed": seed})
                results.append([_result(items[0], 0, done, checkpoint, written["policy"])])
            print(f"{len(results.finished)} result in {out}", file=sys.stderr)
            return
        groups = [list(zip(items, rows, strict=True))[first : first + batch] for first in range(0, len(items), batch)]
        unfinished = [group for group in groups if any(item.index not in results.finished for item, _ in group)]
        if unfinished:
            _decode_all(checkpoint, load, unfinished, seed, settings, written["policy"], results)
    print(f"{len(results.finished)} results in {out}", file=sys.stderr)


def _read_prompts(
    prompt_file: Path | None, question: str | None, answer_prefix: str, prompts: Path | None, out: Path | None
) -> list[Prompt]:
    """The prompts of whichever file is given; raises ValueError for arguments that do not go together."""
    if answer_prefix and question is None:
        raise ValueError(f"answer_prefix={answer_prefix!r} needs question")
    if prompt_file is not None and prompts is None:
        return [read_prompt_file(prompt_file, question, answer_prefix)]
    if prompts is not None and prompt_file is None:
        if out is None:
            raise ValueError(f"prompts={str(prompts)!r} needs out, a JSONL file for the results")
        if question is not None:
            raise ValueError(f"question={question!r} is for prompt_file, in prompts it is a field of every line")
        return read_jsonl(prompts, FIELDS)
    raise ValueError("expected either prompt_file or prompts, got " + ("neither" if prompts is None else "both"))


def _encode(
    checkpoint: Checkpoint, items: Sequence[Prompt], max_new_tokens: int, capacity: int | None
) -> list[list[int]]:
    """The tokens of every prompt; raises ValueError for one that does not fit, before any work is done."""
    if capacity is None:
        room = checkpoint.config.max_length
        limit = f"the model's length is {room}; shorten the text, or give a capacity to go beyond"
    else:
        room, limit = capacity, f"capacity is {capacity}"
    rows = []
    for item in items:
        tokens = checkpoint.text.encode(item.text)
        if not tokens:
            raise ValueError(f"{item.where} has a prompt without tokens, expected text to continue")
        if max(tokens) >= checkpoint.config.vocab:
            raise ValueError(
                f"{item.where} has token id {max(tokens)}, the model's vocabulary has {checkpoint.config.vocab}: the "
                f"tokenizer in {checkpoint.folder} is not that of the model"
            )
        if len(tokens) + max_new_tokens > room:
            raise ValueError(
                f"{item.where} has a prompt of {len(tokens)} tokens, with max_new_tokens={max_new_tokens} it needs "
                f"{len(tokens) + max_new_tokens} cache slots, {limit}"
            )
        rows.append(tokens)
    return rows


def _find_mesh(sizes: dict[str, int], config: LlamaConfig) -> Mesh:
    """Of all devices. Raises ValueError for sizes that devices or model do not have."""
    mesh = make_mesh(mesh_sizes(sizes))
    check_decoding(config, mesh, batch=rows_together(mesh))
    return mesh


def _stream(checkpoint: Checkpoint, load: Load, row: list[int], settings: dict) -> Generation:
    model, params = load()
    print(f"reading {len(row)} tokens with policy {settings['policy'].name} …", file=sys.stderr, flush=True)
    streamer = Streamer(checkpoint.text.decode, partial(print, end="", flush=True))
    try:
        done = decode_prompts(model, params, [row], block=STREAM_BLOCK, on_block=streamer, **settings)
    finally:  # after Ctrl-C the text so far stands complete
        streamer.finish()
    print(_figures(done, streamer.tokens_per_second), file=sys.stderr)
    return done


def _figures(done: Generation, tokens_per_second: float | None) -> str:
    tokens, telemetry = len(done.tokens[0]), done.telemetry
    if tokens_per_second is None:
        speed = f"{done.decode_seconds:.2f} s of decoding, compilation included"
    else:
        speed = f"{tokens_per_second:.1f} tokens/s after the first {STREAM_BLOCK + 1}"
    stride = _effective_stride(done, 0)
    read, dense = telemetry.kv_bytes_per_token()[0], telemetry.dense_kv_bytes_per_token()[0]
    drafts = ""
    if done.rounds is not None:
        drafts = (
            f"; full passes: {done.rounds.counts()[0]}, drafted tokens that stood in each: "
            f"{done.rounds.mean_accepted()[0]:.1f}, near-ties: {done.rounds.near_tie_count()[0]}"
        )
    return (
        f"{tokens} tokens ({done.stop[0]}); prompt of {telemetry.prompt_lengths[0]} tokens read in "
        f"{done.prefill_seconds:.1f} s; {speed}; effective stride {'none' if stride is None else f'{stride:.1f}'}; "
        f"KV read per token {read / 1e6:.3f} MB, dense {dense / 1e6:.3f} MB{drafts}"
    )


def _decode_all(
    checkpoint: Checkpoint,
    load: Load,
    groups: Sequence[Sequence[tuple[Prompt, list[int]]]],
    seed: int,
    settings: dict,
    policy: dict,
    results: Results,
) -> None:
    """Decodes the prompts of every group together and adds the results that are missing. A group that was finished in
    part is decoded as a whole, so a resumed run gives what an uninterrupted one gives."""
    model, params = load()
    sharing = 1 if model.mesh is None else rows_together(model.mesh)
    total = len(results.finished) + sum(item.index not in results.finished for group in groups for item, _ in group)
    try:
        with tqdm(total=total, initial=len(results.finished), desc="generating", unit="prompt") as progress:
            for group in groups:
                first = group[0][0].index
                rows = [row for _, row in group]
                rows += rows[-1:] * (-len(rows) % sharing)  # as many as devices can share; nobody reads the last ones
                done = decode_prompts(model, params, rows, seed=seed + first, **settings)
                found = [_result(item, row, done, checkpoint, policy) for row, (item, _) in enumerate(group)]
                missing = [result for result in found if result["index"] not in results.finished]
                results.append(missing)
                progress.update(len(missing))
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"interrupted; {len(results.finished)} of {total} results are in {results.path}, the same command goes on "
            "from there"
        ) from interrupt


def _result(item: Prompt, row: int, done: Generation, checkpoint: Checkpoint, policy: dict) -> dict[str, Any]:
    log_probs = done.log_probs[row]
    return {
        "index": item.index,
        **item.extra,
        "text": checkpoint.text.decode(done.tokens[row]),
        "tokens": len(log_probs),
        "log_prob_sum": _finite(math.fsum(log_probs)),
        "log_prob_mean": _finite(math.fsum(log_probs) / len(log_probs)),
        "stop": done.stop[row],
        "policy": policy,
        "effective_stride": _effective_stride(done, row),
        "kv_bytes_per_token": float(done.telemetry.kv_bytes_per_token()[row]),
        "prompt_sha256": item.digest,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def _effective_stride(done: Generation, row: int) -> float | None:
    """Decode steps per refresh over all layers of a row; None when it never refreshed."""
    refreshes = done.telemetry.refreshes()[:, row]
    return float(done.telemetry.steps[row] * len(refreshes) / refreshes.sum()) if np.any(refreshes) else None
