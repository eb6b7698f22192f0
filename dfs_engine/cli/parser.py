"""An argument parser whose errors are one line and name the nearest valid key."""

import argparse
import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from dfs_engine.cli.recipes import recipe_path

set_parsing_settings(docstring_parse_attribute_docstrings=True)

# What jsonargparse says of a flag, of a config file's key, and of a subcommand that it does not know.
_UNKNOWN = re.compile(r"(?:unrecognized arguments: |does not accept option '|invalid choice: ')-*([\w.\-]+)")

_NO_KEYS = ("help", "config", "print_config", "print_shtab")


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of examples; names a flag's default, where it has one, and no Python type."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        has_default = action.option_strings and action.default not in (None, argparse.SUPPRESS, "", (), {})
        return f"{text} (default: %(default)s)" if has_default else text


class Parser(ArgumentParser):
    """jsonargparse's parser with flags for booleans (`--quick` is `--quick true`) and short errors.

    Args:
        description: what --help says first. examples: command lines that it ends with.
    """

    def __init__(self, *args: Any, description: str = "", examples: str = "", **kwargs: Any) -> None:
        super().__init__(
            *args,
            description=textwrap.fill(description, min(120, shutil.get_terminal_size().columns) - 2),
            epilog=f"examples:\n{examples}",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    @property
    def command(self) -> str:
        """How to call it: `dfs bench train`."""
        return self.prog.replace(" [options]", "")

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Its first line is short: one with every flag would fill the screen that a reader sees first."""
        words = [action.dest for action in self._actions if not action.option_strings]
        places = ["COMMAND" if word == "subcommand" else word.upper() for word in words]
        self.usage = " ".join([self.command, *places, "[options]"])
        return super().format_help(*args, **kwargs)

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        added = super().add_class_arguments(*args, **kwargs)
        for action in self._actions:
            if getattr(action, "_typehint", None) is bool:
                action.nargs, action.const = "?", True
        return added

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = re.sub(r'Parser key "([^"]+)":', r"\1:", " ".join(message.split()))
        print(f"{self.command}: error: {text}{self._suggestion(text)}", file=sys.stderr)
        sys.exit(2)

    def _suggestion(self, message: str) -> str:
        found = _UNKNOWN.search(message)
        if found is None:
            return ""
        unknown = found[1]
        if "invalid choice" in message:  # the message lists the subcommands already
            nearest = difflib.get_close_matches(unknown, re.findall(r"'(\w+)'", message.split("choose from")[-1]), n=1)
            return f". Did you mean {nearest[0]}?" if nearest else ""
        names = [name for name in _keys(self) if name not in _NO_KEYS]
        group, _, last = unknown.rpartition(".")
        siblings = [name for name in names if name.rpartition(".")[0] == group]
        # A key of the same last part counts as near: `beta` means `model.beta`.
        nearest = [name for name in names if name.split(".")[-1] == last]
        nearest = nearest or difflib.get_close_matches(unknown, names, n=1)
        hint = f" Did you mean {' or '.join(nearest)}?" if nearest else ""
        return f". Valid here: {', '.join(siblings or names)}.{hint}"


def _keys(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Names of all flags of a parser and of its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from _keys(subparser)
        else:
            yield from (option[2:] for option in action.option_strings if option.startswith("--"))


def normalise(line: Sequence[str]) -> list[str]:
    """Lets a flag be written with dashes, `--batch-size` for `--batch_size`, and a recipe be given by its name alone.

    Raises:
        ValueError: `--config` names neither a file nor a recipe.
    """
    words: list[str] = []
    for word in line:
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            flag = f"--{flag[2:].replace('-', '_')}"
            words.append(f"{flag}={recipe_path(value)}" if equals and flag == "--config" else f"{flag}{equals}{value}")
        else:
            words.append(str(recipe_path(word)) if words and words[-1] == "--config" else word)
    return words
