"""The commands doing what they are for."""

import ast
import io
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import click
import numpy
import pytest

from gemma3n_onnx.export.slicing import load_slices
from gemma3n_onnx.runtime import GenerationOptions, OnnxGemma3n, PromptError
from gemma3n_onnx.runtime.cli.commands import OWN
from gemma3n_onnx.runtime.cli.exit import exit_with_message
from support import DEFAULT_SIGNALS, SMALL, Outcome, run_command, text_checkpoint

ROOT = Path(__file__).parents[3]
OPTIONS = ("--max-new-tokens", "12")


@pytest.fixture
def gemma3n(monkeypatch: pytest.MonkeyPatch):
    return lambda *arguments: run_command(monkeypatch, ["gemma3n", *map(str, arguments)])


def test_run_prints_what_generate_gives(gemma3n, small_artifact: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    wanted = OnnxGemma3n.from_pretrained(small_artifact).generate(messages, max_new_tokens=12).text
    assert gemma3n("run", small_artifact, "Hello", *OPTIONS) == Outcome(0, wanted + "\n", "")


def test_run_raw_and_with_options(gemma3n, small_artifact: Path) -> None:
    options = {"max_new_tokens": 12, "temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 3}
    wanted = OnnxGemma3n.from_pretrained(small_artifact).generate("Hello", **options).text
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert gemma3n("run", "--raw", small_artifact, "Hello", *flags).out == wanted + "\n"


def test_chat_samples_as_the_checkpoint_says(
    gemma3n, small_artifact: Path, submitted: list[GenerationOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    for flags in ((), ("--temperature", "0"), ("--sampling", "greedy")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
        assert gemma3n("chat", small_artifact, *flags, *OPTIONS).code == 0
    assert [(o.temperature, o.top_k, o.top_p) for o in submitted] == [
        (1.0, 64, 0.95),
        (0.0, 64, 0.95),
        (0.0, None, None),
    ]


def test_run_with_a_system_prompt(gemma3n, small_artifact: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    wanted = OnnxGemma3n.from_pretrained(small_artifact).generate(messages, max_new_tokens=12).text
    assert gemma3n("run", small_artifact, "Hello", "--system", "Be brief.", *OPTIONS).out == wanted + "\n"


def test_statistics_go_to_stderr(gemma3n, small_artifact: Path) -> None:
    plain, with_stats = (gemma3n("run", small_artifact, "Hello", *OPTIONS, *more) for more in ((), ("--stats",)))
    assert with_stats.out == plain.out
    assert "decode 11 tokens" in with_stats.err and "peak memory" in with_stats.err
    assert plain.err == ""


def test_inspect_shows_the_manifest(gemma3n, small_artifact: Path) -> None:
    shown = gemma3n("inspect", small_artifact)
    assert shown.code == 0
    assert "layers: 3, KV caches: 2 (1 of them windowed)" in shown.out
    assert "decoder.onnx.data" in shown.out


def test_inspect_json_is_the_manifest(gemma3n, small_artifact: Path) -> None:
    shown = gemma3n("inspect", "--json", "--verify", small_artifact)
    assert json.loads(shown.out) == json.loads((small_artifact / "manifest.json").read_text())
    assert "checksums match" in shown.err


def test_slices_lists_the_published_ones(gemma3n) -> None:
    lines = gemma3n("slices").out.splitlines()
    published = [spec.name for spec in load_slices(None).specs]
    assert len(lines) == 1 + len(published)
    assert [row["name"] for row in json.loads(gemma3n("slices", "--json").out)] == published


def test_verify_passes_on_the_artifacts_own_checkpoint(gemma3n, small_artifact: Path, small_checkpoint: Path) -> None:
    options = ("--model", small_checkpoint, "--new-tokens", "8", "--prompts", "1")
    shown = gemma3n("verify", small_artifact, *options)
    assert (shown.code, shown.err) == (0, "")
    assert "PASS" in shown.out
    assert json.loads(gemma3n("verify", small_artifact, *options, "--json").out)["passed"] is True


def test_verify_fails_on_other_weights(gemma3n, small_artifact: Path, tmp_path: Path) -> None:
    other = text_checkpoint("tiny", tmp_path / "other", seed=1, overrides=SMALL)
    shown = gemma3n("verify", small_artifact, "--model", other, "--new-tokens", "8", "--prompts", "1")
    assert shown.code == 1
    assert "FAIL" in shown.out


def test_export_writes_where_it_says(
    monkeypatch: pytest.MonkeyPatch, small_artifact: Path, small_checkpoint: Path, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = run_command(monkeypatch, ["gemma3n-export", "--model", str(small_checkpoint)])
    assert shown.code == 0
    steps = [
        "Tracing the decoder ...",
        "Writing weights ...",
        *(f"Writing weights: {share} %" for share in (25, 50, 75)),
    ]
    assert shown.err.splitlines() == steps, "a line for each step on what is no terminal"
    assert "small-whole-fp32-cpu" in shown.out
    made = tmp_path / "small-whole-fp32-cpu"
    assert [path.name for path in tmp_path.iterdir()] == [made.name]
    copies = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (made, small_artifact)]
    assert copies[0] == copies[1]
    again = ["gemma3n-export", "--model", str(small_checkpoint), "--output", str(made), "--force", "--quiet"]
    assert run_command(monkeypatch, again) == Outcome(0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == [made.name]


def test_a_slice_name_makes_no_folders_of_its_own(
    monkeypatch: pytest.MonkeyPatch, small_checkpoint: Path, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slices.csv").write_text('name,layers,ffn_hidden_dims,layers_skipped\n../a b,3,"[128, 256, 64]",[]\n')
    command = ["gemma3n-export", "--model", str(small_checkpoint), "--matformer-config", "slices.csv"]
    assert run_command(monkeypatch, [*command, "--slice", "../a b"]).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["slices.csv", "small-a-b-fp32-cpu"]


def test_make_checkpoint(gemma3n, tmp_path: Path) -> None:
    shown = gemma3n("make-checkpoint", "--size", "tiny", "--output", tmp_path / "new")
    assert shown.code == 0
    assert shown.err.splitlines()[0] == "Writing random weights ..."
    assert (tmp_path / "new" / "model.safetensors").is_file()


COMMANDS = (*OWN, "export", "make-checkpoint", "slices", "verify")


def test_help_fits_into_80_columns_and_is_not_cut_off(gemma3n, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = {name: gemma3n(*name.split(), "--help") for name in ("", *COMMANDS)}
    assert {outcome.code for outcome in shown.values()} == {0}
    listed = shown[""].out.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.splitlines() if line[2:3].strip()] == sorted(COMMANDS)
    assert "..." not in listed
    for outcome in shown.values():
        assert max(map(len, outcome.out.splitlines())) <= 80


def test_export_is_gemma3n_export(gemma3n, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [gemma3n("export", "--help"), run_command(monkeypatch, ["gemma3n-export", "--help"])]
    assert both[0].out.replace("gemma3n export", "gemma3n-export") == both[1].out
    assert both[0].code == 0


def test_version_names_what_it_runs_on(gemma3n) -> None:
    lines = gemma3n("version").out.splitlines()
    assert lines[0] == f"gemma3n-onnx {version('gemma3n-onnx')}"
    assert f"numpy {numpy.__version__}" in lines
    assert any(line.startswith("onnxruntime") for line in lines)


def test_a_mistyped_command_names_the_nearest(gemma3n) -> None:
    shown = gemma3n("serv")
    assert shown.code == 2 and "No such command 'serv'; did you mean serve?" in shown.err


TYPOS = [
    ("export", "--model", "demo", "--precision", "int3"),
    ("export", "--model", "demo", "--layout", "onnx"),
    ("export", "--model", "demo", "--precision", "int4", "--block-size", "5"),
    ("export", "--model", "demo", "--modalities", "smell"),
    ("export", "--model", "demo", "--modalities", ","),
    ("export", "--model", "demo", "--slice", "E9B"),
    ("export", "--model", "nowhere/there/is"),
    ("export", "--model", "demo", "--report", "nowhere/report.json", "--precision", "int4"),
    ("export", "--model", "demo", "--report-prompts", "README.md"),
    ("export", "--model", "demo", "--precisoin", "int4"),
    ("export", "--model", "demo", "--output", "demo"),
    ("verify", "nowhere", "--mdoel", "demo"),
    ("verify", "nowhere", "--model", "demo", "--modalities", ""),
    ("make-checkpoint", "--size", "tiny", "--output", "demo"),
]


# Runs COMMANDS one after another; prints the code, the lines of stderr and the heavy packages that are loaded.
RUN_ALL = """
import contextlib, io, sys
from gemma3n_onnx.export.cli.export import export_command
from gemma3n_onnx.export.cli.make_checkpoint import make_checkpoint
from gemma3n_onnx.export.cli.slices import slices
from gemma3n_onnx.export.verify.command import verify
from gemma3n_onnx.runtime.cli.exit import exit_with_message
FOUND = {"export": export_command, "make-checkpoint": make_checkpoint, "verify": verify, "slices": slices}
for name, *arguments in COMMANDS:
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            exit_with_message(lambda: FOUND[name].main(arguments, standalone_mode=False))
    except SystemExit as exit_:
        heavy = {"torch", "onnx_ir", "transformers"} & {name for name, module in sys.modules.items() if module}
        print(exit_.code or 0, err.getvalue().splitlines(), *heavy)
"""


def run_all(commands: Sequence[Sequence[str]], before: str = "") -> list[str]:
    code = before + RUN_ALL.replace("COMMANDS", repr(commands))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(commands), done.stderr
    return lines


def test_a_mistyped_option_is_told_before_torch_is_imported() -> None:
    for typo, line in zip(TYPOS, run_all(TYPOS)):
        assert line.startswith(("1 ['Error: ", '1 ["Error: ', "2 ['Usage: ")) and line[-1] == "]", (typo, line)


def test_slices_need_no_torch() -> None:
    assert run_all([("slices",), ("slices", "--json")]) == ["0 []", "0 []"]


def test_on_a_device_each_command_of_the_exporter_says_what_to_install(tmp_path: Path) -> None:
    """A device has none of the packages of the extra `export`."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["export"]
    packages = [re.split(r"[<>=]", each)[0].replace("-", "_") for each in extra]
    before = f"import sys\nsys.modules |= dict.fromkeys({packages})\n"
    output = str(tmp_path / "out")
    commands = [
        ("export", "--model", "demo", "--output", output),
        ("verify", "demo", "--model", "demo"),
        ("make-checkpoint", "--size", "tiny", "--output", output),
        ("slices",),
    ]
    *told, listed = run_all(commands, before)
    says = re.compile(r'Error: This command needs \w+; install it with: pip install "gemma3n-onnx\[export\]"\.')
    for command, line in zip(commands, told):
        code, _, err = line.partition(" ")
        (sentence,) = ast.literal_eval(err)
        assert code == "1" and says.fullmatch(sentence), (command, line)
    assert listed == "0 []"
    assert not (tmp_path / "out").exists()


def test_a_command_whose_package_is_missing_says_what_to_install(gemma3n, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma3n_onnx.export.cli.slices", None)
    shown = gemma3n("slices")
    assert shown.code == 1
    assert shown.err.startswith("Error: ") and "gemma3n-onnx[export]" in shown.err


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (None, 0, ""),
        (PromptError("The prompt is empty."), 1, "Error: The prompt is empty.\n"),
        (click.UsageError("No such option."), 2, "Error: No such option.\n"),
        (click.Abort(), 130, ""),
        (KeyboardInterrupt(), 130, ""),
        (MemoryError(), 1, "Error: Out of memory; use a smaller batch, prompt or model.\n"),
        (PermissionError(13, "Permission denied", "x.bin"), 1, "Error: Permission denied: x.bin.\n"),
        (
            ModuleNotFoundError("No module", name="torch"),
            1,
            'Error: This command needs torch; install it with: pip install "gemma3n-onnx[export]".\n',
        ),
        (SystemExit(1), 1, ""),
    ],
)
def test_every_end_has_its_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException | None, code: int, says: str
) -> None:
    def command() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as exit_:
        exit_with_message(command)
    assert (exit_.value.code or 0) == code
    assert capsys.readouterr().err == says


MAIN = [sys.executable, "-c", "from gemma3n_onnx.runtime.cli.main import main; main()"]


def test_a_chat_needs_standard_input(monkeypatch: pytest.MonkeyPatch, small_artifact: Path) -> None:
    """It is None in Python after `<&-`."""
    monkeypatch.setattr(sys, "stdin", None)
    outcome = run_command(monkeypatch, ["gemma3n", "chat", str(small_artifact)])
    told = "Error: Standard input is closed; chat in a terminal, or pipe messages in.\n"
    assert outcome == Outcome(1, "", told)


def test_a_closed_pipe_is_no_traceback(small_artifact: Path) -> None:
    command = [*MAIN, "run", "--raw", str(small_artifact), "Hello", "--max-new-tokens", "200"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    assert err == b""


@pytest.mark.parametrize("module", ["click", "importlib.metadata", "numpy", "tokenizers", "onnxruntime"])
def test_ctrl_c_while_modules_load_is_no_traceback(small_artifact: Path, module: str) -> None:
    code = f"""
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
from gemma3n_onnx.runtime.cli.main import main
main()
"""
    command = [sys.executable, "-c", DEFAULT_SIGNALS + code, "run", str(small_artifact), "Hello"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "")


def test_ctrl_c_is_no_traceback(small_artifact: Path) -> None:
    wait = "import time; from gemma3n_onnx.runtime.cli import inspect, main; "
    wait += "inspect.load_manifest = lambda _: (print('on', flush=True), "
    wait += "[time.sleep(0.1) for _ in range(300)]); main.main()"
    command = [sys.executable, "-c", DEFAULT_SIGNALS + wait, "inspect", str(small_artifact)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_characters_that_the_terminal_lacks_end_no_answer(small_artifact: Path) -> None:
    command = [*MAIN, "run", "--raw", str(small_artifact), "Hello", *OPTIONS]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"?" in done.stdout
