"""The 13 tasks of RULER (Hsieh et al. 2024, COLM) with its structure and parameters in our own wording and words: their
scores are no RULER scores."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from eval.tasks.biographies import Biographies
from eval.tasks.frequent_words import CodedWords, CommonWords
from eval.tasks.niah import Niah
from eval.tasks.task import Task
from eval.tasks.variable_tracking import VariableTracking

# Factories: their keyword arguments are the task's parameters, with the defaults of RULER's configuration.
RULER_STYLE: Mapping[str, Callable[..., Task]] = {
    "rs_niah_single_1": partial(Niah, kind="noise"),
    "rs_niah_single_2": partial(Niah, kind="essay"),
    "rs_niah_single_3": partial(Niah, kind="essay", value_kind="uuids"),
    "rs_niah_multikey_1": partial(Niah, kind="essay", keys=4),
    "rs_niah_multikey_2": partial(Niah, kind="needle"),
    "rs_niah_multikey_3": partial(Niah, kind="needle", key_kind="uuids", value_kind="uuids"),
    "rs_niah_multivalue": partial(Niah, kind="essay", values=4),
    "rs_niah_multiquery": partial(Niah, kind="essay", queries=4),
    "rs_vt": VariableTracking,
    "rs_cwe": CommonWords,
    "rs_fwe": CodedWords,
    "rs_qa_1": partial(Biographies, hops=1),
    "rs_qa_2": partial(Biographies, hops=2, near=8),
}

_FEW_DIGITS: Mapping[str, Any] = {"digits": 5, "key_kind": "nouns", "gen_tokens": 16}

# What `preset: small` changes, for lengths from 512 to 4096 and models of some ten million parameters.
SMALL: Mapping[str, dict[str, Any]] = {
    "rs_niah_single_1": {**_FEW_DIGITS},
    "rs_niah_single_2": {**_FEW_DIGITS},
    "rs_niah_single_3": {"key_kind": "nouns", "gen_tokens": 48},
    "rs_niah_multikey_1": {**_FEW_DIGITS, "keys": 2},
    "rs_niah_multikey_2": {"digits": 5, "gen_tokens": 16},
    "rs_niah_multikey_3": {"gen_tokens": 48},
    "rs_niah_multivalue": {**_FEW_DIGITS, "values": 2, "gen_tokens": 32},
    "rs_niah_multiquery": {**_FEW_DIGITS, "queries": 2, "gen_tokens": 32},
    "rs_vt": {"hops": 2, "example_tokens": 128},
    "rs_cwe": {"num_cw": 3, "freq_cw": 6, "freq_ucw": 1, "solved": False, "gen_tokens": 32},
    "rs_fwe": {"letters": 4, "gen_tokens": 32},
    "rs_qa_1": {"gen_tokens": 16},
    "rs_qa_2": {"near": 2, "gen_tokens": 16},
}
