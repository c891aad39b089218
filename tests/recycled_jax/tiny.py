"""A tiny random model with a tokenizer of bytes, in a folder like that of any checkpoint."""

from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from recycled_jax.config import LlamaConfig
from recycled_jax.hf import save_hf
from recycled_jax.model import Llama

BOS, EOS = 256, 257
MAX_LENGTH = 2048


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so most characters outside ASCII are several; prompts begin with <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def save_tiny(folder: Path, **fields) -> Path:
    """Writes the model, with `fields` of its config replaced."""
    sizes = {"vocab": 258, "embed": 32, "mlp": 48, "layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 8}
    rest = {"tie_embeddings": True, "init_std": 0.3, "eos_ids": (EOS,), "max_length": MAX_LENGTH}
    model = Llama(LlamaConfig(**{**sizes, **rest, **fields}))
    params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    save_hf(folder, model, params, tokenizer=byte_tokenizer())
    return folder
