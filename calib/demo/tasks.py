"""Instruct tasks with exactly checkable answers, deterministic from a seed.

The content of a task (the numbers, the word, the record), not its wording, decides by a hash
whether it is held out, so no held-out question is ever seen in training under other words.

Each family is a function that draws a :class:`Draft`: its content as a key, the prompt and the
answer. Arithmetic, sorting and reversing spell out their steps, because a small model learns a
sequence of look-ups far sooner than a jump.

As in any real text, many an answer can be written in several ways (one heading or another, a name
qualified or not), and each is right. One is the most usual, but less usual than the others
together, and where these agree against it, what is most probable slot by slot is not the most
probable text: until a draft knows which way its text goes, it mixes several, and what is written
token by token is none of them.

``python -m trimode.calib.demo.tasks`` prints examples as JSON lines.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, NamedTuple

import typer

from trimode.errors import UsageError

SPLITS = ("train", "held-out")
HELD_OUT_ONE_IN = 10
WORDING_SHARES = 0.46, 0.27, 0.27
"""Shares of the ways to write an answer."""

NAMES = (
    "Anna",
    "Boris",
    "Clara",
    "David",
    "Elena",
    "Felix",
    "Greta",
    "Hugo",
    "Irene",
    "Jonas",
    "Karin",
    "Leo",
    "Maria",
    "Nils",
    "Olga",
    "Peter",
)
CITIES = (
    "Berlin",
    "Cairo",
    "Dublin",
    "Geneva",
    "Kyoto",
    "Lima",
    "Madrid",
    "Oslo",
    "Paris",
    "Quito",
    "Rome",
    "Tokyo",
    "Vienna",
    "Zagreb",
)
TABLES = ("orders", "items", "books", "cars", "films", "shops", "teams", "trips")
COLUMNS = ("name", "price", "year", "size", "weight", "rating", "stock", "color")
MEASURES = ("price", "year", "size", "weight", "rating", "stock")
GOODS = (
    "apples",
    "beans",
    "corn",
    "dates",
    "eggs",
    "figs",
    "grapes",
    "herbs",
    "kale",
    "lemons",
    "nuts",
    "olives",
    "pears",
    "rice",
)
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
ROMAN_UNITS = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")
ROMAN_TENS = ("", "X", "XX", "XXX", "XL", "L", "LX", "LXX", "LXXX", "XC")
ROMAN_HUNDREDS = ("", "C", "CC", "CCC", "CD", "D", "DC", "DCC", "DCCC", "CM")
OPERATIONS = (
    ("adds", "add", "+"),
    ("subtracts", "sub", "-"),
    ("multiplies by", "mul", "*"),
    ("divides by", "div", "//"),
)


@dataclass(frozen=True)
class Example:
    """Holds one question, and all right answers to it.

    ``answer`` is one of ``answers``, the most usual of which comes first.
    """

    family: str
    prompt: str
    answer: str
    answers: tuple[str, ...]


class Draft(NamedTuple):
    """Holds what a family draws.

    ``key`` holds the content that decides the split, ``answers`` are as in :class:`Example`.
    """

    key: str
    prompt: str
    answers: tuple[str, ...]


def json_record(rng: random.Random) -> Draft:
    """Draw a sentence about a person, and its JSON object."""
    name, age, city = rng.choice(NAMES), rng.randint(18, 89), rng.choice(CITIES)
    prompt = rng.choice(
        (
            f"JSON: {name} is {age} and lives in {city}.",
            f"JSON: {name} from {city} is {age} years old.",
        )
    )
    answers = tuple(
        f'{{"name"{colon}"{name}", "age"{colon}{age}, "city"{colon}"{city}"}}'
        for colon in (": ", " :", "\n:")
    )
    return Draft(f"{name} {age} {city}", prompt, answers)


def sql_query(rng: random.Random) -> Draft:
    """Draw a sentence about a table, and its SELECT statement.

    The sentence names the table before its column or not.
    """
    column, table, measure, bound = (
        rng.choice(COLUMNS),
        rng.choice(TABLES),
        rng.choice(MEASURES),
        rng.randint(2, 99),
    )
    word, sign = rng.choice((("over", ">"), ("under", "<")))
    order, suffix = rng.choice((("", ""), (f", by {measure}", f" ORDER BY {measure}")))
    prompt = f"SQL: {column} of {table} with {measure} {word} {bound}{order}."
    rest = f"{column} FROM {table} WHERE {measure} {sign} {bound}{suffix};"
    answers = tuple(f"SELECT{before}{rest}" for before in (" ", f" {table}.", f"\n{table}."))
    return Draft(f"{column} {table} {measure} {sign} {bound}", prompt, answers)


def python_function(rng: random.Random) -> Draft:
    """Draw a description of a function of one argument, and its Python.

    The description has a name for the result or none.
    """
    number, argument = rng.randint(2, 99), rng.choice("abknxyz")
    verb, stem, sign = rng.choice(OPERATIONS)
    prompt = f"Python: a function of {argument} that {verb} {number}."
    head, value = f"def {stem}_{number}({argument}):\n    ", f"{argument} {sign} {number}"
    first, second = (f"{head}{result} = {value}\n    return {result}" for result in "cd")
    return Draft(f"{argument} {stem} {number}", prompt, (f"{head}return {value}", first, second))


def addition(rng: random.Random) -> Draft:
    """Draw a sum of two three-digit numbers, digit by digit.

    It goes from the right, each line with its carry.
    """
    left, right = rng.randint(100, 999), rng.randint(100, 999)
    lines, carry = [], 0
    for place in (1, 10, 100):
        a, b = left // place % 10, right // place % 10
        total = a + b + carry
        lines.append(f"{a}+{b}+{carry}={total:02d}")
        carry = total // 10
    return Draft(
        f"{left} {right}",
        f"Add {left} and {right}.",
        ("\n".join([*lines, f"Sum: {left + right}"]),),
    )


def reverse_word(rng: random.Random) -> Draft:
    """Draw a made-up word of four to six letters, and reverse it.

    Its letters are numbered, read backwards, and put together, after commas or arrows.
    """
    word = "".join(
        rng.choice("aeiou" if i % 2 else "bdfgklmnprst") for i in range(rng.randint(4, 6))
    )
    numbered = [f"{i}{letter}" for i, letter in enumerate(word, 1)]
    parts = " ".join(numbered), " ".join(reversed(numbered)), word[::-1]
    answers = tuple(separator.join(parts) for separator in (", ", "->", "=>"))
    return Draft(word, rng.choice((f"Reverse {word}.", f"Spell {word} backwards.")), answers)


def sort_numbers(rng: random.Random) -> Draft:
    """Draw three or four two-digit numbers, and sort them.

    No two have the same tens. The smallest is taken out first, and what is left follows the colon.
    """
    tens = rng.sample(range(1, 10), rng.randint(3, 4))
    rest = [ten * 10 + rng.randint(0, 9) for ten in tens]
    prompt, ordered, lines = f"Sort {' '.join(map(str, rest))}.", sorted(rest), []
    for smallest in ordered[:-1]:
        rest = [number for number in rest if number != smallest]
        lines.append(f"{smallest}: {' '.join(map(str, rest))}")
    return Draft(prompt, prompt, ("\n".join([*lines, f"Sorted: {' '.join(map(str, ordered))}"]),))


def date_formats(rng: random.Random) -> Draft:
    """Draw a written date, in ISO 8601 and in the American form."""
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1950, 2049)
    written = rng.choice(
        (f"{day} {MONTHS[month - 1]} {year}", f"{MONTHS[month - 1]} {day}, {year}")
    )
    return Draft(
        f"{year} {month} {day}",
        f"Date: {written}",
        (f"ISO {year}-{month:02d}-{day:02d}, US {month:02d}/{day:02d}/{year}",),
    )


def markdown_table(rng: random.Random) -> Draft:
    """Draw two or three goods with counts, as a Markdown table.

    Its heading is one of several.
    """
    rows = [(name, rng.randint(2, 99)) for name in rng.sample(GOODS, rng.randint(2, 3))]
    key = ", ".join(f"{name} {count}" for name, count in rows)
    body = "".join(f"\n| {name} | {count} |" for name, count in rows)
    answers = tuple(
        f"| {heading} | count |\n|---|---|{body}" for heading in ("item", "good", "food")
    )
    return Draft(key, f"Table: {key}.", answers)


def roman_numeral(rng: random.Random) -> Draft:
    """Draw a number below 1000, as a Roman numeral place by place."""
    number = rng.randint(101, 999)
    places = [(number // 100 * 100, ROMAN_HUNDREDS[number // 100])]
    places += [
        (number // 10 % 10 * 10, ROMAN_TENS[number // 10 % 10]),
        (number % 10, ROMAN_UNITS[number % 10]),
    ]
    kept = [(value, numeral) for value, numeral in places if value]
    steps = [f"{value} = {numeral}" for value, numeral in kept]
    answer = "\n".join([*steps, f"{number} = {''.join(numeral for _, numeral in kept)}"])
    return Draft(str(number), f"Roman numeral for {number}.", (answer,))


FAMILIES: dict[str, Callable[[random.Random], Draft]] = {
    "json": json_record,
    "sql": sql_query,
    "code": python_function,
    "addition": addition,
    "reverse": reverse_word,
    "sort": sort_numbers,
    "date": date_formats,
    "table": markdown_table,
    "roman": roman_numeral,
}


def examples(seed: int, split: str, families: Sequence[str] | None = None) -> Iterator[Example]:
    """Yield examples without end, the families in turn.

    A question may come back, and never crosses from one split to the other.

    Raises:
        UsageError: the split or a family is unknown.
    """
    names = tuple(FAMILIES) if families is None else tuple(families)
    _check_names("split", [split], SPLITS)
    _check_names("family", names, tuple(FAMILIES))
    return _draw(random.Random(f"{seed} {split}"), split, names)


def split_of(family: str, key: str) -> str:
    """Return the split of a task with this content."""
    digest = hashlib.sha256(f"{family} {key}".encode()).digest()
    return SPLITS[int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0]


def _draw(rng: random.Random, split: str, families: Sequence[str]) -> Iterator[Example]:
    while True:
        for family in families:
            draft = FAMILIES[family](rng)
            while split_of(family, draft.key) != split:
                draft = FAMILIES[family](rng)
            (answer,) = rng.choices(draft.answers, WORDING_SHARES[: len(draft.answers)])
            yield Example(family, draft.prompt, answer, draft.answers)


def _check_names(what: str, found: Sequence[str], known: Sequence[str]) -> None:
    for name in found:
        if name not in known:
            raise UsageError(
                f"expected a {what} out of {', '.join(known)}, found {name!r}",
                f"pick one of the {len(known)} that exist",
            )
    if not found:
        raise UsageError(
            f"expected at least one {what}, found none", f"name one of {', '.join(known)}"
        )


def main(
    split: Annotated[str, typer.Option(help=" or ".join(SPLITS))] = "held-out",
    count: Annotated[
        int, typer.Option(min=0, help="How many to print, the families in turn.")
    ] = 10,
    seed: Annotated[int, typer.Option(help="Same seed, same examples.")] = 0,
    family: Annotated[
        list[str] | None,
        typer.Option(help=f"Only this family; may be repeated. {', '.join(FAMILIES)}."),
    ] = None,
) -> None:
    """Print questions and all right answers to each as JSON lines."""
    for example in islice(examples(seed, split, family), count):
        line = {"prompt": example.prompt, "answer": example.answers, "family": example.family}
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    from trimode.calib.demo.console import run_command

    run_command(main)
