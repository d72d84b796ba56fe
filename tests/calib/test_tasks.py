from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from itertools import islice, zip_longest

import pytest

from trimode.calib.demo.tasks import FAMILIES, SPLITS, WORDING_SHARES, Example, examples
from trimode.errors import UsageError

NUMERALS = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def check_json(prompt: str, answer: str) -> None:
    record = json.loads(answer)
    match = re.fullmatch(
        r"JSON: (\w+) is (\d+) and lives in (\w+)\.|JSON: (\w+) from (\w+) is (\d+) years old\.",
        prompt,
    )
    assert match is not None
    name, age, city, other_name, other_city, other_age = match.groups()
    assert record == {
        "name": name or other_name,
        "age": int(age or other_age),
        "city": city or other_city,
    }
    assert answer in [json.dumps(record).replace(": ", colon) for colon in (": ", " :", "\n:")]


def check_sql(prompt: str, answer: str) -> None:
    match = re.fullmatch(
        r"SQL: (\w+) of (\w+) with (\w+) (over|under) (\d+)(?:, by (\w+))?\.", prompt
    )
    assert match is not None
    column, table, measure, word, bound, order = match.groups()
    expected = (
        f"SELECT {column} FROM {table} WHERE {measure} {'>' if word == 'over' else '<'} {bound}"
    )
    expected += f" ORDER BY {order};" if order else ";"
    assert answer in [
        expected.replace(" ", before, 1) for before in (" ", f" {table}.", f"\n{table}.")
    ]


def check_code(prompt: str, answer: str) -> None:
    match = re.fullmatch(
        r"Python: a function of (\w) that (adds|subtracts|multiplies by|divides by) (\d+)\.", prompt
    )
    assert match is not None
    argument, verb, number = match[1], match[2], int(match[3])
    scope: dict[str, Callable[[int], int]] = {}
    exec(answer, scope)
    function = next(value for name, value in scope.items() if name != "__builtins__")
    assert function.__code__.co_varnames in ((argument,), (argument, "c"), (argument, "d"))
    for value in (-7, 0, 1000):
        results = {
            "adds": value + number,
            "subtracts": value - number,
            "multiplies by": value * number,
            "divides by": value // number,
        }
        assert function(value) == results[verb]


