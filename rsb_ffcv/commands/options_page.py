"""The page docs/options.md: every option of both programs, from their declarations.

python -m rsb_ffcv.commands.options_page > docs/options.md
"""

from dataclasses import fields
from typing import Any

from rsb_ffcv.commands import train, write
from rsb_ffcv.config.options import default_text, values_text

HEAD = """# Options

`make docs` writes this page from the declarations in `rsb_ffcv/config`.

An option is written as `--section.name=value`, or in a YAML file as `section:` followed by
`  name: value`. `--help` after a command prints its options.
"""


def page() -> str:
    """The text of the page."""
    lines = [HEAD, "## train_imagenet.py", "", *_commands(train.COMMANDS), ""]
    every = {name: kind for one in train.COMMANDS.values() for name, kind in one.sections.items()}
    for name, section in every.items():
        lines += [f"### {name}", "", f"{str(section.__doc__).capitalize()}.", ""]
        lines += [*_table(name, section), ""]
    lines += ["## write_ffcv.py", "", *_commands(write.COMMANDS), ""]
    for name, command in write.COMMANDS.items():
        lines += [f"### {name}", "", *_table("cfg", command.sections["cfg"]), ""]
    return "\n".join(lines)


def _commands(commands: dict) -> list[str]:
    return [
        "| command | |",
        "|---|---|",
        *(f"| `{name}` | {_cell(command.text)} |" for name, command in commands.items()),
    ]


def _table(section: str, options: type[Any]) -> list[str]:
    rows = [
        f"| `{section}.{item.name}` | {_cell(default_text(item))} | {_cell(values_text(item))} | "
        f"{_cell(item.metadata['text'])} |"
        for item in fields(options)
    ]
    return ["| option | default | values | meaning |", "|---|---|---|---|", *rows]


def _cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(page(), end="")
