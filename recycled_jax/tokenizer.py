"""The tokenizer of a checkpoint."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from recycled_jax.hf import find_checkpoint

_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")  # one of them a tokenizer has


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder `path`, or of the model of that name in the local Hugging Face cache.

    No code of the checkpoint is run and nothing is downloaded.
    Raises FileNotFoundError when there is no such folder, ValueError when it holds no tokenizer.
    """
    folder = find_checkpoint(path)
    if not any((folder / name).is_file() for name in _FILES):
        raise ValueError(f"{folder} has no tokenizer; copy the tokenizer.json of its model there")
    # tokenizer.json says all there is to say; AutoTokenizer would choose a class by the model_type of config.json, and
    # that of qwen2 puts its own splitting of words and numbers in the place of the file's
    if (folder / "tokenizer.json").is_file():
        load = PreTrainedTokenizerFast.from_pretrained
    else:
        load = AutoTokenizer.from_pretrained
    try:
        return load(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the tokenizer's backend raises; the user needs one sentence
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{folder} has no tokenizer that transformers can load (tokenizer.json): {reason}") from error
