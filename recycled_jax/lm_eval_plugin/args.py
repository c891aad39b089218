"""What `--model_args` of lm-evaluation-harness says to our model, checked before anything is loaded."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from recycled_jax.flags import PolicyChoice, describe_type
from recycled_jax.named import knobs_of
from recycled_jax.policies import POLICIES
from recycled_jax.spelling import nearest

AUTOMATIC_BATCH = 8  # what `--batch_size auto` is here: nothing is tried out
# The harness passes these on from its own flags. There is one kind of device, and code of checkpoints is never run.
_IGNORED = ("device", "trust_remote_code")


@dataclass(frozen=True)
class ModelArgs:
    """The arguments of `recycled_jax` models.

    `pretrained` is a folder or the name of a model in the local Hugging Face cache (None: the embedded model);
    `max_length`, in tokens of prompt and answer, is the trained length when None; `scoring` None stands for `decode`
    in `loglikelihood` and `prefill` in `loglikelihood_rolling`; `seed` is that of sampled answers.
    """

    policy: PolicyChoice
    pretrained: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_length: int | None = None
    batch_size: int = 1
    scoring: Literal["decode", "prefill"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} must be between 0 and 2**31 - 1")

    @classmethod
    def parse(cls, arguments: Mapping[str, Any]) -> "ModelArgs":
        """From the harness's keyword arguments, where `policy` is a name, with knobs `policy.k`, or a mapping of name
        and knobs. None is the default.

        Raises ValueError for an argument, policy or knob that does not exist, naming the nearest that does, and for a
        value of the wrong type.
        """
        given = {name: value for name, value in arguments.items() if value is not None and name not in _IGNORED}
        most = given.pop("max_batch_size", None)
        if "batch_size" in given:
            given["batch_size"] = _batch_size(given["batch_size"], most)
        policy = _policy(given)
        hints = {name: hint for name, hint in get_type_hints(cls).items() if name != "policy"}
        for name in given:
            if name not in hints:
                names = [*hints, "policy", "policy.KNOB"]
                raise ValueError(f"model argument {name}={given[name]!r} is unknown; {nearest(name, names)}")
        return cls(policy, **{name: _typed(name, value, hints[name]) for name, value in given.items()})

    def all_knobs(self) -> dict[str, Any]:
        """The policy with all its knobs, those at their defaults too."""
        defaults = {knob: default for knob, (_, default) in knobs_of("policy", POLICIES, self.policy.name).items()}
        return {"name": self.policy.name, **defaults, **self.policy.knobs}

    def digest(self, folder: str, max_length: int) -> str:
        """12 hexadecimal digits that stand for all that decides about the answers to given requests."""
        deciding = {
            "folder": folder,
            "max_length": max_length,
            "policy": self.all_knobs(),
            "dtype": self.dtype,
            "scoring": self.scoring,
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:12]


def _policy(given: dict[str, Any]) -> PolicyChoice:
    """Takes what is about the policy out of the arguments."""
    asked = given.pop("policy", {})
    knobs = dict(asked) if isinstance(asked, Mapping) else {"name": asked}
    knobs |= {name.removeprefix("policy."): given.pop(name) for name in list(given) if name.startswith("policy.")}
    name = knobs.pop("name", PolicyChoice().name)
    valid = knobs_of("policy", POLICIES, name)
    for knob in knobs:
        if knob not in valid:
            raise ValueError(f"policy.{knob} is not a knob of {name!r}; {nearest(knob, valid)}")
    return PolicyChoice(name, {knob: _typed(f"policy.{knob}", value, valid[knob][0]) for knob, value in knobs.items()})


def _batch_size(value: int | str, most: int | None) -> int | str:
    """The harness passes a number as a number or a string, or `auto`, or `auto:2`."""
    if str(value).partition(":")[0] == "auto":
        return AUTOMATIC_BATCH if most is None else min(AUTOMATIC_BATCH, most)
    return int(value) if str(value).isdecimal() else value


def _typed(name: str, value: Any, hint: Any) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        return parser.parse_object({"value": value})["value"]
    except ArgumentError as error:
        raise ValueError(f"{name} is {value!r}, expected {describe_type(hint)}") from error
