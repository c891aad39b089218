"""What `recycled generate` reads: a text file with an optional question, or JSON Lines."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Fields of a JSONL prompt that make up its text; the others are carried to the result.
TEXT_FIELDS = ("prompt", "context", "question", "answer_prefix")


@dataclass(frozen=True)
class Prompt:
    """A text to continue. `where` names its origin in error messages, `extra` are fields that go to its result."""

    index: int
    where: str
    text: str
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """What tells this text from another one."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def ask(context: str, question: str, answer_prefix: str = "") -> str:
    """A document followed by a question on a line of its own, then the beginning of the answer:
    `{context}\\n{question} {answer_prefix}`, the form of `tasks.retrieval` that the embedded model knows.

    White space around the context's end and the question does not count; without a prefix the text ends with the
    question.
    """
    prompt = f"{context.rstrip()}\n{question.strip()}"
    return f"{prompt} {answer_prefix.lstrip()}" if answer_prefix else prompt


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises ValueError when it is not UTF-8, OSError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is invalid") from error


def read_prompt_file(path: Path, question: str | None, answer_prefix: str) -> Prompt:
    """The document in a text file, with a question asked about it when there is one."""
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path} is empty, expected the text to continue")
    return Prompt(0, str(path), text if question is None else ask(text, question, answer_prefix))


def read_jsonl(path: Path, reserved: Sequence[str]) -> list[Prompt]:
    """The prompts of a JSON Lines file: on each line an object with `prompt`, or with `context` and `question` (and
    `answer_prefix`, see `ask`). Blank lines are skipped; `index` counts the others from 0.

    Raises ValueError naming the line for anything else, for an empty prompt, and for a field in `reserved`.
    """
    prompts = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            prompts.append(_parse_line(f"{path} line {number}", line, len(prompts), reserved))
    if not prompts:
        raise ValueError(f"{path} holds no prompt, expected a JSON object with 'prompt' on every line")
    return prompts


def _parse_line(where: str, line: str, index: int, reserved: Sequence[str]) -> Prompt:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where} holds a {type(fields).__name__}, expected an object with 'prompt'")
    given = {name: fields.pop(name) for name in TEXT_FIELDS if name in fields}
    for name, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"{where} has {name}={value!r}, expected a string")
    if set(given) == {"prompt"}:
        text = given["prompt"]
    elif {"context", "question"} <= set(given) and "prompt" not in given:
        text = ask(**given)
    else:
        raise ValueError(
            f"{where} has {', '.join(given) or 'none'} of the fields {', '.join(TEXT_FIELDS)}, expected either "
            "'prompt' alone or 'context' with 'question' (and 'answer_prefix')"
        )
    if not text.strip():
        raise ValueError(f"{where} has an empty prompt, expected the text to continue")
    if taken := [name for name in fields if name in reserved]:
        raise ValueError(f"{where} has the field {taken[0]!r}, which the results use for their own; rename it")
    return Prompt(index, where, text, fields)
