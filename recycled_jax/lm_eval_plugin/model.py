"""The model `recycled_jax` of lm-evaluation-harness: any policy under its tasks.

`recycled lm-eval --model recycled_jax --model_args policy=recycled,policy.k=256 --tasks …`, or
`lm_eval.simple_evaluate(model=RecycledJax(policy="recycled"), …)`. Import takes neither JAX nor a model along.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

# Importing from the package of the harness's own models registers them. Were ours there first and alone, the harness
# would believe that it had done so already, and know no other model.
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from recycled_jax.lm_eval_plugin.windows import Row, Settings, Stops, batches, fit_prompt, fit_row, stop_strings

_log = logging.getLogger(__name__)


@register_model("recycled_jax")
class RecycledJax(TemplateLM):
    """A checkpoint decoded under a policy. The arguments are those of `args.ModelArgs`.

    The answers to the requests of one call do not depend on their order. Prompts that do not fit lose tokens from the
    left, as the harness has it: `get_model_info` says how many did.
    """

    def __init__(self, **arguments: Any):
        """Raises ValueError for bad arguments and FileNotFoundError where there is no checkpoint, in one sentence."""
        super().__init__()
        # these take seconds to import
        from recycled_jax.commands.loading import Checkpoint
        from recycled_jax.lm_eval_plugin.args import ModelArgs
        from recycled_jax.lm_eval_plugin.engine import Engine
        from recycled_jax.policies import make_policy
        from recycled_jax.tokenizer import load_tokenizer

        args = ModelArgs.parse(arguments)
        policy = make_policy(args.policy.name, **args.policy.knobs)
        checkpoint = Checkpoint.find(args.pretrained)
        self.args, self.checkpoint = args, checkpoint
        self.max_length = checkpoint.config.max_length if args.max_length is None else args.max_length
        self.tokenizer: Any = load_tokenizer(checkpoint.folder)
        self.digest = args.digest(str(checkpoint.folder.resolve()), self.max_length)
        self._engine = Engine(*checkpoint.load(args.dtype), policy)
        self._counts: Counter[str] = Counter()

    @property
    def eot_token_id(self) -> int:
        ids = self.checkpoint.config.eos_ids if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        if not ids:
            raise ValueError(f"{self.checkpoint.folder} names no end-of-sequence token, which the harness needs")
        return ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS where the tokenizer has one."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, with the tokenizer's special ones unless they are unwanted or, left to us (None), the
        text begins with BOS already, as chat templates have it."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = bos is None or not string.startswith(bos)
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Raises ValueError for generation settings that are not implemented, before any work."""
        prompts, settings, stops = [], [], []
        lost = 0
        for context, asked in (request.args for request in requests):
            normal: dict[str, Any] = {
                **normalize_gen_kwargs({name: value for name, value in asked.items() if value is not None})
            }
            wanted = Settings.of(normal)
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            prompt, shortened = fit_prompt(tokens, max_gen_toks=wanted.max_gen_toks, max_length=self.max_length)
            lost += shortened
            prompts.append(prompt)
            settings.append(wanted)
            stops.append(self._stops(stop_strings(normal["until"])))
        self._count_truncated("generate_until", lost, len(requests))

        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="generating", disable=disable_tqdm) as progress:
            for batch in batches(settings, [len(prompt) for prompt in prompts], self.args.batch_size):
                texts, work = self._engine.generate(
                    [prompts[i] for i in batch],
                    [stops[i] for i in batch],
                    settings[batch[0]],
                    # repeats of a request must not draw alike, and a row draws by its place in the batch
                    seed=self.args.seed + batch[0],
                )
                self._counts.update(work._asdict())
                for i, text in zip(batch, texts, strict=True):
                    answers[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
                progress.update(len(batch))
        return answers

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, every token once; of the tokenizer's special ones only the prefix is conditioned on, and none
        is scored. Where `scoring` is not given, in dense passes."""
        owners, rows = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                owners.append(owner)
                rows.append(Row(*make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        scores = self._score(rows, by_decoding=self.args.scoring == "decode", disable_tqdm=disable_tqdm)
        for owner, (log_prob, _) in zip(owners, scores, strict=True):
            totals[owner] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        rows, lost = [], 0
        for _texts, context, continuation in requests:
            row, shortened = fit_row(context or [self.prefix_token_id], continuation, max_length=self.max_length)
            rows.append(row)
            lost += shortened
        self._count_truncated("loglikelihood", lost, len(requests))
        by_decoding = self.args.scoring != "prefill"
        of_one = sum(len(row.continuation) == 1 for row in rows)
        if by_decoding and of_one and not self._counts["one_token_continuations"]:
            _log.warning(
                "%d of %d continuations have one token, whose probability comes from reading the prompt: it says "
                "nothing about a policy of decoding",
                of_one,
                len(rows),
            )
        self._counts["one_token_continuations"] += of_one
        scores = self._score(rows, by_decoding=by_decoding, disable_tqdm=disable_tqdm)
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], score)
        return scores

    def _score(self, rows: Sequence[Row], *, by_decoding: bool, disable_tqdm: bool) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        # padding costs a step of decoding and little of a prompt: rows are alike in what is long about them
        lengths = [max(len(row.context), len(row.continuation)) for row in rows]
        with tqdm(total=len(rows), desc="scoring", disable=disable_tqdm) as progress:
            for batch in batches([None] * len(rows), lengths, self.args.batch_size):
                group = [rows[i] for i in batch]
                if by_decoding:
                    found, work = self._engine.score_by_decoding(group)
                    self._counts.update(work._asdict())
                else:
                    found = self._engine.score_by_prefill(group)
                for i, score in zip(batch, found, strict=True):
                    scores[i] = (score.log_prob, score.greedy)
                progress.update(len(batch))
        return scores

    def _stops(self, strings: tuple[str, ...]) -> Stops:
        # special tokens have no text in an answer, so those among the strings are looked for by their ids
        special = self.tokenizer.get_added_vocab()
        ids = {special[string] for string in strings if string in special}
        if self.tokenizer.eos_token is not None:
            strings = (*strings, self.tokenizer.eos_token)
        return Stops(strings, frozenset({*ids, *self.checkpoint.config.eos_ids}), self.checkpoint.text.decode)

    def _count_truncated(self, method: str, lost: int, requests: int) -> None:
        if lost:
            _log.warning(
                "%d of %d %s requests do not fit in max_length=%d and lose tokens from the left",
                lost,
                requests,
                method,
                self.max_length,
            )
        self._counts[f"truncated {method}"] += lost

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's results: what the answers were made with, and what happened so far. `effective_stride` is
        in decode steps per refresh of a layer, null when there was none; steps are summed over rows."""
        steps, refreshes = self._counts["steps"], self._counts["refreshes"]
        return {
            "model_dtype": self.args.dtype,
            "policy": self.args.all_knobs(),
            "scoring": {
                "loglikelihood": self.args.scoring or "decode",
                "loglikelihood_rolling": self.args.scoring or "prefill",
            },
            "max_length": self.max_length,
            "seed": self.args.seed,
            "digest": self.digest,
            "truncated": {name: self._counts[f"truncated {name}"] for name in ("generate_until", "loglikelihood")},
            "one_token_continuations": self._counts["one_token_continuations"],
            "decode_steps": steps,
            "effective_stride": steps * self.checkpoint.config.layers / refreshes if refreshes else None,
        }

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Raises ValueError for an answer cache that is not this model's and policy's own, as its name has to show: the
        harness looks answers up by the request alone. Processes that decode together must not have caches at all, as
        each would skip other requests."""
        import jax

        if cache_hook.dbdict is not None:
            path = str(cache_hook.dbdict.filename)
            if jax.process_count() > 1:
                raise ValueError(f"use_cache={path!r} cannot be used by {jax.process_count()} processes together")
            if self.digest not in path:
                raise ValueError(f"use_cache={path!r} must have {self.digest!r}, this model and policy, in its path")
        super().set_cache_hook(cache_hook)

    @property
    def tokenizer_name(self) -> str:
        return str(self.checkpoint.folder.resolve()).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as the checkpoint's template has it. Without `add_generation_prompt` the last message is one of the
        model's own, to be continued."""
        if self.tokenizer.chat_template is None:
            raise ValueError(f"apply_chat_template: {self.checkpoint.folder} has a tokenizer without a chat template")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
