"""Prints what `Checks` of tests/clients printed, read from stdin, as a table; exits 1 if a check failed."""

from __future__ import annotations

import json
import sys
from collections import defaultdict

FEATURES = (
    *("text", "stream", "image", "audio", "tools offered", "tools forced", "parallel tools", "nested tools"),
    *("structured", "errors", "history"),
)
CELLS = {"ok": "ok", "none": "-", "failed": "no"}

clients: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
reasons: dict[str, list[str]] = {"none": [], "failed": []}
for row in (json.loads(line) for line in sys.stdin if line.startswith('{"client"')):  # Clients print other lines, too.
    clients[row["client"], row["version"]][row["feature"]] = CELLS[row["result"]]
    if row["result"] != "ok":
        reasons[row["result"]].append(f"{row['client']}, {row['feature']}: {row['why']}")

print(f"| client | version | {' | '.join(FEATURES)} |")
print("| --- " * (len(FEATURES) + 2) + "|")
for (client, release), results in clients.items():
    print(f"| {client} | {release} | {' | '.join(results.get(feature, '') for feature in FEATURES)} |")
for result, told in reasons.items():
    for reason in told:
        print(f"{CELLS[result]} {reason}")
sys.exit(bool(reasons["failed"]))
