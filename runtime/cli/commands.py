"""The `gemma3n` command. Subcommands load when they are called; other packages add theirs through entry points."""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import entry_points

import click

from .exit import missing_package

OWN = ("bench", "chat", "evaluate", "inspect", "perplexity", "pull", "run", "serve", "version")
"""Modules of this folder; each has the command of its name."""
COMMANDS_GROUP = "gemma3n_onnx.commands"


class CommandGroup(click.Group):
    """The runtime's commands and installed entry points, such as the exporter's."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*OWN, *(entry.name for entry in entry_points(group=COMMANDS_GROUP))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in OWN:
            return getattr(import_module(f".{cmd_name}", __package__), cmd_name)
        for entry in entry_points(group=COMMANDS_GROUP, name=cmd_name):
            try:
                return entry.load()
            except ImportError as error:
                raise click.ClickException(missing_package(error)) from error
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in (known := self.list_commands(ctx)) and (near := difflib.get_close_matches(name, known, 1)):
            ctx.fail(f"No such command {name!r}; did you mean {near[0]}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Like click's own, but wraps long lines, where click cuts them off."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._short_help(ctx, name)) for name in self.list_commands(ctx)])

    def _short_help(self, ctx: click.Context, name: str) -> str:
        try:
            command = self.get_command(ctx, name)
        except click.ClickException as error:
            return error.message
        return "" if command is None else command.get_short_help_str(limit=500)


@click.group(cls=CommandGroup)
@click.version_option(package_name="gemma3n-onnx")
def cli() -> None:
    """Gemma 3n on ONNX Runtime."""
