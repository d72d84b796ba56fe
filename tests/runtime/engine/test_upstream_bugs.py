"""Bugs that other engines have had, put into this one on purpose: the checks must find each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine_driver import Driver
from fake_session import BLOCK, MASK

from trimode.runtime.engine.handle import Handle
from trimode.runtime.engine.prefix_cache import PrefixCache
from trimode.runtime.engine.reuse import Hit, PrefixReuse
from trimode.runtime.engine.row import CacheGroup, EngineRow
from trimode.runtime.engine.steps import Steps
from trimode.runtime.engine.turns import Turns

Patch = pytest.MonkeyPatch


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(7 * seed + 13 * i + i * i) % 127 for i in range(length)]


def turns(driver: Driver, *texts: tuple[list[int], str], **options: Any) -> None:
    for ids, mode in texts:
        driver.submit(ids, mode, **{"max_new_tokens": 20, **options})
        driver.run()
    driver.check_texts()


def mask_token_in_a_prompt(patch: Patch) -> Callable[[Driver], None]:
    """From SGLang #39592: slots that hold the mask token are taken for masked ones."""
    found = PrefixReuse.find

    def find(self: PrefixReuse, request: Any, rows: Any) -> Hit:
        hit = found(self, request, rows)
        masks = request.ids.count(MASK)
        return Hit(min(hit.length + masks, len(request.ids) - 1), hit.row, hit.match)

    patch.setattr(PrefixReuse, "find", find)
    text = [3, MASK, 5, *[MASK] * BLOCK, 7, 8, 9]
    return lambda driver: turns(driver, (text[:6], "ar"), (text, "diffusion"))


def a_hit_that_leaves_one_token(patch: Patch) -> Callable[[Driver], None]:
    """From vLLM #49495: what is left is one token, and nothing reads it."""
    found = PrefixReuse.find

    def find(self: PrefixReuse, request: Any, rows: Any) -> Hit:
        hit = found(self, request, rows)
        left = len(request.ids) - hit.length
        return Hit(hit.length + (left == 1), hit.row, hit.match)

    patch.setattr(PrefixReuse, "find", find)
    return lambda driver: turns(driver, (prompt(20), "ar"), (prompt(20), "linear_spec"))


def a_prefix_as_long_as_a_block(patch: Patch) -> Callable[[Driver], None]:
    """From SGLang #22819: K/V are wrong where the prefix ends with a block."""
    brought = PrefixReuse.bring

    def bring(self: PrefixReuse, hit: Hit, row: EngineRow) -> None:
        if hit.length % BLOCK or not hit.row:
            brought(self, hit, row)

    patch.setattr(PrefixReuse, "bring", bring)

    def live(driver: Driver) -> None:
        for length in range(BLOCK - 1, BLOCK + 2):
            first = driver.submit(prompt(length), max_new_tokens=20)
            while not first.handle.token_ids:
                driver.turn()
            driver.submit([*prompt(length), 5, 6], max_new_tokens=20)
            driver.run()
        driver.check_texts()

    return live


def more_cached_than_there_are(patch: Patch) -> Callable[[Driver], None]:
    """From SGLang #35270, #25972: shared tokens are counted twice."""
    begin = Handle.begin
    patch.setattr(Handle, "begin", lambda self, cached: begin(self, 2 * cached))
    return lambda driver: turns(driver, (prompt(20), "ar"), (prompt(20), "ar"))


def drafts_are_kept(patch: Patch) -> Callable[[Driver], None]:
    """From vLLM #43559, #54360: what a drafter wrote is kept as if a causal graph had."""
    ends = property(lambda self: min(len(self.sequence.tokens), self.sequence.cached_length + 3))
    patch.setattr(EngineRow, "stored_length", ends)

    def talk(driver: Driver) -> None:
        for number in range(4):
            one = driver.submit(prompt(10, number), "linear_spec", max_new_tokens=30)
            while len(one.handle.token_ids) < 9:
                driver.turn()
            one.handle.cancel()
            driver.run()
            turns(driver, ([*prompt(10, number), *one.handle.token_ids, 4], "ar"))

    return talk


def hits_are_lost(patch: Patch) -> Callable[[Driver], None]:
    """From vLLM #54360: speculation loses hits, and nobody sees."""
    patch.setattr(PrefixReuse, "keep", lambda *_: None)

    def talk(driver: Driver) -> None:
        turns(driver, (prompt(20), "linear_spec"), ([*prompt(20), 4], "linear_spec"))
        assert driver.asked[1].handle.usage.cached_tokens == 20

    return talk


def stale_outputs_after_a_failure(patch: Patch) -> Callable[[Driver], None]:
    """From vLLM #28558, #30916, #20247: older outputs are taken for a failed step's."""
    run, last = Steps._outputs, [()]

    def outputs(self: Steps, *what: Any) -> Any:
        try:
            last[0] = run(self, *what)
        except MemoryError:
            if not last[0]:
                raise
        return last[0]

    patch.setattr(Steps, "_outputs", outputs)

    def failing(driver: Driver) -> None:
        calls = iter(range(10_000))

        def use(what: str) -> None:
            if next(calls) % 5 == 4:
                raise MemoryError

        driver.session.on_use = use
        turns(driver, (prompt(9), "ar"))

    return failing


def a_second_release(patch: Patch) -> Callable[[Driver], None]:
    """From SGLang #12224: a place is given back twice, and two texts get it."""

    def free(self: CacheGroup, row: EngineRow) -> None:
        self.rows[row.place] = None

    def take(self: CacheGroup, row: EngineRow, place: int) -> None:
        self.rows[place], row.group, row.place = row, self, place

    patch.setattr(CacheGroup, "free", free)
    patch.setattr(CacheGroup, "take", take)

    def twice(driver: Driver) -> None:
        first = driver.submit(prompt(5), max_new_tokens=30)
        driver.submit(prompt(6), max_new_tokens=30)
        driver.turn()
        row = next(row for row in driver.core.rows if row.handle is first.handle)
        assert row.group is not None
        row.group.free(row)
        driver.turn()

    return twice


