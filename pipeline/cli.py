"""The command line of a function: its signature and docstring become flags and their help."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import re
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings

from pipeline.errors import UserError, run, typed
from pipeline.progress import silence_libraries

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the help of a dataclass field

Command = Callable[..., Path | str | None]
T = TypeVar("T")


class Parser(ArgumentParser):
    """jsonargparse's parser without abbreviations, whose errors are one sentence."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a `UserError`: a dataclass's own if there was one, else the parser's message, made readable."""
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        raise UserError(explain(" ".join(message.split()), self.names))

    @property
    def names(self) -> list[str]:
        """The names of all options."""
        return sorted({action.dest for action in self._actions})


def explain(message: str, known: list[str]) -> str:
    """A parser's message in a user's terms; an unknown key gets the nearest known one.

    Args:
        message: The message of jsonargparse, on one line.
        known: The known names.
    """
    invalid = re.match(r'Parser key "([^"]+)": (.*)', message)
    if invalid:
        reason = re.sub(r"<class '([\w.]+)'>", r"\1", invalid.group(2)).replace("typing.Literal", "one of ")
        return f"{invalid.group(1)}: {reason[0].lower()}{reason[1:]}"
    unknown = re.match(r"(?:unrecognized arguments: -*|Group '.*' does not accept option ')([\w.\-]+)", message)
    if unknown is None:
        return message
    return unknown_option(unknown.group(1).replace("-", "_"), known)


def unknown_option(key: str, known: list[str]) -> str:
    """Say that there is no such option, and which known one is nearest to it."""
    last = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key, known, n=1) or [
        last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], last, n=1)
    ]
    return f"unknown option {key!r}" + (f"; did you mean {near[0]!r}?" if near else "; see --help")


def command(function: Command, word: str | None = None) -> int:
    """Run a function with the arguments in `sys.argv`, as the module that Python started; returns the exit status.

    Args:
        function: The function, whose signature is the command line.
        word: The word of `pipeline.__main__` that runs it; None if there is none.
    """
    started = sys.modules["__main__"].__spec__
    module = started.name.removesuffix(".__main__") if started else function.__name__
    return run(lambda: _call(function, sys.argv[1:], typed(word) if word else f"python -m {module}"))


def commands(places: dict[str, str], prog: str, description: str) -> int:
    """Run the function that the first word of `sys.argv` names; returns the exit status.

    Args:
        places: Each function as `package.module:function`, by its word. Only the function that is run is imported,
            inside `run`, so that an interrupted import ends like any other work.
        prog: What the user typed before the word.
        description: One line about the commands.
    """

    def main() -> Path | str | None:
        words = sys.argv[1:]
        if not words or words[0] in ("-h", "--help"):
            print(f"usage: {prog} COMMAND [options]; `{prog} COMMAND --help` lists them\n\n{description}\n")
            for name, place in places.items():
                print(f"  {name:<10} {_summary(_load(place))}")
            return None
        if words[0] not in places:
            near = difflib.get_close_matches(words[0], places, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"unknown command {words[0]!r}{hint} (there are {', '.join(places)})")
        return _call(_load(places[words[0]]), words[1:], f"{prog} {words[0]}")

    return run(main)


def _load(place: str) -> Command:
    module, _, name = place.partition(":")
    function: Command = getattr(importlib.import_module(module), name)
    return function


def _call(function: Command, arguments: list[str], prog: str) -> Path | str | None:
    values = parse(Parser(prog=prog, description=_summary(function)), [function], arguments)
    silence_libraries()
    with contextlib.redirect_stdout(sys.stderr):  # libraries print; stdout is for the summary's path
        return function(**values)


def parse(parser: Parser, signatures: list[Callable[..., Any]], arguments: list[str], skip: Any = ()) -> dict[str, Any]:
    """Read a command line whose flags are the parameters of some functions or fields of some dataclasses.

    Args:
        parser: The parser that gets the flags.
        signatures: Functions and dataclasses with docstrings for their parameters.
        arguments: The words; `--a-b` is `--a_b`, a switch may stand alone, and a list takes several words.
        skip: Parameters that are no flags.

    Returns:
        Values by parameter.
    """
    hints: dict[str, Any] = {}
    for signature in signatures:
        add = parser.add_class_arguments if isinstance(signature, type) else parser.add_function_arguments
        add(signature, as_positional=False, skip=set(skip))
        hints |= typing.get_type_hints(signature)
    values = parser.parse_args(gather_lists(hints, spell_switches(hints, [underscored(word) for word in arguments])))
    return dict(vars(parser.instantiate(values)))


def parse_own(options: type[T], arguments: list[str], prog: str) -> tuple[T, list[str]]:
    """Take a dataclass's flags out of a command line, and leave all other words as they are.

    Args:
        options: The dataclass.
        arguments: The words.
        prog: What the user typed before them.

    Returns:
        The options, and the other words in their order.
    """
    hints = typing.get_type_hints(options)
    flags = {f"--{name}" for name in hints} | {f"--no_{name}" for name, hint in hints.items() if hint is bool}
    own: list[str] = []
    others: list[str] = []
    left = 0  # values that the last flag still takes
    for word in arguments:
        name, equals, _ = underscored(word).partition("=")
        if word.startswith("--"):
            hint = hints.get(name.removeprefix("--"), bool)
            several = len(arguments) if typing.get_origin(hint) is list else 1
            left = 0 if equals or hint is bool else several
            (own if name in flags else others).append(word)
        else:
            (own if left else others).append(word)
            left = max(0, left - 1)
    return options(**parse(Parser(prog=prog), [options], own)), others


def help_of(options: type, prog: str, usage: str) -> str:
    """The help of the flags that `parse_own` takes."""
    parser = Parser(prog=prog, usage=usage)
    parser.add_class_arguments(options, as_positional=False)
    return parser.format_help()


def gather_lists(hints: dict[str, Any], arguments: list[str]) -> list[str]:
    """Let a flag of a `list` parameter take any number of words (`--input a.jpg b.jpg`) and be repeated.

    jsonargparse takes a list as one word of JSON, and a repeated flag replaces the earlier one.
    """
    lists = {f"--{name}" for name, hint in hints.items() if typing.get_origin(hint) is list}
    others: list[str] = []
    given: dict[str, list[str]] = {}
    target = others
    for word in arguments:
        flag, equals, value = word.partition("=")
        if flag in lists:
            target = given.setdefault(flag, [])
            target += [value] if equals else []
            continue
        if word.startswith("--"):
            target = others
        target.append(word)
    return others + [f"{flag}={json.dumps(words)}" for flag, words in given.items()]


def spell_switches(hints: dict[str, Any], arguments: list[str]) -> list[str]:
    """Let a flag of a `bool` parameter stand alone: `--plan` is `--plan=true`, and `--no_plan` is `--plan=false`."""
    spelled = {f"--{name}": f"--{name}=true" for name, hint in hints.items() if hint is bool}
    spelled |= {f"--no_{name}": f"--{name}=false" for name, hint in hints.items() if hint is bool}
    following = [*arguments, "--"][1:]
    return [
        spelled.get(word, word) if after.startswith("--") else word
        for word, after in zip(arguments, following, strict=False)
    ]


def underscored(word: str) -> str:
    """Spell a flag with underscores: `--max-rejects=1` becomes `--max_rejects=1`."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word


def _summary(function: Any) -> str:
    return (function.__doc__ or "").strip().split("\n\n")[0]
