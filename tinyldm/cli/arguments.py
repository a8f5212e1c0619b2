"""Options of the command line that say in one line what is wrong with them."""

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

from tinyldm.config import meant, unknown


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest name, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        message = re.sub(r"^argument ", "", message)
        if choice := re.match(r"COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message = unknown(choice[1], re.findall(r"[a-z]+", choice[2]))
        print(f"tinyldm: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)

    def refuse(self, word: str) -> NoReturn:
        """The same for an argument that nothing has asked for."""
        if not word.startswith("-"):
            hint = "; a PROMPT of several words needs quotes" if "sample" in self.prog else ""
            self.error(f"unexpected {word!r}{hint}")
        options = [name for action in self._actions for name in action.option_strings]
        name = word.partition("=")[0]
        self.error(f"unknown option {name!r}{meant(name, options)}")


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """The type of an option that takes one of these words."""

    def parse(text):
        if text not in names:
            raise argparse.ArgumentTypeError(unknown(text, names))
        return text

    return parse


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """The type of an option that takes a whole number."""
    wanted = f"{least}…{most}" if most else f"≥ {least}"

    def parse(text):
        number = int(text) if re.fullmatch(r"-?[0-9]{1,30}", text) else least - 1
        if number < least or (most and number > most):
            raise argparse.ArgumentTypeError(f"expected a whole number {wanted}, found {text!r}")
        return number

    return parse


def number(least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """The type of an option that takes any number between these."""
    wanted = f" {least:g}…{most:g}" if math.isfinite(least) else ""

    def parse(text):
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and least <= number <= most):
            raise argparse.ArgumentTypeError(f"expected a number{wanted}, found {text!r}")
        return number

    return parse


def size(text: str) -> tuple[int, int]:
    """(height, width) of S or HEIGHTxWIDTH."""
    found = re.fullmatch(r"(-?[0-9]{1,5})(?:[x×](-?[0-9]{1,5}))?", text.lower())
    if not found:
        raise argparse.ArgumentTypeError(f"expected S or HEIGHTxWIDTH, found {text!r}")
    return int(found[1]), int(found[2] or found[1])
