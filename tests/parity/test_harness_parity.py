"""lm-evaluation-harness over an artifact against its own `hf` model of the checkpoint."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import numpy as np
import pytest
from harness.make_tasks import make_tasks
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from gemma3n_onnx.runtime import OnnxGemma3n, OptionError
from gemma3n_onnx.runtime.evaluation import harness
from gemma3n_onnx.runtime.evaluation.harness import HarnessModel, find_tasks, run_tasks
from support import run_command

DEMO = Path(__file__).parents[2] / "demo"
ITEMS = 4
TOLERANCE = 1e-4  # nats of an item, fp32


@pytest.fixture(scope="module")
def model(exported: Callable[..., Path]) -> OnnxGemma3n:
    return OnnxGemma3n.from_pretrained(exported(DEMO))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("tasks")
    return folder, make_tasks(folder, ITEMS)


@pytest.fixture(scope="module")
def hf() -> Any:
    return get_model("hf").create_from_arg_string(f"pretrained={DEMO},dtype=float32,device=cpu,add_bos_token=True")


def evaluated(model: Any, tasks: tuple[Path, list[str]], **options: Any) -> dict[str, Any]:
    folder, names = tasks
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, **options)


def answers(found: dict[str, Any], task: str) -> list[Any]:
    return [item["resps"] for item in sorted(found["samples"][task], key=lambda item: item["doc_id"])]


def test_log_likelihoods_and_answers_are_those_of_the_hf_model(model, hf, tasks):
    ours, theirs = evaluated(HarnessModel(model, 2048, quiet=True), tasks), evaluated(hf, tasks)
    assert_same_log_likelihoods(ours, theirs, tasks[1][:2])
    assert answers(ours, tasks[1][2]) == answers(theirs, tasks[1][2])
    assert ours["results"][tasks[1][2]]["exact_match,none"] == 1, "the demo can add"


def test_long_items_are_cut_as_the_hf_model_cuts_them(model, hf, tasks, monkeypatch):
    monkeypatch.setattr(hf, "_max_length", 24)
    scored = tasks[0], tasks[1][:2]
    ours, theirs = evaluated(HarnessModel(model, 24, quiet=True), scored), evaluated(hf, scored)
    assert_same_log_likelihoods(ours, theirs, tasks[1][:2])


def assert_same_log_likelihoods(ours: dict[str, Any], theirs: dict[str, Any], names: list[str]) -> None:
    for name in names:
        mine, other = ([*map(flat, answers(found, name))] for found in (ours, theirs))
        numbers = [np.array([x for item in items for x in item if not isinstance(x, bool)]) for items in (mine, other)]
        error = np.abs(numbers[0] - numbers[1]).max()
        print(f"{name}: error {error:.1e} nats of up to {-numbers[1].min():.0f} (tolerance {TOLERANCE:.0e})")
        assert error <= TOLERANCE
        assert [[x for x in item if isinstance(x, bool)] for item in mine] == [
            [x for x in item if isinstance(x, bool)] for item in other
        ]
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4), (name, metric)


def flat(values: Any) -> list[Any]:
    return [leaf for each in values for leaf in flat(each)] if isinstance(values, list | tuple) else [values]


def test_on_the_command_line(model, tasks, monkeypatch, tmp_path):
    folder, names = tasks
    command = ["gemma3n", "evaluate", str(model.folder), "--include-path", str(folder), "--limit", "3"]
    shown = run_command(monkeypatch, [*command, "--tasks", ",".join(names), "--output", str(tmp_path / "out")])
    assert shown.code == 0, shown.err
    assert all(name in shown.out for name in names)
    assert len([*(tmp_path / "out").rglob("samples_*.jsonl")]) == 3
    figures = json.loads(run_command(monkeypatch, [*command, "--tasks", names[0], "--json"]).out)
    assert figures[str(model.folder)][names[0]]["sample_len"] == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--tasks", "x", "--max-length", "1000000"], "use less"),
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", "x", "--limit", "0"], "'--limit': 0.0 is not in the range"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_a_sentence(model, monkeypatch, options, told):
    outcome = run_command(monkeypatch, ["gemma3n", "evaluate", str(model.folder), *options])
    assert outcome.code in (1, 2) and told in outcome.err and outcome.err.count("Error: ") == 1


def test_results_of_one_name_are_not_mixed(model, monkeypatch, tmp_path):
    command = ["gemma3n", "evaluate", str(model.folder), str(model.folder), "--tasks", "x", "--output", str(tmp_path)]
    assert "cannot be in one folder" in run_command(monkeypatch, command).err


def test_texts_that_do_not_fit_are_told(model):
    short = HarnessModel(model, 8, quiet=True)
    for continuation in ([], [5] * 9):
        with pytest.raises(OptionError, match=rf"text of {len(continuation)} tokens to score, but from 1 to 8"):
            short._loglikelihood_tokens([(("", ""), [2], continuation)])
    assert len(short._loglikelihood_tokens([(("", ""), [2], [5] * 8)])) == 1
    asked = SimpleNamespace(args=("What is 3 plus 4?", {"max_gen_toks": 8}))
    with pytest.raises(OptionError, match="answers of 8 tokens, which leave no room for a prompt in 8"):
        short.generate_until([asked])


def test_a_task_that_cannot_run_is_told_in_a_sentence(model, tasks):
    folder, names = tasks
    options = {"num_fewshot": None, "limit": None, "max_length": 64, "chat": False, "output": None, "quiet": True}
    for changed, told in (("wrong_field: {}", "unexpected keyword"), ("output_type: telepathy", "telepathy")):
        broken = folder.parent / "broken"
        broken.mkdir(exist_ok=True)
        text = (folder / "multiple_choice.yaml").read_text().replace(names[0], "demo_broken")
        (broken / "task.yaml").write_text(text.replace("output_type: multiple_choice", changed))
        with pytest.raises(OptionError, match=rf"cannot run demo_broken \(.*{told}"):
            run_tasks(model, ["demo_broken"], find_tasks(["demo_broken"], str(broken)), **options)


def test_tasks_are_of_a_folder_or_the_harness(tasks, monkeypatch):
    monkeypatch.setattr(harness, "TaskManager", functools.cache(TaskManager))  # the harness's index takes seconds
    folder, names = str(tasks[0]), tasks[1]
    assert find_tasks(names, folder).all_tasks == sorted(names)
    assert {names[0], "arc_easy"} <= {*find_tasks([names[0], "arc_easy"], folder).all_tasks}
    with pytest.raises(OptionError, match="has no task 'no_such_task'"):
        find_tasks(["no_such_task"], folder)
