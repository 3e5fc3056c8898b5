"""What the first word of either command line does; only the two programs are above.

A command is a function and the options that it reads. Its module is imported when it runs: torch
takes seconds to import, and wrong options are reported before.
"""

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rsb_ffcv import InputError


@dataclass(frozen=True)
class Command:
    """text: what it does, for --help.
    sections: its options by section; see config.options.
    run: takes the arguments after the first word and the text of --help; returns the exit status,
        None for 0.
    """

    text: str
    sections: Mapping[str, type[Any]]
    run: Callable[[list[str], str], int | None]


def dispatch(commands: Mapping[str, Command], default: str, about: str) -> int:
    """Runs the command that this process's command line names by its first word, without one
    `default`. about: what --help says first. Raises InputError where there is no such command."""
    arguments = sys.argv[1:]
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else default
    if name not in commands:
        near = difflib.get_close_matches(name, commands, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "they are"
        raise InputError(f"{name}: no such command; {hint} {', '.join(commands)}")
    lines = [f"  {other}: {command.text}" for other, command in commands.items()]
    description = "\n".join(
        [about, "", f"commands, as the first word ({default} where there is none):", *lines]
    )
    return commands[name].run(arguments, description) or 0
