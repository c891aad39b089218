"""`recycled plan`: what a model needs of a TPU slice, and what recycling could save there, without a TPU."""

import json
import sys
from pathlib import Path

import jax

from recycled_jax.config import LlamaConfig
from recycled_jax.flags import PolicyChoice
from recycled_jax.hf import find_checkpoint
from recycled_jax.mesh import mesh_sizes
from recycled_jax.planning.compiling import compile_programs
from recycled_jax.planning.plan import make_plan
from recycled_jax.planning.report import document, draw, table
from recycled_jax.planning.setting import Setting, default_mesh, resolve
from recycled_jax.planning.slices import find_slice
from recycled_jax.planning.tpu_compiler import compiler_version
from recycled_jax.presets import PRESETS
from recycled_jax.spelling import nearest
from recycled_jax.state import CacheDtype


def plan(
    *,
    model: str,
    topology: str,
    context: int = 131_072,
    batch: int = 8,
    policy: PolicyChoice = PolicyChoice(),  # noqa: B008 (frozen)
    mesh: dict[str, int] | None = None,
    cache_dtype: CacheDtype | None = None,
    sweep: tuple[int, ...] = (),
    out: Path | None = None,
) -> None:
    """Compiles prefill and decode steps of a model for a TPU slice, and tells their memory and the floors of a step.

    Needs libtpu, the TPU compiler, and no TPU; a minute or two for each plan. Memory per device is the compiler's own
    account of the compiled programs. Floors are bytes over bandwidth. Neither is a measurement. What does not fit ends
    with status 2 and the nearest change that does.

    Args:
        model: Folder of a checkpoint (only config.json is read), name of a model in the local Hugging Face cache, or a
            preset: llama-3.1-8b, llama-3.1-70b, llama-3.2-1b, llama-3.2-3b, qwen2-7b.
        topology: Slice by its Cloud TPU name, such as v5e-8, v5p-16 or v6e-8.
        context: Tokens of each row, prompt and answer together.
        batch: Rows decoded together.
        mesh: Devices along each axis, '{data: 1, tensor: 8}'; as many along tensor as kv heads are divisible by, the
            rest data or sequence, when not given.
        cache_dtype: Of the cache; int8 halves bfloat16's bytes.
        sweep: Contexts for a curve, '[8192, 32768, 131072]', from shapes and floors.
        out: Folder for plan.json and plan.png.
    """
    jax.config.update("jax_platforms", "cpu")  # where there is a TPU, it is not needed
    slice_ = find_slice(topology)
    config = find_config(model)
    for name, values in (("context", [context]), ("batch", [batch]), ("sweep", sweep)):
        if any(value < 1 for value in values):
            raise ValueError(f"{name}={min(values)} must be at least 1")
    sizes = default_mesh(config, slice_, batch=batch) if mesh is None else resolve(mesh_sizes(mesh), slice_)
    setting = Setting(config, topology, sizes, context, batch, policy.name, policy.knobs, cache_dtype)
    compiler = compiler_version()
    print(f"compiling for {topology} with libtpu {compiler} …", file=sys.stderr, flush=True)
    made = make_plan(setting, sorted(set(sweep)), compile_programs)
    print(table(made))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "plan.json").write_text(json.dumps(document(made, compiler), indent=1) + "\n", encoding="utf-8")
        draw(made, out / "plan.png")
    if not made.fits:
        raise ValueError(made.problem)


def find_config(model: str) -> LlamaConfig:
    """Of a preset, or of a checkpoint. Raises ValueError for a name that is neither."""
    if model in PRESETS:
        return PRESETS[model]
    if Path(model).is_dir():
        return LlamaConfig.from_hf(model)
    try:
        return LlamaConfig.from_hf(find_checkpoint(model))
    except FileNotFoundError as error:
        raise ValueError(f"{model=} is neither a checkpoint here nor a preset; {nearest(model, PRESETS)}") from error
