"""Writes tasks of lm-evaluation-harness in the words of the demo: multiple choice, rolling and generation.

python ci/harness/make_tasks.py FOLDER [--items 200]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

TEMPLATE = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
{fields}
metadata:
  version: 1
"""
TURN = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
FIELDS = {
    "multiple_choice": """\
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm""",
    "loglikelihood_rolling": """\
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte""",
    "generate_until": """\
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match""",
}


def make_tasks(folder: Path, items: int) -> list[str]:
    """Names of the tasks, whose files are written to `folder`."""
    rng = random.Random(0)
    documents: dict[str, list[dict[str, Any]]] = {kind: [] for kind in FIELDS}
    for _ in range(items):
        a, b = rng.randrange(10), rng.randrange(10)
        question, answer = TURN.format(f"What is {a} plus {b}?"), f"{a} plus {b} is {a + b}."
        wrong = [f"{a} plus {b} is {n}." for n in rng.sample([n for n in range(19) if n != a + b], 3)]
        choices = rng.sample([answer, *wrong], 4)
        documents["multiple_choice"].append({"question": question, "choices": choices, "answer": choices.index(answer)})
        documents["generate_until"].append({"question": question, "answer": answer})
        sums = [(rng.randrange(10), rng.randrange(10)) for _ in range(9)]
        text = "".join(f"What is {x} plus {y}? {x} plus {y} is {x + y}.\n" for x, y in sums)
        documents["loglikelihood_rolling"].append({"text": text[: rng.randrange(20, 300)]})
    names = []
    for kind, fields in FIELDS.items():
        names.append(f"demo_{kind}")
        data = folder / f"{kind}.jsonl"
        data.write_text("".join(json.dumps(each) + "\n" for each in documents[kind]))
        text = TEMPLATE.format(task=names[-1], data=data.resolve(), kind=kind, fields=fields)
        (folder / f"{kind}.yaml").write_text(text)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=200)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(",".join(make_tasks(options.folder, options.items)))


if __name__ == "__main__":
    main()
