"""Declares options, and reads them from flags and YAML files.

An option is a dataclass field. Its annotation is its type, and its metadata contains the meaning,
unit and range. The sections, flags and `--help` of fastargs are generated from these fields.

fastargs ignores unknown names, and `bool("0")` is True in it. This module therefore checks every
key and value of every file and flag first. The first error ends the program with the name, the
value, where it was given, and the nearest valid name.
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
# The recipes: a folder of the repository, which a wheel installs beside the package
RECIPES = Path(__file__).parents[2] / "rsb_configs"


class _Value(Checker):
    """A fastargs checker for one option: its type, range and choices, or one of `words`."""

    def __init__(
        self,
        kind: type,
        *,
        low: float,
        high: float,
        choices: Sequence[object],
        words: Sequence[str] = (),
        several: bool = False,
        needed: bool = False,
    ) -> None:
        """kind: str, bool, int or float.
        low: smallest value of a number.
        high: largest value of a number.
        choices: the only valid values; empty: all values.
        words: words that are valid values in addition.
        several: whether a YAML file may give a list of texts, which are joined by commas.
        needed: whether a text must not be empty.
        """
        self.kind, self.low, self.high, self.choices, self.words = kind, low, high, choices, words
        self.several, self.needed = several, needed

    def check(self, value: Any) -> Any:
        if value in self.words:
            return value
        if self.kind is bool:
            text = str(value).lower()
            if text not in ("0", "1", "true", "false"):
                raise ValueError(self.help())
            value = text in ("1", "true")
        elif self.kind is str:
            if self.several and isinstance(value, list) and all(isinstance(x, str) for x in value):
                value = ",".join(value)
            if isinstance(value, bool):
                word = "on" if value else "off"  # which YAML reads as bool
                value = word if word in self.choices else int(value)
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
                pass  # for example 1e3, which is read below
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or self.kind is int and not number.is_integer():
            raise ValueError(self.help())
        return int(number) if self.kind is int else number

    def help(self) -> str:
        """The valid values, for --help and messages."""
        return " or ".join([self._help(), *self.words])

    def _help(self) -> str:
        if self.choices:
            return "one of " + ", ".join(str(choice) or "empty" for choice in self.choices)
        if self.kind is bool:
            return "0 or 1"
        if self.kind is str:
            return "text, not empty" if self.needed else "text"
        name = "an integer" if self.kind is int else "a number"
        low, high = (
            None if math.isinf(x) else str(x) if self.kind is int else f"{x:g}"
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
    several: bool = False,
) -> Any:
    """Declares one option. The annotation of its field is its type: str, bool, int, float, or
    `int | str` if `words` are accepted as well.

    default: the default value, or REQUIRED.
    text: meaning and unit, shown by --help.
    low: smallest value of a number.
    high: largest value of a number.
    choices: the only valid values; empty: all values.
    words: words that are valid values in addition, whatever the type.
    several: whether a YAML file may give a list of texts, which are joined by commas.
    """
    extra: dict[str, Any] = {} if default is REQUIRED else {"default": default}
    limits = {"low": low, "high": high, "choices": choices, "words": words, "several": several}
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
    words: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """Reads the options of the command line, and returns an instance of each section.

    Flags are `--section.name=value`. `--config-file FILE` reads a YAML file and may be repeated.
    Later files override earlier ones, and flags override files. A file with the key
    `extends: OTHER` inherits the values of OTHER, a path relative to the file's own folder, and may
    override them. `recipe_file` tells which file such a path names.

    sections: name -> dataclass of `option`s.
    description: shown by --help.
    arguments: the command line; None: this process's.
    ignored: names that are valid in files but not used. One warning lists those that occur.
    unread: required options that may be omitted; they are then empty.
    words: name and meaning of what the command line may contain beside options. These words are
        added to the result as a list under this name. None: there may be none.

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
                    default=None if item.default is MISSING else default_text(item),
                    required=item.default is MISSING,
                )
                for item in fields(section)
            }
        )
    parser = _Parser(description=description, allow_abbrev=False)
    if words:
        parser.add_argument(words[0], nargs="*", metavar=words[0].upper(), help=words[1])
    _check_flags(arguments, sections)
    # Both are emptied for this call: otherwise fastargs reads environment variables and the files
    # named in sys.argv without checks.
    saved, sys.argv = (sys.argv, dict(os.environ)), sys.argv[:1]
    os.environ.clear()
    try:
        config.augment_argparse(parser)
    finally:
        sys.argv = saved[0]
        os.environ.update(saved[1])
    # fastargs' own epilog uses VT100 control codes and mentions environment variables.
    parser.epilog = _options_text(sections, unread)
    given = (parser.parse_intermixed_args if words else parser.parse_args)(arguments)
    found: dict[str, Any] = {words[0]: vars(given).pop(words[0])} if words else {}

    values: dict[str, dict[str, Any]] = {name: {} for name in sections}
    met = []
    for path in given.config_file:
        for name, key, value, file in _read_yaml(path):
            if f"{name}.{key}" in ignored:
                met.append(f"{name}.{key}={value}")
                continue
            values[name][key] = _checked(sections, f"{name}.{key}", value, where=f"in {file}")
    if met:
        warn(f"{', '.join(met)} ignored: ffcv-imagenet's trainer does not use it either")
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
                    f"--{name}.{item.name}=... or set it in the file of --config-file"
                )
    return found | {name: section(**values[name]) for name, section in sections.items()}


