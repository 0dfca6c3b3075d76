"""The measure of memory itself: it sees what was held and given back, and forgets what was before it."""

from tests.support.peak_memory import Peak

MB = 2**20


def hold(megabytes: int) -> int:
    return len(b"x" * (megabytes * MB))


def test_what_was_held_for_a_moment_is_seen() -> None:
    peak = Peak()
    hold(60)
    assert 55 * MB < peak.grown() < 70 * MB


def test_what_was_held_before_is_forgotten() -> None:
    hold(120)
    peak = Peak()
    hold(30)
    assert 25 * MB < peak.grown() < 40 * MB
