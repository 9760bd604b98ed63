"""How the modules of a folder import each other: files, levels, arrows, circles.

    python ci/imports.py runtime

An arrow leads from a module to one that it imports, wherever the import stands. Imports for type checkers alone are
counted apart. That importing `a.b` runs `a/__init__.py` first is no arrow. Levels: modules of the longest chain, a
circle being one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGE = "gemma3n_onnx"


@dataclass(frozen=True)
class Import:
    """`name`: dotted, `a.b` for `from a import b`; `typing`: under `if TYPE_CHECKING`."""

    name: str
    typing: bool


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    """All that a module imports, also within functions; `root` holds the package's folders."""
    package = (PACKAGE, *path.relative_to(root).parent.parts)
    return _imports_in(ast.parse(path.read_text(encoding="utf-8")), package, typing=False)


def _imports_in(node: ast.AST, package: tuple[str, ...], *, typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, typing) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            parents = package[: len(package) + 1 - child.level] if child.level else ()
            base = ".".join([*parents, *([child.module] if child.module else [])])
            yield from (Import(f"{base}.{alias.name}", typing) for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for part in child.body:
                yield from _imports_in(ast.Module([part], []), package, typing=True)
            for part in child.orelse:
                yield from _imports_in(ast.Module([part], []), package, typing=typing)
        else:
            yield from _imports_in(child, package, typing=typing)


@dataclass(frozen=True)
class Graph:
    """By module, named as `runtime.engine.ort`: the modules of the same folder that it imports."""

    runtime: Mapping[str, frozenset[str]]
    typing: Mapping[str, frozenset[str]]

    @classmethod
    def of(cls, folder: Path) -> Graph:
        root = folder.resolve().parent
        files = {_module_name(path, root): path for path in sorted(folder.resolve().rglob("*.py"))}
        runtime, typing = {}, {}
        for module, path in files.items():
            found = {(_target(each.name, files), each.typing) for each in imports_of(path, root)}
            runtime[module] = frozenset(name for name, only in found if name and name != module and not only)
            typing[module] = frozenset(name for name, only in found if name and name != module and only)
        return cls(runtime, typing)

    @cached_property
    def circles(self) -> list[list[str]]:
        """Groups of more than one module in which each reaches each."""
        groups = {frozenset(b for b in self._reached[a] if a in self._reached[b]) for a in self.runtime}
        return sorted(sorted(group) for group in groups if group)

    @cached_property
    def levels(self) -> int:
        heights: dict[str, int] = {}

        def height(module: str) -> int:
            if module not in heights:
                below = {name for name in self._reached[module] if module not in self._reached[name]}
                heights[module] = 1 + max(map(height, below), default=0)
            return heights[module]

        return max(map(height, self.runtime), default=0)

    @cached_property
    def _reached(self) -> dict[str, set[str]]:
        reached = {}
        for module in self.runtime:
            seen: set[str] = set()
            waiting = [module]
            while waiting:
                found = self.runtime[waiting.pop()] - seen
                seen |= found
                waiting += found
            reached[module] = seen
        return reached


def _module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _target(name: str, modules: Mapping[str, Path]) -> str | None:
    """The module that is imported by `name`, which may be something in it."""
    inner = name.removeprefix(f"{PACKAGE}.")
    return next((found for found in (inner, inner.rpartition(".")[0]) if found in modules), None)


def main() -> None:
    graph = Graph.of(Path(sys.argv[1]))
    everything = Graph({module: names | graph.typing[module] for module, names in graph.runtime.items()}, {})
    print(f"files    {len(graph.runtime)}")
    print(f"levels   {graph.levels}")
    print(f"arrows   {sum(map(len, graph.runtime.values()))}, {sum(map(len, graph.typing.values()))} for type checkers")
    print(f"circles  {len(graph.circles)}, {len(everything.circles)} with imports for type checkers")
    for circle in everything.circles:
        print(f"  {' '.join(circle)}")


if __name__ == "__main__":
    main()
