"""Gives each of pytest-xdist's workers a core of its own, where the system can: torch and ONNX Runtime start as many
threads as there are cores, and two of them on the same two cores wait for each other."""

import os

worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if worker and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
