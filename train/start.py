"""What a run starts from: tokenizer, model and first parameters, of its own or of a checkpoint."""

import json
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from optax import GradientTransformation
from transformers import PreTrainedTokenizerBase

from recycled_jax.checkpoint import load_model
from recycled_jax.config import LlamaConfig
from recycled_jax.hf import find_checkpoint
from recycled_jax.model import Llama
from recycled_jax.tasks.prose import generated_sentences
from recycled_jax.tokenizer import load_tokenizer
from train.config import TrainConfig
from train.step import TrainState, init_state, start_state
from train.tokenizer import BOS, EOS, PAD, train_tokenizer


def write_tokenizer(path: Path, sentences: list[str], config: TrainConfig) -> None:
    """The tokenizer of a run that begins: the checkpoint's, or one trained on its text."""
    if config.model.start is None:
        prose = generated_sentences(np.random.default_rng(config.seed), 5000)
        train_tokenizer([*sentences, *prose], merges=config.data.tokenizer_merges).save_pretrained(path)
        return
    tokenizer = load_tokenizer(config.model.start)
    needed = (BOS, EOS, PAD) if config.corpus is None else ()
    missing = [token for token in needed if token not in tokenizer.get_vocab()]
    if missing:
        raise ValueError(f"model.start={config.model.start!r} has a tokenizer without {missing[0]}, as the data need")
    tokenizer.save_pretrained(path)


def write_model_config(path: Path, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """The model of a run that begins, in Hugging Face's form: a resumed run does not need the checkpoint it started
    from. From scratch: tied embeddings, the vocabulary rounded up to a multiple of 128."""
    sizes = config.model
    if sizes.start is not None:
        model = LlamaConfig.from_hf(find_checkpoint(sizes.start))
    else:
        ids = tokenizer.get_vocab()
        model = LlamaConfig(
            model_type=sizes.model_type,
            vocab=-(-len(tokenizer) // 128) * 128,
            embed=sizes.embed,
            mlp=sizes.mlp,
            layers=sizes.layers,
            query_heads=sizes.query_heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            rope_theta=sizes.rope_theta,
            max_length=sizes.max_length,
            tie_embeddings=True,
            bos_id=ids[BOS],
            eos_ids=(ids[EOS],),
            pad_id=ids[PAD],
        )
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(model.to_hf(), indent=2) + "\n", encoding="utf-8")


def first_state(model: Llama, optimizer: GradientTransformation, mesh: Mesh, config: TrainConfig) -> TrainState:
    """Of a run that begins; parameters of a checkpoint are read straight into their shards."""
    if config.model.start is None:
        return init_state(model, optimizer, mesh, config.seed, config.model.init)
    _, params = load_model(config.model.start, mesh=mesh)
    return start_state(model, optimizer, mesh, params)
