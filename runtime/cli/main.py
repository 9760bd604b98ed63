"""The `gemma3n` command. Other packages add subcommands through entry points, which load when called."""

from __future__ import annotations

import functools
from importlib.metadata import entry_points

import click

from .bench import bench
from .chat import chat
from .evaluate import evaluate
from .exit import exit_with_message, missing_package
from .inspect import inspect
from .perplexity import perplexity
from .pull import pull
from .run import run
from .serve import serve

COMMANDS_GROUP = "gemma3n_onnx.commands"


class CommandGroup(click.Group):
    """The runtime's commands and installed entry points, such as the exporter's."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(e.name for e in entry_points(group=COMMANDS_GROUP))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if found := super().get_command(ctx, cmd_name):
            return found
        for entry in entry_points(group=COMMANDS_GROUP, name=cmd_name):
            try:
                return entry.load()
            except ImportError as error:
                raise click.ClickException(missing_package(error)) from error
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Like click's own, but does not load entry points for their help."""
        rows = []
        for name in self.list_commands(ctx):
            own = self.commands.get(name)
            rows.append((name, own.get_short_help_str() if own else "(from the exporter; see its --help)"))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=CommandGroup)
@click.version_option(package_name="gemma3n-onnx")
def cli() -> None:
    """Gemma 3n on ONNX Runtime."""


for _command in (bench, chat, evaluate, inspect, perplexity, pull, run, serve):
    cli.add_command(_command)


def main() -> None:
    exit_with_message(functools.partial(cli.main, prog_name="gemma3n", standalone_mode=False))
