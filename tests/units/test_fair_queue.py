"""The queue in front of the database's threads."""

from __future__ import annotations

import threading

from agent_chat.stores.sqlite.fair_queue import FairQueue


def take_all(queue: FairQueue[int]) -> list[int]:
    items = []
    while (entry := queue.get_more()) is not None:
        items.append(entry[1])
        queue.done(entry[0])
    return items


def test_organizations_take_turns_and_each_keeps_its_order() -> None:
    queue = FairQueue[int](1)
    for item in (1, 2, 3):
        queue.put("a", item)
    queue.put("b", 10)
    queue.put("c", 20)
    queue.put("b", 11)
    assert take_all(queue) == [1, 10, 20, 2, 11, 3]


def test_of_several_threads_one_organization_leaves_one_free() -> None:
    queue = FairQueue[int](3)
    for item in (1, 2, 3):
        queue.put("a", item)
    assert [queue.get_more(), queue.get_more(), queue.get_more()] == [("a", 1), ("a", 2), None]
    queue.put("b", 10)
    assert queue.get_more() == ("b", 10)
    queue.done("a")
    assert queue.get_more() == ("a", 3)


def test_threads_end_after_the_last_item() -> None:
    queue = FairQueue[int](2)
    served: list[int] = []

    def serve() -> None:
        while (entry := queue.get()) is not None:
            served.append(entry[1])
            queue.done(entry[0])

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for item in range(100):
        queue.put("a", item)
    for _ in threads:
        queue.end()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert sorted(served) == list(range(100))
    queue.put("a", 1)
    assert queue.drain() == ([1], False)
