"""The commands of the cluster files and of docs/cluster.md, held against the programs that they call."""

import re
import shlex
import subprocess
from copy import copy
from typing import Any

import botocore.session
import click
from ray.scripts.scripts import cli as ray_cli

from cli import main as gross_cli


def is_shell(command: str) -> bool:
    """Return whether bash can parse `command`; nothing is run."""
    return subprocess.run(["bash", "-n", "-c", command], capture_output=True, check=False).returncode == 0


def calls(command: str) -> list[list[str]]:
    """Return the simple commands in a shell line as words, without NAME=value, keywords and folders before them."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;()")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if re.fullmatch(r"[|&;()]+", word):
            found.append([])
        elif found[-1] or not re.fullmatch(r"do|then|[A-Za-z_]\w*=.*", word):
            found[-1].append(word if found[-1] else word.rpartition("/")[2])
    return [call for call in found if call]


def problem(call: list[str]) -> str | None:
    """Return what is wrong with this call of `ray`, `gross` or `aws`; None if nothing is, and for other programs."""
    program, *arguments = call
    if program == "aws":
        return _aws_problem(arguments)
    if program not in ("ray", "gross"):
        return None
    command: click.Command = {"ray": ray_cli, "gross": gross_cli}[program]
    context = click.Context(command)
    while isinstance(command, click.Group):
        if not arguments or arguments[0] not in command.commands:
            return f"{shlex.join(call)}: no such command"
        command = command.commands[arguments[0]]
        arguments = arguments[1:]
    try:
        # A copy: a command keeps the help option that it has without its group's settings.
        context = copy(command).make_context(program, list(arguments))
    except click.ClickException as error:
        return f"{shlex.join(call)}: {error.format_message()}"
    if program == "ray" and command.name == "exec":
        return next((found for inner in calls(context.params["cmd"]) if (found := problem(inner))), None)
    return None


def _aws_problem(arguments: list[str]) -> str | None:
    service, operation, *options = arguments
    if service == "s3":  # the client's own commands, of no API
        return None if operation in ("mb", "ls", "cp", "sync", "rb") else f"aws s3 {operation}"
    model = botocore.session.get_session().get_service_model(service)
    wanted = _camel(operation)
    if wanted not in model.operation_names:
        return f"aws {service} {operation}: no such operation"
    shape: Any = model.operation_model(wanted).input_shape
    given = {_plain(option) for option in options if option.startswith("--")} - {"region", "profile", "output"}
    wrong = given ^ (
        given & {_plain(name) for name in shape.members} | {_plain(name) for name in shape.required_members}
    )
    return f"aws {service} {operation}: {', '.join(sorted(wrong))}" if wrong else None


def _plain(name: str) -> str:
    return name.replace("-", "").lower()


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("-"))
