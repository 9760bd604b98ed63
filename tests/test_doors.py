"""Which room may enter which: read from the imports of every module, and from a process of its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from imports import Graph, imports_of

ROOT = Path(__file__).parents[1]
PACKAGE = "gemma3n_onnx"
ROOMS = ("runtime", "graphs", "export")
HUB_CLIENT = "huggingface_hub"
# What a device has no use for, or only when it downloads an artifact.
HEAVY = (
    HUB_CLIENT,
    "librosa",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "optimum",
    "safetensors",
    "scipy",
    "torch",
    "transformers",
)
# Modules of the runtime that the exporter may enter; what compares artifacts with transformers runs them.
ENTRANCES = ("artifact", "cli.exit", "errors", "generation.defaults", "hub", "prompt.chat_template", "system")
DOORS = {f"{PACKAGE}.runtime.{module}" for module in ENTRANCES}
FREE = "export/verify"


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    return {each.name for each in imports_of(path, ROOT)}


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def offences(room: str, *banned: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(room)
        for name in sorted(imports(path))
        if within(name, *banned)
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_read(room: str) -> None:
    assert len(modules(room)) > 3
    assert any(imports(path) for path in modules(room))


def test_relative_imports_are_resolved() -> None:
    assert "gemma3n_onnx.runtime.artifact.Manifest" in imports(ROOT / "runtime/model.py")
    assert "gemma3n_onnx.export.trace" in imports(ROOT / "export/build_graphs.py")


def test_the_runtime_stands_alone() -> None:
    heavy = [name for name in HEAVY if name != HUB_CLIENT]
    assert offences("runtime", f"{PACKAGE}.export", f"{PACKAGE}.graphs", *heavy) == []


def test_one_module_of_the_runtime_imports_the_client_of_the_hub() -> None:
    assert {offence.split(" ", 1)[0] for offence in offences("runtime", HUB_CLIENT)} == {"runtime/hub.py"}


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_needs_the_training_of_the_demo(room: str) -> None:
    assert offences(room, f"{PACKAGE}.training") == []


@pytest.mark.parametrize("room", ROOMS)
def test_one_module_imports_onnxruntime(room: str) -> None:
    users = {offence.split(" ", 1)[0] for offence in offences(room, "onnxruntime")}
    assert users == ({"runtime/engine/ort.py"} if room == "runtime" else set())


def test_the_graphs_enter_no_other_room() -> None:
    assert offences("graphs", f"{PACKAGE}.export", f"{PACKAGE}.runtime") == []


def test_the_graphs_open_no_files() -> None:
    assert offences("graphs", "io", "os", "pathlib", "shutil", "tempfile", "safetensors") == []
    file_calls = {"open", "read_text", "write_text", "read_bytes", "write_bytes", "load", "save"}
    for path in modules("graphs"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "id", getattr(node.func, "attr", ""))
                assert called not in file_calls, f"{path.name}:{node.lineno} calls {called}"


def test_the_exporter_enters_the_runtime_through_its_doors() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules("export")
        if not path.is_relative_to(ROOT / FREE)
        for name in sorted(imports(path))
        if within(name, f"{PACKAGE}.runtime") and not within(name, *DOORS)
    ]
    assert wrong == []


# Inside the runtime: which rooms a room may enter beside itself. Modules of no room are rooms by themselves.
SHARED = {"artifact", "checks", "errors", "system", "tokens"}
CONVERSATION = SHARED | {"constraints", "engine", "generation", "media", "prompt"}
FRONT = CONVERSATION | {"chat", "hub", "model", "options"}
MAY_ENTER = {
    "artifact": {"errors"},
    "checks": {"errors"},
    "errors": set(),
    "hub": {"artifact", "errors", "system"},
    "system": set(),
    "tokens": set(),
    "engine": SHARED,
    "generation": SHARED | {"engine"},
    "constraints": SHARED | {"generation", "prompt"},
    "media": SHARED,
    "prompt": SHARED | {"media"},
    "options": CONVERSATION,
    "chat": CONVERSATION | {"options"},
    "model": CONVERSATION | {"chat", "hub", "options"},
    "": FRONT,
    "serve": FRONT,
    "evaluation": FRONT,
    "cli": FRONT | {"evaluation", "serve"},
}


def room_of(module: str) -> str:
    return module.partition(".")[2].partition(".")[0]


def test_no_module_of_the_runtime_imports_in_a_circle() -> None:
    assert Graph.of(ROOT / "runtime").circles == []


def test_the_rooms_of_the_runtime_enter_no_room_above() -> None:
    graph = Graph.of(ROOT / "runtime")
    assert {room_of(module) for module in graph.runtime} == MAY_ENTER.keys()
    assert {
        f"{module} -> {name}"
        for module in graph.runtime
        for name in graph.runtime[module] | graph.typing[module]
        if room_of(name) not in MAY_ENTER[room_of(module)] | {room_of(module)}
    } == set()


def test_circles_and_levels_are_found(tmp_path: Path) -> None:
    """`a` and `b` import each other, in a function too; `c` is above them, below `d`; `e` is only for type checkers."""
    modules = {
        "a": "from .b import x",
        "b": "def f():\n    from gemma3n_onnx.room import a",
        "c": "from . import a as other",
        "d": "import gemma3n_onnx.room.c\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import e",
        "e": "from . import d",
    }
    (tmp_path / "room").mkdir()
    for name, text in modules.items():
        (tmp_path / "room" / f"{name}.py").write_text(text)
    graph = Graph.of(tmp_path / "room")
    assert graph.circles == [["room.a", "room.b"]]
    assert graph.levels == 4
    assert graph.typing["room.d"] == {"room.e"}


REPORT = """
import sys, time
started = time.perf_counter()
from gemma3n_onnx.runtime import OnnxGemma3n
seconds = time.perf_counter() - started
print(*sys.modules)
import resource
print(f"{seconds:.2f} s, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB at most")
"""


def test_importing_the_runtime_loads_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", REPORT], capture_output=True, text=True, check=True)
    loaded, cost = done.stdout.splitlines()
    print(f"import gemma3n_onnx.runtime: {cost}")
    names = loaded.split()
    assert "gemma3n_onnx.runtime.model" in names
    assert [name for name in names if within(name, *HEAVY, f"{PACKAGE}.export", f"{PACKAGE}.graphs")] == []


def test_help_of_the_exporter_loads_no_torch() -> None:
    code = "import sys, gemma3n_onnx.export.cli.export; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
