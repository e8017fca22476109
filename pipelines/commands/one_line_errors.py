"""Errors on the command line: a user's mistake ends with one line on stderr and an exit status, never a traceback."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from gross_ray.errors import ConvertedNetworkWarning, DivergedError, GrossRayError, StorageError, UnitsFailedError
from pipelines.execution import signals


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Within the block, show a warning about a user's network as one line, without the line of our code."""
    show, shown = warnings.showwarning, set[str]()

    def show_line(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, ConvertedNetworkWarning):
            show(message, category, *where, **more)
        elif str(message) not in shown:  # a command builds a network more than once
            shown.add(str(message))
            click.echo(f"Warning: {message}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show_line
        yield


class OneLineErrors(click.Group):
    """A group of commands that prints one line for an error, and exits with 2 for a user's mistake, else with 1."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run the command line, and exit with its status if `standalone_mode`."""
        run = functools.partial(super().main, *args, standalone_mode=False, **kwargs)
        if not standalone_mode:
            return run()
        try:
            with signals.orderly(), _one_line_warnings():
                result: Any = run()
            sys.exit(result if isinstance(result, int) else 0)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(0)
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            where = f" (see {context.command_path} --help)" if context else ""
            click.echo(f"Error: {error.format_message()}{where}", err=True)
            sys.exit(2)
        except (click.Abort, KeyboardInterrupt):  # which of the two is raised depends on click's version
            click.echo("Interrupted: what is finished is stored; the same command again continues", err=True)
            signals.leave(signals.exit_status())

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an error that is meant for users becomes one line and an exit status."""
        try:
            return super().invoke(ctx)
        except (UnitsFailedError, DivergedError, StorageError) as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
        except GrossRayError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)
        except OSError as error:  # from a file that the user named, outside any run folder
            if error.filename is None:
                raise
            click.echo(f"Error: {error.filename}: {error.strerror}; name another file, or make room for it", err=True)
            ctx.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of their definition, which is that of the stages."""
        return list(self.commands)
