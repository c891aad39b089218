"""Writes `golden/*.npy`, the logits of transformers, for the parity tests that run without torch.

    python -m tests.recycled_jax.parity.make_golden

Needs the extra `parity`. Run it again only when a family is added: the files are what we are compared with.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.recycled_jax.parity import families


def torch_model(name: str) -> PreTrainedModel:
    """The float32 model of transformers with the weights of family `name`."""
    fields = dict(families.CONFIGS[name])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    weights = {tensor: torch.from_numpy(array) for tensor, array in families.tensors(name).items()}
    missing, unknown = model.load_state_dict(weights, strict=False)
    # a tied head is listed as missing, and is the embedding
    if unknown or [tensor for tensor in missing if tensor != "lm_head.weight"]:
        raise ValueError(f"{name}: transformers wants {missing}, does not know {unknown}")
    return model


def torch_logits(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


def main() -> None:
    for name in families.CONFIGS:
        logits = torch_logits(torch_model(name), families.tokens(name))
        np.save(Path(__file__).parent / "golden" / f"{name}.npy", logits)
        print(f"{name}: logits {logits.shape}, standard deviation {logits.std():.2f}")


if __name__ == "__main__":
    main()
