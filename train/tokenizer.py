"""The embedded model's tokenizer: byte-level BPE whose numbers are tokens of one or two digits.

Three digits, as in Llama 3, would be shorter, but a model this small learns to copy a hundred tokens much sooner than
a thousand; single digits are easier still to copy, and easier to confuse with those of another number.
"""

import json
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from recycled_jax.tasks.retrieval import number_fact, path_facts
from recycled_jax.tasks.words import ADJECTIVES, KEYS, PEOPLE, PLACES, ROLES, THINGS, TIMES, VERBS

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
_TASK_WORDS = (*KEYS, *PEOPLE, *ROLES, *PLACES, *THINGS, *ADJECTIVES, *VERBS, *TIMES)
# A word with the character before it; digits two at a time; punctuation; line ends; white space.
_SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(sentences: Sequence[str], *, merges: int) -> PreTrainedTokenizerFast:
    """A tokenizer with `merges` learned merges, every number of up to two digits, and <s>, </s>, <pad>.

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
    """A token and a merge for every two-digit string."""
    pairs = [a + b for a in "0123456789" for b in "0123456789"]
    for pair in pairs:
        model["vocab"][pair] = len(model["vocab"])
        model["merges"].append([pair[0], pair[1]])
