"""The tasks beyond RULER's by the names a user types. Their wording is ours: scores compare among themselves only."""

from collections.abc import Callable, Mapping
from typing import Any

from eval.tasks.chain_of_key import ChainOfKey
from eval.tasks.html_tsv import HtmlTsv
from eval.tasks.multiturn import MultiTurn
from eval.tasks.needle import Needle
from eval.tasks.passkey import Passkey
from eval.tasks.task import Task

FURTHER: Mapping[str, Callable[..., Task]] = {
    "rs_passkey": Passkey,
    "rs_needle": Needle,
    "rs_chain_of_key": ChainOfKey,
    "rs_html_tsv": HtmlTsv,
    "rs_multiturn": MultiTurn,
}

# Parameters for small models, such as the embedded one, at 512 to 4096 tokens.
SMALL: Mapping[str, dict[str, Any]] = {
    "rs_passkey": {"digits": 5},
    "rs_needle": {"digits": 5},
    "rs_chain_of_key": {"chain": 4, "start": "given"},
    "rs_html_tsv": {"columns": 2, "out_level": 64, "tables": 2},
    "rs_multiturn": {"digits": 5, "key_words": 1},
}
