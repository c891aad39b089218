"""`LlamaConfig`: the sizes and switches of a Llama-family model, read from and written to `config.json`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from recycled_jax.spelling import nearest

ModelType = Literal["llama", "mistral", "qwen2", "qwen3"]
MODEL_TYPES: tuple[str, ...] = get_args(ModelType)

# Fields of a `config.json` that change the mathematics, with the only values this library computes. A field
# that is absent has its neutral value in every supported family.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "use_sliding_window": (False, None),
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's stretch of the rotary frequencies (`rope_type: llama3`); lengths in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"rope_scaling factor={self.factor} must be at least 1")
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and switches of a Llama 2/3/3.1/3.2, Mistral, Qwen2 or Qwen3 decoder.

    `embed`, `mlp` and `vocab` are widths; `max_length` is the trained length in tokens. Which family it is
    decides about biases (`qwen2`: on q, k, v) and norms on q and k (`qwen3`). Raises ValueError, naming the
    field, for sizes that do not fit together.
    """

    vocab: int
    embed: int
    mlp: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    model_type: ModelType = "llama"
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Rope | None = None
    tie_embeddings: bool = False
    max_length: int = 2048
    init_std: float = 0.02
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab", "embed", "mlp", "layers", "query_heads", "kv_heads", "head_dim", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.model_type not in MODEL_TYPES:
            raise ValueError(_unknown("model_type", self.model_type, MODEL_TYPES))
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"query_heads={self.query_heads} must be a multiple of kv_heads={self.kv_heads}, "
                "so that every kv head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even, rotary embeddings turn pairs of channels")

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.query_heads // self.kv_heads

    @property
    def qkv_bias(self) -> bool:
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> "LlamaConfig":
        """The config in a Hugging Face `config.json`: its dict, its path, or the folder that holds it. In a folder, the
        end-of-sequence ids are those of `generation_config.json` where it names any.

        Reads rotary settings in the older form (`rope_theta`, `rope_scaling`) and the newer
        (`rope_parameters`). Raises ValueError for an unknown `model_type` and for any field that changes the
        mathematics in a way this library does not compute, FileNotFoundError when the path holds no config.
        """
        if isinstance(source, Mapping):
            hf = source
        else:
            hf = _read_folder(Path(source)) if Path(source).is_dir() else _read_json(Path(source))
        model_type = hf.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(_unknown("model_type", model_type, MODEL_TYPES))
        _refuse_unsupported(hf)
        theta, scaling = _rope_from_hf(hf)
        missing = [name for name in _REQUIRED if hf.get(name) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}, which every {model_type} model has")
        for name, kind in _TYPES.items():
            if hf.get(name) is not None and (not isinstance(hf[name], kind) or isinstance(hf[name], bool)):
                raise ValueError(f"config.json has {name}={hf[name]!r}, expected a number")
        query_heads = hf["num_attention_heads"]
        eos = hf.get("eos_token_id")
        return cls(
            vocab=hf["vocab_size"],
            embed=hf["hidden_size"],
            mlp=hf["intermediate_size"],
            layers=hf["num_hidden_layers"],
            query_heads=query_heads,
            kv_heads=hf.get("num_key_value_heads") or query_heads,
            head_dim=hf.get("head_dim") or _default_head_dim(hf),
            model_type=model_type,
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            max_length=hf.get("max_position_embeddings", 2048),
            init_std=hf.get("initializer_range", 0.02),
            bos_id=hf.get("bos_token_id"),
            eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            pad_id=hf.get("pad_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this model, with rotary settings in the form published checkpoints have."""
        eos = self.eos_ids[0] if len(self.eos_ids) == 1 else list(self.eos_ids) or None
        hf: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab,
            "hidden_size": self.embed,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "tie_word_embeddings": self.tie_embeddings,
            "max_position_embeddings": self.max_length,
            "initializer_range": self.init_std,
            "bos_token_id": self.bos_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_id,
        }
        if self.rope_scaling is not None:
            hf["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": self.rope_scaling.factor,
                "low_freq_factor": self.rope_scaling.low_freq_factor,
                "high_freq_factor": self.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": self.rope_scaling.original_length,
            }
        if self.model_type == "mistral":
            hf["sliding_window"] = None  # absent means 4096 to transformers
        return hf


_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

_TYPES = dict.fromkeys((*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"), int) | dict.fromkeys(
    ("rms_norm_eps", "initializer_range"), (int, float)
)


def _default_head_dim(hf: Mapping[str, Any]) -> int:
    # Qwen3's class default is 128 whatever the width; the other families divide the width among the heads.
    if hf["model_type"] == "qwen3":
        return 128
    return hf["hidden_size"] // hf["num_attention_heads"]


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    for name, supported in _NEUTRAL.items():
        if name in hf and hf[name] not in supported:
            raise ValueError(f"config.json has {name}={hf[name]!r}, only {supported[0]!r} is supported")
    # Qwen2 configs carry a window size that `use_sliding_window: false` switches off.
    # Absent from a Mistral config it is 4096.
    window = hf.get("sliding_window", 4096 if hf["model_type"] == "mistral" else None)
    if hf["model_type"] not in ("qwen2", "qwen3") and window is not None:
        raise ValueError(
            f"config.json has sliding_window={window}, only models without a sliding window "
            "(sliding_window: null) are supported"
        )
    windowed = [kind for kind in hf.get("layer_types") or [] if kind != "full_attention"]
    if windowed:
        raise ValueError(f"config.json has layer_types with {windowed[0]!r}, only 'full_attention' is supported")


def _rope_from_hf(hf: Mapping[str, Any]) -> tuple[float, Llama3Rope | None]:
    newer = hf.get("rope_parameters") or {}
    scaling = newer or hf.get("rope_scaling") or {}
    theta = newer.get("rope_theta", hf.get("rope_theta", 10_000.0))
    if not isinstance(theta, int | float):
        raise ValueError(f"config.json has rope_theta={theta!r}, expected a number")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"config.json has partial_rotary_factor={scaling['partial_rotary_factor']}, only 1.0 is supported"
        )
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ValueError(f"config.json has rope_type={kind!r}, supported are 'default' and 'llama3'")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if name not in scaling]
    if missing:
        raise ValueError(f"config.json has rope_type='llama3' without {', '.join(missing)}")
    return float(theta), Llama3Rope(*(scaling[name] for name in names))


def _unknown(argument: str, value: object, valid: tuple[str, ...]) -> str:
    return f"{argument}={value!r} is not supported, {nearest(str(value), valid)}"


def _read_folder(folder: Path) -> Mapping[str, Any]:
    hf = _read_json(folder / "config.json")
    # chat models end a turn with an id that only generation_config.json names
    if (folder / "generation_config.json").is_file():
        eos = _read_json(folder / "generation_config.json").get("eos_token_id")
        return hf if eos is None else {**hf, "eos_token_id": eos}
    return hf


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected the config.json of a Hugging Face model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of the JSON or of its encoding
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object with the config's fields")
    return content
