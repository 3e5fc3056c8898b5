"""How options are declared, and read from flags and YAML files.

An option is a dataclass field that carries its meaning, unit and range; its annotation is its type.
fastargs gets its sections,
its `--help` and its flags from there. fastargs by itself ignores what it does not know and turns
`bool("0")` into True; here every key and value of a file or a flag is checked before anything else
happens, and the first wrong one ends the program with its name, value, place and the nearest valid
name.
"""

import difflib
import math
import os
import sys
import typing
from argparse import ArgumentParser
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from fastargs import Param, Section
from fastargs.config import Config
from fastargs.validation import Checker

from rsb_ffcv import InputError, warn

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

REQUIRED = object()


class _Value(Checker):
    """A fastargs checker that reads one option: type, range and choices, or one of `words`."""

    def __init__(
        self,
        kind: type,
        *,
        low: float,
        high: float,
        choices: Sequence[object],
        words: Sequence[str] = (),
        needed: bool = False,
    ) -> None:
        self.kind, self.low, self.high, self.choices, self.words, self.needed = (
            kind,
            low,
            high,
            choices,
            words,
            needed,
        )

    def check(self, value: Any) -> Any:
        if value in self.words:
            return value
        if self.kind is bool:
            text = str(value).lower()
            if text not in ("0", "1", "true", "false"):
                raise ValueError(self.help())
            value = text in ("1", "true")
        elif self.kind is str:
            if isinstance(value, bool):
                value = int(value)  # YAML reads on and off as these
            if not isinstance(value, (str, int)) or self.needed and not str(value):
                raise ValueError(self.help())
            value = str(value)
        else:
            value = self._number(value)
            if value < self.low or value > self.high:
                raise ValueError(self.help())
        if self.choices and value not in self.choices:
            raise ValueError(self.help())
        return value

    def _number(self, value: object) -> int | float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(self.help())
        if self.kind is int and isinstance(value, (int, str)):
            try:
                return int(value)
            except ValueError:
                pass  # a text such as 1e3, read below
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or self.kind is int and not number.is_integer():
            raise ValueError(self.help())
        return int(number) if self.kind is int else number

    def help(self) -> str:
        return " or ".join([self._help(), *self.words])

    def _help(self) -> str:
        if self.choices:
            return "one of " + ", ".join(str(choice) for choice in self.choices)
        if self.kind is bool:
            return "0 or 1"
        if self.kind is str:
            return "text, not empty" if self.needed else "text"
        name = "whole number" if self.kind is int else "number"
        low, high = (
            f"{x:g}" if abs(x) < 2**31 else str(x) if math.isfinite(x) else None
            for x in (self.low, self.high)
        )
        return (
            f"{name} from {low} to {high}"
            if low and high
            else f"{name}, {low} or more"
            if low
            else f"{name}, at most {high}"
            if high
            else name
        )


def option(
    default: object,
    text: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    choices: Sequence[object] = (),
    words: Sequence[str] = (),
) -> Any:
    """One option, whose type is the annotation of its field: str, bool, int, float, or `int | str`
    where `words` are taken as well.

    default: its value where nothing is given, or REQUIRED.
    text: meaning and unit, shown by --help.
    low, high: range of a number.
    choices: the only values.
    words: values that are taken as they are, whatever the type.
    """
    extra: dict[str, Any] = {} if default is REQUIRED else {"default": default}
    limits = {"low": low, "high": high, "choices": choices, "words": words}
    return field(metadata={"text": text, "limits": limits}, **extra)


def _kind(item: Field[Any]) -> Any:
    return typing.get_args(item.type)[0] if typing.get_args(item.type) else item.type


def _checker(item: Field[Any]) -> "_Value":
    return _Value(_kind(item), **item.metadata["limits"], needed=item.default is MISSING)


