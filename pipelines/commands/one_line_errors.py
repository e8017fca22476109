"""Errors on the command line: whatever happens, one line on stderr and an exit status, never a traceback."""

from __future__ import annotations

import errno
import functools
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from gross_ray.errors import (
    ConvertedNetworkWarning,
    DivergedError,
    GrossRayError,
    StorageError,
    UnitsFailedError,
    first_line,
)
from gross_ray.run.tracebacks import keep_traceback
from pipelines.execution import signals

_RUN = "gross_ray.run"
"""Key of click's `Context.meta` for the run folder that the command line names."""
_OF_A_FILE = {
    number: remedy
    for remedy, numbers in {
        "make room for it, or name another file": (errno.ENOSPC, errno.EDQUOT),
        "change its permissions, or name another file": (errno.EACCES, errno.EPERM),
        "name another file": (
            *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS),
            *(errno.ENAMETOOLONG, errno.ELOOP),
        ),
    }.items()
    for number in numbers
}
"""What to do about errors of the operating system that are about the file that they name."""


class _Command(click.Command):
    """A command that records its run folder, to which the traceback of an unexpected error is written."""

    def invoke(self, ctx: click.Context) -> Any:
        ctx.meta[_RUN] = ctx.params.get("run") or ctx.params.get("out")
        return super().invoke(ctx)


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

    command_class = _Command

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run the command line, and exit with its status if `standalone_mode`."""
        run = functools.partial(super().main, *args, standalone_mode=False, **kwargs)
        if not standalone_mode:
            return run()
        try:
            with signals.orderly(), _one_line_warnings():
                result: Any = run()
            signals.leave(result if isinstance(result, int) else 0)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            sys.exit(0)
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            where = f" (see {context.command_path} --help)" if context else ""
            click.echo(f"Error: {error.format_message()}{where}", err=True)
            sys.exit(2)
        except (click.Abort, KeyboardInterrupt) as error:  # which of the two is raised depends on click's version
            texts = [str(each) for each in (error, error.__cause__) if each is not None]
            then = next(filter(None, texts), "what is finished is stored; the same command again continues")
            click.echo(f"Interrupted: {then}", err=True)
            signals.leave(signals.exit_status())

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; any error becomes one line and an exit status."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):  # click handles them
            raise
        except (UnitsFailedError, DivergedError, StorageError) as error:
            _fail(ctx, str(error), 1)
        except GrossRayError as error:
            _fail(ctx, str(error), 2)
        except OSError as error:
            remedy = _OF_A_FILE.get(error.errno or 0)
            if error.filename is None or remedy is None:
                _fail(ctx, _unexpected(ctx, error), 1)
            _fail(ctx, f"{error.filename}: {error.strerror}; {remedy}", 1)  # a file of the user, outside a run folder
        except Exception as error:
            _fail(ctx, _unexpected(ctx, error), 1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of their definition, which is that of the stages."""
        return list(self.commands)


def _fail(ctx: click.Context, message: str, status: int) -> NoReturn:
    click.echo(f"Error: {' '.join(message.splitlines())}", err=True)
    ctx.exit(status)


def _unexpected(ctx: click.Context, error: Exception) -> str:
    """Return the line for an error that is not ours, and write its traceback to a file."""
    return f"{first_line(error).rstrip(': ')}; {keep_traceback(traceback.format_exc(), ctx.meta.get(_RUN))}"
