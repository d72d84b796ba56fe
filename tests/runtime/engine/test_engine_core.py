"""The engine's core on a session whose tokens come from the K/V slots themselves."""

from __future__ import annotations

import pytest
from engine_driver import Driver
from fake_session import BLOCK, MASK, MAX_LENGTH, FakeSession

from trimode.runtime.engine import core

MODES = ("ar", "diffusion", "linear_spec", "auto")


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(7 * seed + 13 * i + i * i) % 127 for i in range(length)]


@pytest.mark.parametrize("mode", MODES)
def test_a_text_is_its_single_run(mode: str) -> None:
    driver = Driver()
    driver.submit(prompt(5), mode, max_new_tokens=40)
    driver.submit(prompt(90), mode, max_new_tokens=40)
    driver.submit(prompt(1), mode, max_new_tokens=1)
    driver.run()
    driver.check_texts()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("left", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("is_live", [True, False])
def test_hits_that_leave_so_many_tokens(mode: str, left: int, is_live: bool) -> None:
    """From a row at work and from host memory; also where the prefix ends at a capacity."""
    for length in (17, 31, 32, 33, 64):
        driver = Driver()
        first = driver.submit(prompt(length), "ar", max_new_tokens=30 if is_live else 1)
        if is_live:
            while not first.handle.token_ids:
                driver.turn()
        else:
            driver.run()
        text = [*prompt(length), *prompt(left, seed=9)]
        hit = driver.submit(text, mode, max_new_tokens=20)
        driver.run()
        driver.check_texts()
        assert hit.handle.usage.cached_tokens == length


@pytest.mark.parametrize("mode", MODES)
def test_the_whole_prompt_was_seen(mode: str) -> None:
    driver = Driver()
    for _ in range(2):
        driver.submit(prompt(40), mode, max_new_tokens=20)
        driver.run()
    driver.check_texts()
    assert driver.asked[1].handle.usage.cached_tokens == 39


@pytest.mark.parametrize("mode", MODES)
def test_prompts_that_contain_the_mask_token(mode: str) -> None:
    """Cold and hot, as the last token, and a whole block of it."""
    text = [3, MASK, 5, *[MASK] * BLOCK, 7, MASK]
    driver = Driver()
    for cut in (len(text), len(text), len(text) - 1, 2):
        driver.submit(text[:cut], mode, max_new_tokens=25)
        driver.run()
    driver.check_texts()
    assert [one.handle.usage.cached_tokens for one in driver.asked] == [0, 12, 11, 1]


def test_salts_are_not_crossed() -> None:
    driver = Driver()
    for salt in ("a", "b", "a", ""):
        driver.submit(prompt(50), salt=salt)
        driver.run()
    driver.check_texts()
    assert [one.handle.usage.cached_tokens for one in driver.asked] == [0, 0, 49, 0]


def test_one_prefix_serves_all_modes() -> None:
    for first in MODES:
        driver = Driver()
        driver.submit(prompt(30), first, max_new_tokens=20)
        driver.run()
        answer = driver.asked[0].handle.token_ids
        for mode in MODES:
            driver.submit([*prompt(30), *answer, 5, 6], mode, max_new_tokens=20)
            driver.run()
            assert driver.asked[-1].handle.usage.cached_tokens >= 30 + len(answer) - 1
        driver.check_texts()


def test_many_at_once_read_a_shared_prompt_once() -> None:
    driver = Driver()
    for seed in range(4):
        driver.submit([*prompt(100), 1 + seed], max_new_tokens=6)
    driver.run()
    driver.check_texts()
    assert [one.handle.usage.cached_tokens for one in driver.asked] == [0, 100, 100, 100]


def test_short_rows_do_not_share_a_long_cache() -> None:
    driver = Driver()
    driver.submit(prompt(200), max_new_tokens=30)
    for seed in range(3):
        driver.submit(prompt(5, seed), max_new_tokens=20)
    driver.run()
    driver.check_texts()
    sizes = {capacity for graph_name, rows, tokens, capacity in driver.session.log if rows > 1}
    assert sizes == {32}


def test_a_row_moves_up_as_it_grows() -> None:
    driver = Driver()
    driver.submit(prompt(3), "linear_spec", max_new_tokens=MAX_LENGTH - 3)
    driver.run()
    driver.check_texts()
    seen = [capacity for _, _, _, capacity in driver.session.log]
    assert sorted(set(seen)) == [32, 64, 128, 256, 512]
    assert seen == sorted(seen)


def test_order_is_by_priority_then_arrival() -> None:
    driver = Driver(max_rows=1)
    begun: list[int] = []
    for number, priority in enumerate((0, 1, 0, 2)):
        one = driver.submit(prompt(4, number), priority=priority, max_new_tokens=2)
        one.handle.add_done_callback(lambda _, number=number: begun.append(number))  # type: ignore[misc]
    driver.run()
    assert begun == [3, 1, 0, 2]


def test_keys_take_turns() -> None:
    driver = Driver(max_rows=1, is_fair=True)
    ended: list[str] = []
    for key in "aaaabbc":
        one = driver.submit(prompt(4), fair_key=key, max_new_tokens=2)
        one.handle.add_done_callback(lambda _, key=key: ended.append(key))  # type: ignore[misc]
    driver.run()
    assert "".join(ended) == "abcabaa"


def test_a_cancelled_row_is_free_within_a_step() -> None:
    driver = Driver(max_rows=1)
    first = driver.submit(prompt(5), max_new_tokens=200)
    second = driver.submit(prompt(6), max_new_tokens=3)
    while len(first.handle.token_ids) < 5:
        driver.turn()
    seen = first.handle.token_ids
    assert first.handle.cancel()
    assert not first.handle.cancel()
    driver.turn()
    assert [row.handle for row in driver.core.rows] == [second.handle]
    driver.run()
    assert first.handle.token_ids == seen
    driver.check_texts()


def test_late_requests_end() -> None:
    driver = Driver(max_rows=1)
    running = driver.submit(prompt(5), max_new_tokens=200, timeout_s=0.05)
    waiting = driver.submit(prompt(6), timeout_s=0.01)
    while len(running.handle.token_ids) < 3:
        driver.turn()
    driver.run()
    assert 3 <= len(running.handle.token_ids) < 200
    assert [type(one.handle.error).__name__ for one in (running, waiting)] == [
        "RequestTimeoutError"
    ] * 2
    assert waiting.handle.token_ids == []
    driver.check_texts()


class Failing:
    """Raises at the chosen uses."""

    def __init__(self, session: FakeSession, times: set[int], what: str = "") -> None:
        self.count, self.times, self.what = 0, times, what
        session.on_use = self

    def __call__(self, what: str) -> None:
        if self.what and what != self.what:
            return
        self.count += 1
        if self.count in self.times:
            raise MemoryError("no memory")


@pytest.mark.parametrize("mode", MODES)
def test_a_failing_step_leaves_every_row_at_its_last_token(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "MOST_ATTEMPTS", 50)  # every third may be the same row's thrice
    driver = Driver()
    Failing(driver.session, set(range(3, 400, 3)))
    for seed in range(5):
        driver.submit(prompt(10 + 9 * seed, seed), mode, max_new_tokens=20)
    driver.run()
    driver.check_texts()
    assert all(one.handle.error is None for one in driver.asked)
    assert driver.core.counts.failed_steps > 5


@pytest.mark.parametrize("what", ["copy", "export", "import"])
def test_failing_copies_cost_no_token(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "MOST_ATTEMPTS", 50)
    driver = Driver()
    Failing(driver.session, set(range(1, 400, 2)), what)
    for seed in (0, 1, 0, 1, 0, 2):
        driver.submit([*prompt(40, seed), seed], max_new_tokens=40)
        driver.submit([*prompt(40, seed), 5], max_new_tokens=40)
        driver.run()
    driver.check_texts()
    assert all(one.handle.error is None for one in driver.asked)


def test_a_row_that_always_fails_is_given_up_alone() -> None:
    driver = Driver()
    marker = 99

    def fail(what: str) -> None:
        if what == "draft":
            raise MemoryError(marker)

    driver.session.on_use = fail
    bad = driver.submit(prompt(9), "linear_spec")
    good = [driver.submit(prompt(9 + n), "ar", max_new_tokens=30) for n in range(3)]
    driver.run()
    assert type(bad.handle.error).__name__ == "EngineError"
    assert all(one.handle.error is None for one in good)
    assert driver.core.error is None
    driver.check_texts()


def test_an_engine_that_cannot_go_on_says_so() -> None:
    driver = Driver()
    Failing(driver.session, set(range(3, 10_000)))
    for seed in range(6):
        driver.submit(prompt(9 + seed), max_new_tokens=30)
    driver.run()
    assert driver.core.error is not None
    assert all(one.handle.error is not None for one in driver.asked)
    late = driver.submit(prompt(5))
    driver.run()
    assert "has stopped" in str(late.handle.error)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_prompt_is_read_in_parts_while_others_decode(share: float) -> None:
    """In its share of the time, and never so long that a decoding row waits for two parts."""
    driver = Driver(latency_target_s=0.02, prefill_share=share)
    decoding = driver.submit(prompt(4), max_new_tokens=280)
    while len(decoding.handle.token_ids) < 3:
        driver.turn()
    driver.session.log.clear()
    started = driver.session.now
    driver.submit(prompt(120), max_new_tokens=2)
    while driver.core.counts.finished == 0:
        driver.turn()
    took = driver.session.now - started
    reads = [(n, capacity) for _, _, n, capacity in driver.session.log if n > 1]
    assert all(1 + n * capacity / 256 <= 20 or n == 16 for n, capacity in reads)
    steps = "".join("r" if n > 1 else "." for _, _, n, _ in driver.session.log)
    assert "rr" not in steps
    reading = sum(1e-3 * (1 + n * capacity / 256) for n, capacity in reads)
    assert reading / took == pytest.approx(share, abs=0.15)


def test_reading_alone_takes_whole_chunks() -> None:
    driver = Driver()
    driver.submit(prompt(250), max_new_tokens=2)
    driver.run()
    assert [n for _, _, n, _ in driver.session.log] == [250, 1]


def test_no_row_starves() -> None:
    """A lone row in a capacity and a mode of its own goes on among many that come and go."""
    driver = Driver(max_rows=4)
    lone = driver.submit(prompt(150), "linear_spec", max_new_tokens=20)
    last, gaps, number = 0.0, [], 0
    while not lone.handle.done:
        while len(driver.core.rows) + len(driver.core.waiting) < 8:
            number += 1
            driver.submit(prompt(3 + number % 5, number), max_new_tokens=5)
            driver.core.take_in()
        driver.turn()
        if driver.session.log[-1][-1] > 128:
            gaps.append(driver.session.now - last)
            last = driver.session.now
    assert lone.handle.token_ids == lone.expected().token_ids
    assert max(gaps) < 0.2  # its forwards take 9 ms, and four rows share the time


def test_what_is_kept_stays_within_its_budget() -> None:
    driver = Driver(kv_bytes=8 * 100)
    for seed in range(12):
        driver.submit(prompt(30, seed), max_new_tokens=20)
        driver.run()
        assert driver.core.reuse.num_tokens <= 100
    assert driver.core.reuse.num_evicted > 100
    driver.check_texts()
