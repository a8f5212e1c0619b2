"""Command-line options, with error messages of one line."""

import argparse
import dataclasses
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from tinyldm.config import brief, meant, unknown
from tinyldm.files import shown
from tinyldm.options import kind_of, options_of, problem

NO_OPTION = "\0"  # before a word that looks like one


class Parser(argparse.ArgumentParser):
    """Argument parser that reports errors in one line with the nearest name, not the whole usage.

    module: has `add_arguments(parser)` and `run(options)`, imported once its command is called, so
    that the others need not wait for it.
    """

    def __init__(self, *args: object, module: str | None = None, **options: object):
        super().__init__(*args, allow_abbrev=False, **options)
        self.module = module

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Add the arguments of the command before they are parsed."""
        if self.module:
            command = importlib.import_module(self.module)
            self.module = None
            command.add_arguments(self)
            self.set_defaults(run=command.run, parser=self)
            return self._in_any_order(args, namespace)
        return super().parse_known_args(args, namespace)

    def _in_any_order(self, args, namespace):
        """Parse options before, between and after words; what follows a "--" is no option."""
        if "--" in args:
            at = args.index("--")
            words = [NO_OPTION + word if word.startswith("-") else word for word in args[at + 1 :]]
            args = [*args[:at], *words]
        found, extra = self.parse_known_intermixed_args(args, namespace)
        for name, value in vars(found).items():
            if isinstance(value, str):
                setattr(found, name, value.removeprefix(NO_OPTION))
        return found, [word.removeprefix(NO_OPTION) for word in extra]

    def error(self, message: str) -> NoReturn:
        """Print the message on one line and exit with code 2."""
        message = re.sub(r"^argument ", "", message)
        if choice := re.match(r"COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message = unknown(choice[1], re.findall(r"[a-z]+", choice[2]))
        if message.endswith("expected one argument"):
            option = message.partition(":")[0].split("/")[-1]
            message += f" (one that begins with a dash follows an equals sign: {option}=-5)"
        print(f"tinyldm: {shown(message)}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)

    def refuse(self, word: str) -> NoReturn:
        """Report an argument that is not expected, with the nearest known option."""
        if not word.startswith("-"):
            hint = "; a PROMPT of several words needs quotes" if "sample" in self.prog else ""
            self.error(f"unexpected {brief(word)}{hint}")
        options = [name for action in self._actions for name in action.option_strings]
        name = word.partition("=")[0]
        if name in options:  # all that follows a "--" is no option
            self.error(f"unexpected {name} behind --; options go before it")
        self.error(f"unknown option {brief(name)}{meant(name, options)}")


def one_of(choices: Iterable) -> Callable[[str], str | int]:
    """Return the type of an argument that is one of these words or integers."""
    by_text = {str(choice): choice for choice in choices}

    def parse(text):
        if text not in by_text:
            raise argparse.ArgumentTypeError(unknown(text, by_text))
        return by_text[text]

    return parse


def size(text: str) -> tuple[int, int]:
    """Parse S or HEIGHTxWIDTH into (height, width)."""
    found = re.fullmatch(r"(-?[0-9]{1,5})(?:[x×](-?[0-9]{1,5}))?", text.lower())
    if not found:
        raise argparse.ArgumentTypeError(f"expected S or HEIGHTxWIDTH, found {brief(text)}")
    return int(found[1]), int(found[2] or found[1])


def add_options(parser: argparse.ArgumentParser, cls: type, names: Iterable[str] = ()) -> None:
    """Add the options of a dataclass to a parser, or those of `names`, under their groups.

    An option that is left out is None, so its default is stated in one place alone.
    """
    groups = {group.title: group for group in parser._action_groups}
    for name, field in options_of(cls).items():
        if names and name not in names:
            continue
        title = field.metadata["group"]
        if title and title not in groups:
            groups[title] = parser.add_argument_group(title)
        target = groups[title] if title else parser
        kind = {"action": "store_true", "default": None}
        if kind_of(field)[0] is not bool:
            kind = {"type": _type_of(field), "metavar": field.metadata["metavar"]}
        text = field.metadata["help"]
        if field.metadata["choices"] and field.metadata["metavar"] is None:
            kind["metavar"] = name.upper()
        target.add_argument(f"--{name.replace('_', '-')}", help=text + _default_text(field), **kind)


def _type_of(field):
    kind, _ = kind_of(field)
    if kind is object:  # one integer or two
        return size

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = text
        if problem(field, value):
            raise argparse.ArgumentTypeError(problem(field, text))  # as it was typed
        return value

    return parse


def _default_text(field):
    default, text = field.default, field.metadata["default_text"]
    if text is None and default is not dataclasses.MISSING and not isinstance(default, bool):
        text = f"{default:g}" if isinstance(default, float) else default
    return "" if text is None else f" (default: {text})"


def chosen(options: argparse.Namespace, *classes: type) -> dict[str, object]:
    """Return {name: value} of the options of these dataclasses that were given."""
    names = [name for cls in classes for name in options_of(cls)]
    return {name: value for name in names if (value := getattr(options, name, None)) is not None}


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device, which all commands that compute have."""
    parser.add_argument(
        "--device", type=one_of(("cpu", "cuda")), default="cpu",
        help="where to compute, cpu or cuda (default: cpu)",
    )  # fmt: skip


def say(line: str) -> None:
    """Print lines for the person at the terminal; only results go to stdout.

    What a terminal would act upon, as in a file's name, is escaped.
    """
    print("\n".join(map(shown, line.split("\n"))), file=sys.stderr, flush=True)
