"""How a subcommand of `dfs` is described and run: flags into a configuration, its work, and what is printed of it."""

import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from jsonargparse.typing import Path_fc

from dfs_engine.cli.parser import Parser
from dfs_engine.runtime.extras import explained

# Raised for what the user gave; anything else is a defect and keeps its traceback.
_INPUT_ERRORS = (ValueError, TypeError, OSError, ImportError)


@dataclass(frozen=True)
class Command:
    """One subcommand: flags into a configuration, the `run` of the module of that into a result, which is printed."""

    summary: str
    """One line of `dfs --help`."""
    description: str
    """What its own --help teaches first."""
    examples: str
    """What its own --help ends with."""
    config: str = ""
    """Module and class of its configuration, which is imported only when it is called."""
    show: Callable[[Any], Any] = lambda result: result
    """Prints the result, and returns what --json writes of it."""
    places: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """Fields of the configuration that are given without a flag: their type and help; of a list, any number."""
    more_flags: Callable[[Parser], None] | None = None
    """Adds those that are no field of the configuration."""
    run: Callable[["Command", Any, list[str]], int] | None = None
    """(this, parsed flags, command line) -> exit status, of one that does more than that."""
    subcommands: "Mapping[str, Command]" = field(default_factory=dict)
    """Commands of its own, in place of all that."""

    def add_flags(self, parser: Parser, line: list[str]) -> None:
        if self.subcommands:
            add_commands(parser, self.subcommands, line)
            return
        for name, (kind, text) in self.places.items():
            several: dict[str, Any] = {"nargs": "*", "default": []} if get_origin(kind) is list else {}
            parser.add_argument(name, type=get_args(kind)[0] if several else kind, help=text, **several)
        if self.more_flags is not None:
            self.more_flags(parser)
        if self.config:
            parser.add_class_arguments(self.config_class(), skip=set(self.places))
        # Path_fc: a file that can be created; checked before the work, so that no result is lost after it.
        parser.add_argument(
            "--json", type=Path_fc, default=None, metavar="FILE", help="Write the result to FILE as JSON too."
        )

    def config_class(self) -> Any:
        return imported(self.config)

    def config_of(self, values: Any) -> Any:
        return built(self.config_class(), values)

    def __call__(self, values: Any, line: list[str]) -> int:
        if self.subcommands:
            return self.subcommands[values.subcommand](values[values.subcommand], line[1:])
        if self.run is not None:
            return self.run(self, values, line)
        with input_errors(RuntimeError):
            result = importlib.import_module(self.config.split(":")[0]).run(self.config_of(values))
        write_json(values.json, self.show(result))
        return 0 if getattr(result, "ok", True) else 1


def imported(place: str) -> Any:
    """What "module:name" means."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def built(config_class: Any, values: Any, but: Sequence[str] = ()) -> Any:
    """A configuration from parsed flags; fields in `but` have no flag."""
    return config_class(**{item.name: values[item.name] for item in fields(config_class) if item.name not in but})


def add_commands(parser: Parser, commands: Mapping[str, Command], line: list[str]) -> None:
    """Adds all of them, and the flags of the one that `line` calls."""
    subcommands = parser.add_subcommands(title="commands", description=None, metavar="")
    for name, command in commands.items():
        subparser = Parser(description=command.description, examples=command.examples)
        subcommands.add_subcommand(name, subparser, help=command.summary)
        if name in line[:1]:
            with input_errors():
                command.add_flags(subparser, line[1:])


@contextlib.contextmanager
def input_errors(*more: type[Exception]) -> Iterator[None]:
    """Turns an exception about the user's input into one line and exit status 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(explained(error), 2)
    except _INPUT_ERRORS + more as error:
        fail(str(error), 1 if isinstance(error, ChildProcessError) else 2)


def fail(message: str, status: int) -> NoReturn:
    print(f"dfs: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


def write_json(path: Path_fc | None, result: Any) -> None:
    if path is not None:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
