"""What ONNX Runtime's CUDA provider does with an artifact, told without a GPU: where it puts nodes, what it launches
and copies in a step, and whether it captures a step as a CUDA graph.

    bash ci/cuda_dry_run/run.sh [--record FOLDER] ARTIFACT...

With --record, writes the names of the nodes that are on the device, before any is fused, for `kernels.py`.

A CUDA runtime is built that allocates on the host, launches nothing and counts (`cudart.c`). Needs gcc, nm and
onnxruntime-gpu without CUDA's libraries. Exits with 1 if a graph makes the host wait for the device, or a step cannot
be captured.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import onnxruntime as ort

HERE = Path(__file__).parent
COPIES = {1: "host to device", 2: "device to host", 3: "on the device"}
PROMPT, CAPACITY = 200, 1000
EVERY = "*"  # begins what stands for a name where all nodes of a graph are in one place


def main() -> None:
    if sys.argv[1] == "--place":
        return place(Path(sys.argv[2]), fused=sys.argv[3] == "fused")
    if sys.argv[1] == "--count":
        return count(Path(sys.argv[2]))
    good, record, artifacts = True, None, sys.argv[1:]
    if artifacts[0] == "--record":
        record, *artifacts = map(Path, artifacts[1:])
        record.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        for artifact in map(Path, artifacts):
            print(f"{artifact.name}:")
            for graph in sorted(artifact.glob("*.onnx")):
                if graph.stem == "embedding":  # it runs on the host
                    continue
                good &= placed(graph, folder)
                if record is not None:
                    names = list(nodes_of(graph, folder, fused=False).get("CUDAExecutionProvider", {}))
                    (record / f"{artifact.name}.{graph.stem}.json").write_text(json.dumps(names))
            good &= again(["--count", str(artifact)], folder).returncode == 0
    sys.exit(not good)


def build(folder: Path) -> None:
    """Writes the libraries that the provider is linked against."""
    provider = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    listed = subprocess.run(["nm", "-D", "--undefined-only", provider], check=True, capture_output=True, text=True)
    wanted: dict[str, list[str]] = defaultdict(list, {"libcurand.so.10": []})
    for line in listed.stdout.splitlines():
        name, _, library = line.split()[-1].partition("@")
        if re.match("cu[A-Za-z]|__cuda", name):
            wanted[library or "libcuda.so.1"].append(name)
    ours = (HERE / "cudart.c").read_text()
    written = set(re.findall(r"^(?:int|void \*\*) ?(\w+)\(", ours, re.MULTILINE))
    for library, names in wanted.items():
        source = ours if library.startswith("libcudart") else ""
        source += "".join(stub(name) for name in names if name not in written)
        (folder / "stub.c").write_text(source)
        (folder / "versions").write_text(f"{library} {{ global: *; }};\n")
        versions = [] if library.startswith("libcuda.") else [f"-Wl,--version-script={folder}/versions"]
        command = ["gcc", "-w", "-O1", "-shared", "-fPIC", f"-Wl,-soname,{library}", *versions]
        subprocess.run([*command, folder / "stub.c", "-o", folder / library], check=True)


def stub(name: str) -> str:
    if name.endswith(("Name", "String")):
        return f'const char *{name}(int code) {{ return "none"; }}\n'
    if name.endswith(("Create", "Create_v2")):
        return f"int {name}(void **to) {{ *to = (void *)0x1000; return 0; }}\n"
    return f"int {name}(void) {{ return 0; }}\n"


def again(arguments: list[str], libraries: str, **options: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
    return subprocess.run([sys.executable, __file__, *arguments], env=environment, check=False, **options)  # type: ignore[call-overload]


def placed(graph: Path, libraries: str) -> bool:
    """Prints where the nodes of a graph are; False if something is copied between them."""
    nodes = nodes_of(graph, libraries, fused=True)
    device, host = (Counter(nodes[f"{name}ExecutionProvider"].values()) for name in ("CUDA", "CPU"))
    copies = sum(of[name] for of in (device, host) for name in ("MemcpyToHost", "MemcpyFromHost"))
    listed = ", ".join(f"{n} {name}" for name, n in sorted(host.items()))
    print(
        f"  {graph.name}: {device.total()} nodes on the device, {host.total()} on the host ({listed}), {copies} copies"
    )
    return copies == 0


def nodes_of(graph: Path, libraries: str, *, fused: bool) -> dict[str, dict[str, str]]:
    """By provider, the operators of nodes by their names, as ONNX Runtime logs them."""
    arguments = ["--place", str(graph), "fused" if fused else "whole"]
    done = again(arguments, libraries, capture_output=True, text=True)
    log = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    if done.returncode:
        sys.exit(f"{graph.name}: {log.strip().splitlines()[-1]}")
    nodes: dict[str, dict[str, str]] = defaultdict(dict)
    provider = ""
    for line in log.splitlines():
        if "VerifyEachNodeIsAssignedToAnEp" not in line:
            continue
        if found := re.search(r"All nodes placed on \[(\w+)\]. Number of nodes: (\d+)", line):
            nodes[found[1]] = {f"{EVERY}{i}": "node" for i in range(int(found[2]))}
        elif found := re.search(r"placed on \[(\w+)\]", line):
            provider = found[1]
        elif found := re.search(r"\]\s+(\w+) \((.*)\)\s*$", line):
            nodes[provider][found[2]] = found[1]
    return nodes


def place(graph: Path, *, fused: bool) -> None:
    options = ort.SessionOptions()
    options.log_severity_level, options.log_verbosity_level = 0, 1
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    ort.InferenceSession(str(graph), options, providers=["CUDAExecutionProvider"], enable_fallback=0)


def count(artifact: Path) -> None:
    """Runs a prompt and a few steps, with and without CUDA graphs."""
    from gemma3n_onnx.runtime import OnnxGemma3n

    library = ctypes.CDLL("libcudart.so.13")
    library.dry_copied.restype = ctypes.c_size_t

    def show(what: str) -> None:
        moved = ", ".join(
            f"{library.dry_copies(kind)} copies {name} ({library.dry_copied(kind):,} bytes)"
            for kind, name in COPIES.items()
        )
        replayed = library.dry_graph_launches()
        print(f"    {what}: {library.dry_launches():,} kernels, {replayed} graphs launched; {moved}")

    good = True
    for graphs in (False, True):
        print(f"  {'with' if graphs else 'without'} CUDA graphs:")
        model = OnnxGemma3n.from_pretrained(artifact, "cuda", cuda_graphs=graphs)
        engine = model.engine
        token, running = np.array([model.manifest.bos_token_id]), np.array([True])
        for request in ("first", "second"):
            cache = engine.new_cache(1, CAPACITY)
            library.dry_reset()
            engine.prefill(cache, 0, [model.manifest.bos_token_id] * PROMPT)
            show(f"{request} prompt of {PROMPT} tokens")
            decoder = engine.step_runner(cache)
            for step in ("first step", "greedy step"):
                library.dry_reset()
                decoder.step_greedy(token, running)
                show(step)
            good &= not graphs or (library.dry_launches() == 0 and library.dry_graph_launches() == 1)
            for step in ("first drawn step", "drawn step"):
                library.dry_reset()
                decoder.step_candidates(token, running, 64)
                show(step)
            library.dry_reset()
            decoder.step(token, running)
            show("step with all logits")
            del cache, decoder
    print(f"  calls that a capture forbids: {library.dry_forbidden()}")
    sys.exit(not good or library.dry_forbidden() > 0)


if __name__ == "__main__":
    main()
