"""lm-evaluation-harness over an artifact: its `LM` interface.

Tokens, windows and truncation are those of the harness's own `hf` model, so that figures compare with published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
from tqdm import tqdm

from gemma3n_onnx.runtime.errors import Gemma3nError, OptionError
from gemma3n_onnx.runtime.media.reader import MediaOptions
from gemma3n_onnx.runtime.model import OnnxGemma3n
from gemma3n_onnx.runtime.prompt.encoder import TemplateOptions
from gemma3n_onnx.runtime.tokens import PromptTokens

_NEW_TOKENS = 256
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

Pair = tuple[tuple[str, str], list[int], list[int]]


class HarnessModel(TemplateLM):
    """`max_length`: tokens of context and continuation together, truncated on the left."""

    def __init__(self, model: OnnxGemma3n, max_length: int, *, quiet: bool = False) -> None:
        super().__init__()
        self._model, self.max_length, self._quiet = model, max_length, quiet

    @property
    def eot_token_id(self) -> int:
        return self._model.manifest.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        return self._model.manifest.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self._model.folder)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._model.tokenizer.encode(string, add_bos=add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return None if self._model.template is None or not chat_template else self._model.template.source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options = TemplateOptions(
            add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )
        return self._model.prompts.render(self._model.prompts.read(chat_history, MediaOptions()), options)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in self._shown(requests, "loglikelihood_rolling", disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            totals.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
        return totals

    def _loglikelihood_tokens(self, requests: list[Pair], disable_tqdm: bool = False, **_: Any) -> list:
        """In the order of the tokens, so that consecutive requests share prefixes."""
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: requests[i][1] + requests[i][2])
        for place in self._shown(order, "loglikelihood", disable_tqdm):
            strings, context, continuation = requests[place]
            found[place] = self._score(context, continuation)
            self.cache_hook.add_partial("loglikelihood", strings, found[place])
        return [found[place] for place in range(len(requests))]

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        if not 1 <= len(continuation) <= self.max_length:
            raise OptionError(
                f"A task has a text of {len(continuation):,} tokens to score, but from 1 to {self.max_length:,} can be "
                "scored; change the task, or the largest length (--max-length)."
            )
        ids = [*context, *continuation][-(self.max_length + 1) :]
        scores = self._model.engine.score(PromptTokens(ids), len(ids) - len(continuation))
        greedy = scores.top_ids[:, 0].tolist() == ids[-len(continuation) :]
        return float(scores.logprobs.sum(dtype="float64")), greedy

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = []
        end = self._model.tokenizer.decode([self.eot_token_id], skip_special=False)
        for request in self._shown(requests, "generate_until", disable_tqdm):
            context, given = request.args
            asked = dict(normalize_gen_kwargs(given, _NEW_TOKENS))
            stop = handle_stop_sequences(asked.pop("until", None), eos=end)
            count = asked.pop("max_gen_toks")
            if count >= self.max_length:
                raise OptionError(
                    f"A task asks for answers of {count:,} tokens, which leave no room for a prompt in "
                    f"{self.max_length:,}; raise the largest length (--max-length)."
                )
            ids = self.tok_encode(context)[count - self.max_length :]
            made = self._model.generate(ids, max_new_tokens=count, stop=tuple(stop), **_sampling(asked)).text
            answers.append(postprocess_generated_text(made, stop=stop, think_end_token=None))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _shown(self, items: Sequence[Any], title: str, hidden: bool) -> Any:
        return tqdm(items, desc=title, disable=hidden or self._quiet)


def _sampling(asked: dict[str, Any]) -> dict[str, Any]:
    """The harness's options as those of `GenerationOptions`. OptionError: one that has no counterpart."""
    asked = {name: value for name, value in asked.items() if name not in ("do_sample", "max_length")}
    if unknown := sorted(asked.keys() - set(_SAMPLING)):
        raise OptionError(f"A task asks for the generation option {unknown[0]}, which is not supported; leave it out.")
    return asked


def find_tasks(names: Sequence[str], include_path: str | None) -> TaskManager:
    """The harness's index of tasks. Its own tasks are in thousands of files, read only if `include_path` lacks a task.

    Raises:
        OptionError: there is no such task or group.
    """
    if include_path is not None:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if {*names} <= {*manager.all_subtasks}:  # a group may refer to tasks of the harness
            return manager
    manager = TaskManager(include_path=include_path)
    for name in names:
        if not manager.match_tasks([name]):
            raise OptionError(f"lm-evaluation-harness has no task {name!r}; list them with: lm_eval ls tasks.")
    return manager


def run_tasks(
    model: OnnxGemma3n,
    tasks: Sequence[str],
    manager: TaskManager,
    *,
    num_fewshot: int | None,
    limit: float | None,
    max_length: int,
    chat: bool,
    output: Path | None,
    quiet: bool,
) -> dict[str, Any]:
    """The harness's results; with `output`, also written there, with each item's answers, in the harness's form.

    Raises:
        OptionError: a task cannot be built, or needs an option that is not supported.
    """
    tracker = None if output is None else EvaluationTracker(output_path=str(output))
    try:
        found = simple_evaluate(
            HarnessModel(model, max_length, quiet=quiet),
            tasks=[*tasks],
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat,
            task_manager=manager,
            log_samples=output is not None,
            evaluation_tracker=tracker,
        )
    except (Gemma3nError, OSError):
        raise
    except Exception as error:  # tasks are third-party code and may raise anything
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise OptionError(f"lm-evaluation-harness cannot run {', '.join(tasks)} ({reason}); check the task.") from error
    assert found is not None
    if tracker is not None:
        samples = found.pop("samples")
        tracker.save_results_aggregated(results=found, samples=samples)
        for name, each in samples.items():
            tracker.save_results_samples(task_name=name, samples=each)
    return found


def table(results: dict[str, Any]) -> str:
    """The harness's table in Markdown, with its groups if there are any."""
    tables = [make_table(results)]
    if results.get("groups"):
        tables.append(make_table(results, "groups"))
    return "\n".join(tables)
