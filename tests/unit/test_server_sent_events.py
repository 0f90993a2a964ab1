"""The reader of event streams, by the standard's own examples and however the bytes are cut."""

from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.client import server_sent_events
from jobs.client.server_sent_events import EventReader, ServerSentEvent, StreamUnreadable

STREAM = (
    "\ufeff: a comment\n\n"
    "data: first line\ndata: second, ü\nid: 1\n\n"
    "event: add\rdata:no space\rdata:  two spaces\r\r"
    "id\ndata\n\n"
    "retry: 1500\r\n\r\nretry: soon\nid: a\0b\nunknown: field\nevent: empty\n\n"
    "data: at last\r\n\r\ndata: never finished\n"
).encode()
EVENTS = [
    ServerSentEvent("message", "first line\nsecond, ü", "1"),
    ServerSentEvent("add", "no space\n two spaces", "1"),
    ServerSentEvent("message", "", ""),
    ServerSentEvent("message", "at last", ""),
]


@given(st.lists(st.integers(0, len(STREAM)), max_size=20))
def test_events_are_the_same_wherever_the_bytes_are_cut(cuts: list[int]) -> None:
    reader = EventReader()
    edges = [0, *sorted(cuts), len(STREAM)]
    events = [event for start, end in pairwise(edges) for event in reader.feed(STREAM[start:end])]
    assert events == EVENTS
    assert reader.retry == 1.5


def test_ids_outlast_a_stream() -> None:
    reader = EventReader("7")
    assert list(reader.feed(b"data: x\n\n")) == [ServerSentEvent("message", "x", "7")]
    list(reader.feed(b"id: 8\n"))
    assert reader.last_id == "7", "8 has not come whole"
    list(reader.feed(b"\n"))
    assert reader.last_id == "8"


def test_an_endless_event_is_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_sent_events, "MAX_EVENT", 100)
    for endless in (b"data: " + b"x" * 20, b"data: x\n" * 5):
        reader = EventReader()
        with pytest.raises(StreamUnreadable):
            list(chain.from_iterable(reader.feed(endless) for _ in range(9)))