def a_zombie(patch: Patch) -> Callable[[Driver], None]:
    """From SGLang #36552: who is gone is still served."""
    patch.setattr(Handle, "done", property(lambda self: self._result is not None))

    def vanish(driver: Driver) -> None:
        one = driver.submit(prompt(5), max_new_tokens=100)
        while len(one.handle.token_ids) < 3:
            driver.turn()
        one.handle.cancel()
        driver.turn()
        assert driver.core.rows == []

    return vanish


def delivered_after_the_end(patch: Patch) -> Callable[[Driver], None]:
    """From SGLang #36552: tokens come after the end."""

    def deliver(self: Handle, token_ids: list[int]) -> None:
        self._pieces.append(token_ids)

    patch.setattr(Handle, "deliver", deliver)

    def late(driver: Driver) -> None:
        one = driver.submit(prompt(5), max_new_tokens=100)

        def use(what: str) -> None:  # it is cancelled while a forward of it runs
            if len(one.handle.token_ids) == 3:
                one.handle.cancel()

        driver.session.on_use = use
        while not one.handle.done:
            driver.core.turn()
        assert len(one.handle.token_ids) == 3

    return late


def reading_is_starved(patch: Patch) -> Callable[[Driver], None]:
    """From SGLang #36855, onnxruntime-genai: decoding always comes first."""
    plan = Turns.plan

    def decode_first(self: Turns, rows: Any) -> Any:
        return plan(self, [row for row in rows if not row.is_reading] or rows)

    patch.setattr(Turns, "plan", decode_first)

    def busy(driver: Driver) -> None:
        first = driver.submit(prompt(4), max_new_tokens=250)
        while len(first.handle.token_ids) < 3:
            driver.turn()
        second = driver.submit(prompt(60), max_new_tokens=2)
        while not second.handle.done:
            driver.turn()
        assert not first.handle.done

    return busy


def salts_collide(patch: Patch) -> Callable[[Driver], None]:
    """From vLLM #44701: names of different kinds end up as one key."""
    match, insert = PrefixCache.match, PrefixCache.insert
    patch.setattr(PrefixCache, "match", lambda self, _, tokens: match(self, "x", tokens))
    patch.setattr(PrefixCache, "insert", lambda self, _, *rest: insert(self, "x", *rest))

    def two(driver: Driver) -> None:
        for salt in ("a", "b"):
            driver.submit(prompt(20), salt=salt)
            driver.run()
        assert driver.asked[1].handle.usage.cached_tokens == 0

    return two


def hashes_collide(patch: Patch) -> Callable[[Driver], None]:
    """From vLLM GHSA-rm76-4mrf-v9r8: texts of one hash are taken for the same."""
    from trimode.runtime.engine import prefix_cache, reuse

    def by_sum(first: Any, second: Any) -> int:
        length = min(len(first), len(second))
        return length if sum(first[:length]) % 7 == sum(second[:length]) % 7 else 0

    patch.setattr(prefix_cache, "common_prefix", by_sum)
    patch.setattr(reuse, "common_prefix", by_sum)
    return lambda driver: turns(driver, ([5, 1, 2, 3], "ar"), ([5, 3, 2, 1, 9], "ar"))


def a_donor_is_read_too_late(patch: Patch) -> Callable[[Driver], None]:
    """From vLLM #41190: a text gets what its donor's place holds by then."""
    brought = PrefixReuse.bring

    def bring(self: PrefixReuse, hit: Hit, row: EngineRow) -> None:
        if hit.row is not None and hit.row.group is not None:
            hit.row.group.cache.slots[hit.row.place, : hit.length] += 1  # type: ignore[attr-defined]
        brought(self, hit, row)

    patch.setattr(PrefixReuse, "bring", bring)

    def live(driver: Driver) -> None:
        first = driver.submit(prompt(12), max_new_tokens=30)
        while len(first.handle.token_ids) < 3:
            driver.turn()
        driver.submit([*prompt(12), 4], max_new_tokens=10)
        driver.run()
        driver.check_texts()

    return live


def turns_miss(patch: Patch) -> Callable[[Driver], None]:
    """From mlc-llm #2897: the next turn of a conversation finds nothing."""
    patch.setattr(EngineRow, "stored_length", property(lambda self: len(self.request.ids) // 2))

    def talk(driver: Driver) -> None:
        ids, cached, total = prompt(30), 0, 0
        for turn in range(5):
            one = driver.submit(ids, "linear_spec", max_new_tokens=12)
            driver.run()
            if turn:
                cached += one.handle.usage.cached_tokens
                total += len(ids)
            ids = [*ids, *one.handle.token_ids, 5, 6, 7]
        assert cached > 0.9 * total

    return talk


BUGS = (
    mask_token_in_a_prompt,
    a_hit_that_leaves_one_token,
    a_prefix_as_long_as_a_block,
    more_cached_than_there_are,
    drafts_are_kept,
    hits_are_lost,
    stale_outputs_after_a_failure,
    a_second_release,
    a_zombie,
    delivered_after_the_end,
    reading_is_starved,
    salts_collide,
    hashes_collide,
    a_donor_is_read_too_late,
    turns_miss,
)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_checks_find_it(bug: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        check = bug(patch)
        with pytest.raises((AssertionError, IndexError, ValueError)):
            check(Driver())


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_same_check_passes_without_it(bug: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        check = bug(patch)
        patch.undo()
        check(Driver())