def recipe_file(path: str | Path, folder: str | Path = "") -> Path:
    """The file that `path`, relative to `folder`, names. rsb_configs/NAME also names the recipe
    that is installed with the package, if `folder` has no such file."""
    given, installed = Path(folder, path), RECIPES / Path(path).name
    in_recipes = Path(path).parent == Path(RECIPES.name)
    return installed if in_recipes and not given.exists() and installed.exists() else given


def config_files(arguments: Sequence[str]) -> list[str]:
    """The files of --config-file in `arguments`, in their order."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-file", action="append", default=[])
    given = parser.parse_known_args(list(arguments))[0].config_file
    return [str(recipe_file(path)) for path in given]


def as_dict(config: "DataclassInstance") -> dict[str, dict[str, Any]]:
    """Returns {section: {option: value}} of a config, with plain values that JSON can hold."""
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
    """YAML's safe loader, except that a repeated key is an error. The safe loader silently keeps
    the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = [key for key in keys if keys.count(key) > 1]
        if repeated:
            raise yaml.constructor.ConstructorError(
                problem=f"the key '{repeated[0]}' occurs twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


def _options_text(sections: Mapping[str, type[Any]], unread: Collection[str]) -> str:
    lines = [
        "Options, written as --section.name=value, or in a YAML file as 'section:' followed by "
        "'  name: value':",
        "",
        f"--config-file {RECIPES.name}/NAME.yaml is the recipe in {RECIPES} unless the working "
        "directory has this file.",
    ]
    for name, section in sections.items():
        lines += ["", f"{name}: {section.__doc__}"]
        for item in fields(section):
            default = default_text(item)
            if item.default is not MISSING:
                default = f"default {default}"
            elif f"{name}.{item.name}" in unread:
                default = "not read by this command"
            lines.append(
                f"  --{name}.{item.name}  [{default}; {values_text(item)}]\n"
                f"        {item.metadata['text']}"
            )
    return "\n".join(lines)


def default_text(item: Field[Any]) -> str:
    """The default of an option, for people."""
    default = item.default
    if default is MISSING:
        return "required"
    if isinstance(default, float):
        return f"{default:.6g}"
    return str(int(default) if isinstance(default, bool) else default) or "empty"


def values_text(item: Field[Any]) -> str:
    """The valid values of an option, for people."""
    return _checker(item).help()


def _check_flags(arguments: Sequence[str], sections: Mapping[str, type[Any]]) -> None:
    """Raises InputError for an unknown flag, with the nearest valid one. argparse would only print
    "unrecognized arguments"."""
    for argument in arguments:
        name, _, value = argument[2:].partition("=")
        if argument.startswith("--") and name not in ("config-file", "help"):
            _find(sections, name, f"(value {value!r}) on the command line")


def _read_yaml(
    path: str, extended_by: tuple[Path, ...] = ()
) -> Iterator[tuple[str, str, Any, Path]]:
    """Yields (section, key, value, file) for each line of a recipe, first for those of the file
    that it extends.

    extended_by: the files that led to this one.
    """
    file, where = recipe_file(path), f"--config-file={path}"
    if extended_by:
        file = recipe_file(path, extended_by[-1].parent)
        where = f"extends: {path} in {extended_by[-1]}"
    if file.resolve() in [other.resolve() for other in extended_by]:
        raise InputError(f"{where}: the files extend each other in a cycle; remove one `extends:`")
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise InputError(
            f"{where}: cannot be read ({error.strerror}); recipes are in {RECIPES}"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"{where}: not valid YAML ({' '.join(str(error).split())[:160]}); correct the file"
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{where}: contains no sections; write 'section:' followed by '  key: value'"
        )
    content.pop("lineage", None)  # of a run's config.json: no option, see checkpoint.branch
    extended = content.pop("extends", None)
    if extended is not None:
        if not isinstance(extended, str):
            raise InputError(f"{where}: extends={extended!r}: must be the name of one file")
        yield from _read_yaml(extended, (*extended_by, file))
    for name, section in content.items():
        if not isinstance(section, dict):
            raise InputError(
                f"{where}: section '{name}' must contain 'key: value' lines, not {section!r}"
            )
        for key, value in section.items():
            yield str(name), str(key), value, file


def _find(sections: Mapping[str, type[Any]], full_name: str, where: str) -> Field[Any]:
    """Returns the field of `section.option`. Raises InputError, with the nearest valid name, if
    there is none."""
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
    """Returns the value of `section.option`, converted to its type. Raises InputError if it is
    invalid."""
    checker = _checker(_find(sections, full_name, f"(value {value!r}) {where}"))
    try:
        return checker.check(value)
    except ValueError as error:
        valid = "not be empty" if checker.needed and value == "" else f"be {checker.help()}"
        raise InputError(f"{full_name}={value!r} {where}: must {valid}") from error
