"""The `gemma3n-export` command, and the subcommands of `gemma3n` that need torch; a module a command.

Commands import torch and transformers when they run: `--help` is instant, and a missing package is one sentence.
"""
