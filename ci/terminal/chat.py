"""Types into `gemma3n chat` under tmux, and reads what the terminal shows."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

LINES = 2000
SECONDS = 60


class Tmux:
    """A terminal of its own server, with a command in it."""

    def __init__(self, folder: Path, command: str) -> None:
        self._socket = str(folder / "tmux")
        size = ("-x", "100", "-y", "30")
        self.run("-f", "/dev/null", "new-session", "-d", *size, f"{command}; echo Exit code $?; sleep 600")
        self.run("set-option", "-g", "history-limit", str(LINES))

    def run(self, *arguments: str) -> str:
        command = ["tmux", "-S", self._socket, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def press(self, key: str) -> None:
        self.run("send-keys", key)

    def type(self, text: str) -> None:
        self.run("send-keys", "-l", text)
        self.press("Enter")

    def paste(self, text: str) -> None:
        self.run("set-buffer", text)
        self.run("paste-buffer", "-p", "-d")  # bracketed, if the program asked for that

    def shown(self) -> str:
        return self.run("capture-pane", "-p", "-J", "-S", f"-{LINES}").rstrip()

    def wait(self, pattern: str, after: int = 0) -> None:
        """Until the terminal shows `pattern` behind its first `after` characters."""
        until = time.monotonic() + SECONDS
        while not re.search(pattern, self.shown()[after:]):
            if time.monotonic() > until:
                raise SystemExit(f"{self.shown()}\n\nThe terminal does not show {pattern!r}.")
            time.sleep(0.05)

    def ask(self, text: str, pattern: str) -> None:
        """Types a message or a command, and waits for its answer and the next prompt."""
        before = len(self.shown())
        self.type(text)
        self.wait(rf"{pattern}[\s\S]*\n>$", before)


def main(artifact: str, folder: Path) -> None:
    file = folder / "chat.json"
    terminal = Tmux(folder, f"gemma3n chat {artifact} --no-history --sampling greedy")
    try:
        terminal.wait(r"/help lists the commands[\s\S]*\n>$")
        terminal.ask("What is 3 plus 4?", r"3 plus 4 is 7\.")
        terminal.ask("/image nope.png", "Error: There is no file 'nope.png'")
        terminal.ask("/image demo/picture.png", r"Attached image demo/picture\.png\.")
        terminal.ask("What is in the picture?", r"A red circle, a yellow star and a blue square\.")
        terminal.ask("How many shapes are there?", r"three shapes\.")
        terminal.ask("/audio demo/sound.wav", r"Attached audio demo/sound\.wav \(2\.6 s\)\.")
        terminal.ask("What do you hear?", r"Three high beeps\.")
        block = "How many shapes\nare there?"
        terminal.paste(block)
        terminal.ask("", r"three shapes\.")

        # At so high a temperature every token is as likely as the one that ends the answer: it is long.
        for option in ("max_new_tokens 2000", "temperature 50", "seed 1"):
            terminal.ask(f"/set {option}", f"{option.split()[0]} is now")
        before = len(terminal.shown())
        terminal.type("What do you hear?")
        terminal.wait(r"\?\n+\S", before)
        terminal.press("C-c")
        terminal.wait(r"\(stopped; /retry asks again\)", before)
        for option in ("temperature 0", "max_new_tokens 64"):
            terminal.ask(f"/set {option}", f"{option.split()[0]} is now")
        terminal.ask("/retry", r"Three high beeps\.")
        terminal.ask("/retry", r"Three high beeps\.")

        terminal.ask(f"/save {file}", r"Saved 6 turns to")
        terminal.ask("/reset", "")
        terminal.ask(f"/load {file}", r"Loaded 6 turns from")
        terminal.ask("What is in the picture?", r"A red circle, a yellow star and a blue square\.")
        terminal.ask("How many shapes are there?", r"three shapes\.")
        terminal.ask("/save", r"Saved 8 turns to")
        terminal.type("/quit")
        terminal.wait("Exit code 0")
        print(terminal.shown())
    finally:
        terminal.run("kill-server")
    asked = [message["content"] for message in json.loads(file.read_text()) if message["role"] == "user"]
    assert len(asked) == 8 and block in asked, "the pasted lines are one message"


main(sys.argv[1], Path(sys.argv[2]))