def check_addition(prompt: str, answer: str) -> None:
    left, right = numbers(prompt)
    *steps, last = answer.split("\n")
    assert last == f"Sum: {left + right}"
    carry = 0
    for place, step in enumerate(steps):
        a, b, carried, total = numbers(step)
        assert (a, b, carried) == (left // 10**place % 10, right // 10**place % 10, carry)
        assert a + b + carried == total
        carry = total // 10
    assert len(steps) == 3


def check_reverse(prompt: str, answer: str) -> None:
    match = re.fullmatch(r"Reverse (\w+)\.|Spell (\w+) backwards\.", prompt)
    assert match is not None
    word = match[1] or match[2]
    forwards, backwards, reversed_word = re.split(", |->|=>", answer)
    assert reversed_word == "".join(reversed(word))
    assert forwards == " ".join(f"{i + 1}{word[i]}" for i in range(len(word)))
    assert backwards.split() == forwards.split()[::-1]


def check_sort(prompt: str, answer: str) -> None:
    left = numbers(prompt)
    *steps, last = answer.split("\n")
    assert last == f"Sorted: {' '.join(str(n) for n in sorted(left))}"
    for step in steps:
        smallest, *rest = numbers(step)
        assert smallest == min(left)
        left.remove(smallest)
        assert rest == left
    assert len(left) == 1


def check_date(prompt: str, answer: str) -> None:
    written = prompt.removeprefix("Date: ")
    date = datetime.strptime(written, "%B %d, %Y" if "," in written else "%d %B %Y").date()
    assert answer == f"ISO {date.isoformat()}, US {date:%m/%d/%Y}"


def check_table(prompt: str, answer: str) -> None:
    header, rule, *rows = answer.split("\n")
    assert header in [f"| {heading} | count |" for heading in ("item", "good", "food")]
    assert rule == "|---|---|"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert ", ".join(" ".join(row) for row in cells) == prompt.removeprefix("Table: ").removesuffix(
        "."
    )


def check_roman(prompt: str, answer: str) -> None:
    (number,) = numbers(prompt)
    values = dict(line.split(" = ") for line in answer.split("\n"))
    for written, numeral in values.items():
        digits = [NUMERALS[c] for c in numeral]
        total = sum(-a if a < b else a for a, b in zip(digits, [*digits[1:], 0], strict=True))
        assert total == int(written)
        assert not re.search(r"IIII|XXXX|CCCC|VV|LL|DD", numeral)
    *parts, last = values
    assert int(last) == number == sum(map(int, parts))
    assert values[last] == "".join(values[part] for part in parts)


CHECKS = {
    "json": check_json,
    "sql": check_sql,
    "code": check_code,
    "addition": check_addition,
    "reverse": check_reverse,
    "sort": check_sort,
    "date": check_date,
    "table": check_table,
    "roman": check_roman,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_right(family: str) -> None:
    for split in SPLITS:
        for example in islice(examples(7, split, [family]), 100):
            assert example.family == family
            assert example.answer in example.answers
            for answer in example.answers:
                CHECKS[family](example.prompt, answer)


def test_families_with_several_wordings() -> None:
    found = {family: len(next(examples(0, "train", [family])).answers) for family in FAMILIES}
    assert {family for family, count in found.items() if count == 1} == {
        "addition",
        "sort",
        "date",
        "roman",
    }


@pytest.mark.parametrize("family", ["json", "sql", "code", "reverse", "table"])
def test_the_most_usual_wording_is_not_the_most_usual_slot_by_slot(family: str) -> None:
    """What a drafter has to learn to see through."""
    drawn = list(islice(examples(7, "train", [family]), 2000))
    for example in drawn:
        assert len(set(example.answers)) == 3
        slots = zip_longest(*example.answers)
        likeliest = [
            max(
                slot,
                key=lambda c: sum(
                    share for share, other in zip(WORDING_SHARES, slot, strict=True) if other == c
                ),
            )
            for slot in slots
        ]
        assert "".join(filter(None, likeliest)) != example.answers[0]
    counts = Counter(example.answers.index(example.answer) for example in drawn)
    assert [counts[i] / 2000 for i in range(3)] == pytest.approx(WORDING_SHARES, abs=0.05)


def content(example: Example) -> tuple[str, str]:
    """A question without its wording. The answer holds all of it, except where the smallest number
    stood, and an ordering is wording.
    """
    if example.family == "sort":
        return example.family, example.prompt
    return example.family, example.answers[0].partition(" ORDER BY")[0].rstrip(";")


def test_no_held_out_content_is_ever_trained_on() -> None:
    train = {content(e) for e in islice(examples(1, "train"), 9000)}
    held_out = {content(e) for e in islice(examples(2, "held-out"), 3000)}
    assert not train & held_out
    assert len(held_out) > 1000


def test_the_share_that_is_held_out_is_near_one_tenth_of_the_roman_numerals() -> None:
    held_out = {e.prompt for e in islice(examples(3, "held-out", ["roman"]), 3000)}
    assert 60 < len(held_out) < 120


def test_examples_depend_on_nothing_but_seed_and_split() -> None:
    first = list(islice(examples(5, "train"), 50))
    assert first == list(islice(examples(5, "train"), 50))
    assert first != list(islice(examples(6, "train"), 50))
    assert first != list(islice(examples(5, "held-out"), 50))
    assert [e.family for e in first[:9]] == list(FAMILIES)


@pytest.mark.parametrize(
    ("split", "families"), [("test", None), ("train", ["json", "poetry"]), ("train", [])]
)
def test_unknown_names_are_refused(split: str, families: list[str] | None) -> None:
    with pytest.raises(UsageError, match="expected"):
        next(examples(0, split, families))


def test_the_command_prints_json_lines() -> None:
    command = [
        sys.executable,
        "-m",
        "trimode.calib.demo.tasks",
        "--split",
        "held-out",
        "--count",
        "4",
        "--seed",
        "3",
        "--family",
        "sort",
    ]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    expected = list(islice(examples(3, "held-out", ["sort"]), 4))
    assert [json.loads(line) for line in lines] == [
        {"prompt": e.prompt, "answer": list(e.answers), "family": "sort"} for e in expected
    ]


def test_the_command_refuses_an_unknown_family() -> None:
    command = [sys.executable, "-m", "trimode.calib.demo.tasks", "--family", "poetry"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "hint:" in done.stderr
