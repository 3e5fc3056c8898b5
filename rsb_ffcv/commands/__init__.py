"""The commands of both programs. A command is the first word of the command line.

It consists of a function and the options that it reads. Its module is imported when it runs: torch
takes seconds to import, and wrong options are reported before that. Only the two programs import
this package.
"""

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsb_ffcv import InputError, __version__, counted


@dataclass(frozen=True)
class Command:
    """A command.

    text: what it does, for --help
    sections: its options by section; see config.options
    run: takes the arguments after the first word and the text of --help; returns the exit status,
        None for 0
    """

    text: str
    sections: Mapping[str, type[Any]]
    run: Callable[[list[str], str], int | None]


def only_folder(command: str, folders: list[str], fix: str) -> Path:
    """The folder that a command was given. Raises InputError, which ends with `fix`, if there is
    none, or more than one."""
    if len(folders) != 1:
        raise InputError(f"{command}: {counted(len(folders), 'folder')}; {fix}")
    return Path(folders[0])


def dispatch(commands: Mapping[str, Command], default: str, about: str) -> int:
    """Runs the command that is the first word of this process's command line, or `default` if there
    is none. about: the first lines of --help. Raises InputError if there is no such command.
    """
    arguments = sys.argv[1:]
    if "--version" in arguments:
        print(f"rsb_ffcv {__version__}")
        return 0
    if arguments and arguments[0].startswith("-"):
        for before, word in zip(arguments, arguments[1:]):
            if word in commands and before != "--config-file":
                raise InputError(
                    f"{word}: the command comes first; write {word} before the options"
                )
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else default
    if name not in commands:
        near = difflib.get_close_matches(name, commands, 1, 0.5)
        hint = f"did you mean {near[0]}? All:" if near else "give one of:"
        raise InputError(f"{name}: no such command; {hint} {', '.join(commands)}")
    lines = [f"  {other}: {command.text}" for other, command in commands.items()]
    description = "\n".join(
        [
            about,
            "",
            "--version prints the version.",
            "",
            f"commands, as the first word (default: {default}):",
            *lines,
        ]
    )
    return commands[name].run(arguments, description) or 0