def read_options(
    sections: Mapping[str, type[Any]],
    description: str | None,
    arguments: Sequence[str] | None = None,
    *,
    ignored: Collection[str] = (),
    unread: Collection[str] = (),
) -> dict[str, Any]:
    """A value of each of `sections` (dataclasses of `option`s, by name), from the command line.

    Flags are `--section.name=value`; `--config-file FILE` reads YAML, may be repeated, and later
    files and flags win. A file that begins with `extends: OTHER` takes over what OTHER, beside it,
    says and it does not.

    description: shown by --help.
    arguments: the command line; None: this process's.
    ignored: names that files may carry and nothing reads; those that do are named in one warning.
    unread: required options that may be left out; they are then empty.

    Raises InputError for anything unknown, mistyped, out of range or missing.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config = Config()
    for name, section in sections.items():
        Section(name, section.__doc__, config).params(
            **{
                item.name: Param(
                    _checker(item),
                    item.metadata["text"],
                    default=None if item.default is MISSING else _shown(item.default),
                    required=item.default is MISSING,
                )
                for item in fields(section)
            }
        )
    parser = _Parser(description=description, allow_abbrev=False)
    _check_flags(arguments, sections)
    # fastargs would read the files named in sys.argv and the variables of the environment, without
    # a check
    saved, sys.argv = (sys.argv, dict(os.environ)), sys.argv[:1]
    os.environ.clear()
    try:
        config.augment_argparse(parser)
    finally:
        sys.argv = saved[0]
        os.environ.update(saved[1])
    parser.epilog = _options_text(
        sections, unread
    )  # fastargs' own is drawn for a VT100 and speaks of environment variables
    given = parser.parse_args(arguments)

    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    met = []
    for path in given.config_file:
        for name, key, value, file in _read_yaml(path):
            if f"{name}.{key}" in ignored:
                met.append(f"{name}.{key}={value}")
                continue
            values[name][key] = _checked(sections, f"{name}.{key}", value, where=f"in {file}")
    if met:
        warn(
            f"{', '.join(met)}: known from other programs' files and without meaning here; ignored"
        )
    for flag_name, value in vars(given).items():
        if flag_name != "config_file" and value is not None:
            name, key = flag_name.split(".", 1)
            values[name][key] = _checked(
                sections, f"{name}.{key}", value, where="on the command line"
            )
    for name, section in sections.items():
        for item in fields(section):
            if item.default is not MISSING or item.name in values[name]:
                continue
            if f"{name}.{item.name}" in unread:
                values[name][item.name] = _kind(item)()
            else:
                raise InputError(
                    f"{name}.{item.name} is missing ({item.metadata['text']}); give "
                    f"--{name}.{item.name}=... "
                    f"or set it in the file of --config-file"
                )
    return {name: section(**values[name]) for name, section in sections.items()}


def as_dict(config: "DataclassInstance") -> dict[str, dict[str, Any]]:
    """{section: {option: value}} of a config: plain values, ready for JSON."""
    return {
        section.name: {
            item.name: getattr(getattr(config, section.name), item.name)
            for item in fields(getattr(config, section.name))
        }
        for section in fields(config)
    }


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"command line: {message}; options are --section.name=value, see --help")


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader, which by itself keeps the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = [key for key in keys if keys.count(key) > 1]
        if repeated:
            raise yaml.constructor.ConstructorError(
                problem=f"'{repeated[0]}' stands there twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


def _options_text(sections: Mapping[str, type[Any]], unread: Collection[str]) -> str:
    lines = [
        "Options, as --section.name=value or in the YAML file as 'section:' and below it '  name: "
        "value':"
    ]
    for name, section in sections.items():
        lines += ["", f"{name}: {section.__doc__}"]
        for item in fields(section):
            default = (
                f"default {_shown(item.default)}"
                if item.default is not MISSING
                else "not read by this command"
                if f"{name}.{item.name}" in unread
                else "required"
            )
            lines.append(
                f"  --{name}.{item.name}  [{default}; {_checker(item).help()}]\n"
                f"        {item.metadata['text']}"
            )
    return "\n".join(lines)


def _shown(default: object) -> object:
    if isinstance(default, float):
        return f"{default:.6g}"
    return int(default) if isinstance(default, bool) else "empty" if default == "" else default


def _check_flags(arguments: Sequence[str], sections: Mapping[str, type[Any]]) -> None:
    """argparse would say "unrecognized arguments"; this names the nearest flag."""
    for argument in arguments:
        name, _, value = argument[2:].partition("=")
        if argument.startswith("--") and name not in ("config-file", "help"):
            _find(sections, name, f"(value {value!r}) on the command line")


def _read_yaml(
    path: str | Path, extended_by: tuple[Path, ...] = ()
) -> Iterator[tuple[str, str, Any, Path]]:
    """(section, key, value, file) of each line of a recipe; first those of the file it extends.

    extended_by: the files that led to this one.
    """
    path = Path(path)
    where = f"--config-file={path}"
    if extended_by:
        where = f"extends: {path.name} in {extended_by[-1]}"
    if path.resolve() in [other.resolve() for other in extended_by]:
        raise InputError(f"{where}: the files extend each other in a circle; remove one `extends:`")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise InputError(
            f"{where}: cannot be read ({error.strerror}); recipes are in rsb_configs/"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"{where}: not a recipe in YAML ({' '.join(str(error).split())[:160]}); correct it"
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{where}: holds no sections; write 'section:' and below it '  key: value'"
        )
    extended = content.pop("extends", None)
    if extended is not None:
        if not isinstance(extended, str):
            raise InputError(f"{where}: extends={extended!r} must be the name of one file")
        yield from _read_yaml(path.parent / extended, (*extended_by, path))
    for name, section in content.items():
        if not isinstance(section, dict):
            raise InputError(
                f"{where}: section '{name}' must hold 'key: value' lines, holds {section!r}"
            )
        for key, value in section.items():
            yield str(name), str(key), value, path


def _find(sections: Mapping[str, type[Any]], full_name: str, where: str) -> Field[Any]:
    """The field behind `section.option`, or InputError with the nearest valid name."""
    known = {
        f"{section_name}.{item.name}": item
        for section_name, section in sections.items()
        for item in fields(section)
    }
    if full_name not in known:
        key = full_name.rpartition(".")[2]
        near = [
            full for full in known if full.split(".")[1] in (key, full_name)
        ] or difflib.get_close_matches(full_name, [*known, "config-file", "help"], 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"sections are {', '.join(sections)}"
        raise InputError(f"{full_name} {where} is not an option; {hint}")
    return known[full_name]


def _checked(
    sections: Mapping[str, type[Any]], full_name: str, value: object, *, where: str
) -> Any:
    """The value of `section.option`, of its type. Raises InputError."""
    checker = _checker(_find(sections, full_name, f"(value {value!r}) {where}"))
    try:
        return checker.check(value)
    except ValueError as error:
        raise InputError(f"{full_name}={value!r} {where}: must be {checker.help()}") from error
