"""The embedded model's tokenizer: byte-level BPE whose numbers are tokens of one to three digits, as in Llama 3."""

import json
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from recycled_jax.tasks.retrieval import number_fact, path_facts
from recycled_jax.tasks.words import ADJECTIVES, KEYS, PEOPLE, PLACES, ROLES, THINGS, TIMES, VERBS

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
_TASK_WORDS = (*KEYS, *PEOPLE, *ROLES, *PLACES, *THINGS, *ADJECTIVES, *VERBS, *TIMES)
# A word with the character before it; digits three at a time; punctuation; line ends; white space.
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(sentences: Sequence[str], *, merges: int) -> PreTrainedTokenizerFast:
    """A tokenizer with `merges` learned merges, every number of up to three digits, and <s>, </s>, <pad>.

    The words of the generated tasks are weighted up so that each is one token: a key that is one token needs one
    match in attention, not several.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(_training_text(sentences), trainer)
    state = json.loads(core.to_str())
    _add_numbers(state["model"])
    core = Tokenizer.from_str(json.dumps(state))
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([BOS, EOS, PAD])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def _training_text(sentences: Sequence[str]) -> Iterable[str]:
    # without digits: a learned merge across digits would outrank, and so break, the numbers added afterwards
    for sentence in sentences:
        yield "".join(character for character in sentence if not character.isdigit())
    hops, chain = path_facts(("a", "b", "c"))
    template = [*hops, chain.exchange, number_fact("a", "").exchange]
    for text in (*(f" {word}" for word in _TASK_WORDS), *template):
        yield text * 20_000


def _add_numbers(model: dict) -> None:
    """Tokens for every two- and three-digit string, and merges that reach them whichever pair is merged first."""
    digits = "0123456789"
    pairs = [a + b for a in digits for b in digits]
    triples = [pair + c for pair in pairs for c in digits]
    for number in (*pairs, *triples):
        model["vocab"][number] = len(model["vocab"])
    model["merges"] += [[pair[0], pair[1]] for pair in pairs]
    model["merges"] += [[t[:2], t[2]] for t in triples] + [[t[0], t[1:]] for t in triples]
