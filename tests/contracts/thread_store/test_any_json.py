"""JSON that the API accepts is returned as it was stored: not one number, key or order differs."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from agent_chat.stores.contracts import Store
from agent_chat.stores.models import NESTING, JSONObject, Principal, ToolCall
from tests.support.samples import WORKER, completed, exactly, new_message, new_principal, new_thread, turn

ODD_KEYS = [
    "",
    "_id",
    "$set",
    "$ref",
    "$id",
    "$db",
    "$literal",
    "a.b",
    ".",
    "$",
    "nul\x00key",
    "🗝",
    "metadata_json",
    "n",
]
NUMBERS = st.integers() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text() | st.sampled_from([-0.0, 1.0, 1e308, 2**63, -(2**63), 2**31])
KEYS = st.text() | st.sampled_from(ODD_KEYS)


def nested(levels: int) -> JSONObject:
    value: object = 1
    for level in range(levels):
        value = [value] if level % 2 else {"": value}
    return {"deep": value}


VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=15
)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=6) | st.integers(1, NESTING - 1).map(nested)


@pytest.mark.timeout(120)
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(objects=st.tuples(OBJECTS, OBJECTS, OBJECTS, OBJECTS))
async def test_any_json_is_returned_as_it_was_stored(store: Store, objects: tuple[JSONObject, ...]) -> None:
    """In the metadata of threads and messages, and in arguments and results of tool calls."""
    principal: Principal = new_principal()
    of_thread, of_message, arguments, result = objects
    thread = (await store.create(principal, new_thread(principal, metadata=of_thread))).thread
    question, answer = turn(thread.id)
    posted = await store.claim(principal, replace(question, metadata=of_message), answer, worker=WORKER)
    running = posted.answer or answer
    calls = [ToolCall("look", arguments, result, None, running.created_at, None), ToolCall("look", {}, None, "No.")]
    final = replace(completed(running), tool_calls=calls)
    await store.checkpoint(principal, running.id, worker=WORKER, partial=final)
    record = await store.find_record(principal, running.id)
    assert record is not None
    assert exactly(record.partial) == exactly(final)
    await store.finish(principal, final)
    await store.append_message(principal, new_message(thread.id, role="system"))
    stored = await store.get(principal, thread.id)
    assert exactly(stored.metadata) == exactly(of_thread)
    assert exactly(stored.messages[0]) == exactly(posted.message)
    assert exactly(posted.message.metadata) == exactly(of_message)
    assert exactly(stored.messages[1]) == exactly(final)
