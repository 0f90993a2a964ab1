"""Forms as other programs write them, in whatever pieces they arrive."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from email.message import EmailMessage
from email.policy import HTTP
from itertools import pairwise

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import BodyTooLarge, InvalidInput
from web.multipart import MAX_FIELD, MAX_PARTS, FormReader

Fields = list[tuple[str, str | None, bytes]]


async def pieces(body: bytes, cuts: Sequence[int]) -> AsyncIterator[bytes]:
    """The body in pieces, some of them empty, and after a turn of the event loop each."""
    places = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    for begin, end in pairwise(places):
        await asyncio.sleep(0)
        yield body[begin:end]


def read(content_type: str, body: bytes, cuts: Sequence[int] = (), limit: int = 10**6) -> Fields:
    async def collect() -> Fields:
        reader = FormReader(content_type, pieces(body, cuts), limit=limit)
        return [
            (part.name, part.file_name, b"".join([data async for data in part.data()]))
            async for part in reader.parts()
        ]

    return asyncio.run(collect())


BOUNDARY = "bound"
TYPE = f'multipart/form-data; boundary="{BOUNDARY}"'
# Contents that look like the boundary, or begin as it does.
contents = st.lists(
    st.one_of(
        st.sampled_from(
            [b"\r\n--bound", b"\r\n--boun", b"\r\n", b"--bound--", b"\r", b"\n--", b"-"]
        ),
        st.binary(max_size=40),
    ),
    max_size=8,
).map(b"".join)
names = st.text(
    st.characters(codec="utf-8", exclude_characters='"\\', exclude_categories=["Cc"]),
    min_size=1,
    max_size=20,
)
cuts = st.lists(st.integers(0, 10_000), max_size=30)


@given(st.lists(st.tuples(names, st.none() | names, contents), max_size=6), cuts)
def test_forms_by_httpx(fields: Fields, cuts: list[int]) -> None:
    fields = [f for f in fields if b"\r\n--bound" not in b"\r\n" + f[2]]
    request = httpx.Request(
        "POST",
        "http://example.org",
        headers={"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"},
        files=[(name, (file_name, content)) for name, file_name, content in fields],
    )
    body = request.read() or b"--bound--\r\n"
    assert read(request.headers["content-type"], body, cuts) == fields


@given(
    st.lists(st.tuples(st.from_regex(r"\A[a-z]{1,9}\Z"), st.just("f.mp3"), st.binary(max_size=300)),
             min_size=1, max_size=5),
    cuts,
)  # fmt: skip
def test_forms_by_email(fields: Fields, cuts: list[int]) -> None:
    """The standard library's encoder: other headers, another order, a boundary of its own."""
    form = EmailMessage(policy=HTTP)
    for name, file_name, content in fields:
        part = EmailMessage(policy=HTTP)
        part["Content-Type"] = "application/octet-stream"
        part["X-Other"] = "header"
        part["Content-Disposition"] = f'form-data; name="{name}"; filename="{file_name}"'
        part.set_payload(content.hex())
        form.attach(part)
    form["Content-Type"] = "multipart/form-data"
    whole = form.as_bytes()
    body = whole.partition(b"\r\n\r\n")[2]
    expected = [(name, file_name, content.hex().encode()) for name, file_name, content in fields]
    assert read(f'multipart/form-data; boundary="{form.get_boundary()}"', body, cuts) == expected


@given(st.binary(max_size=300), cuts)
def test_anything_else_is_refused_or_read(body: bytes, cuts: list[int]) -> None:
    try:
        read(TYPE, body, cuts)
    except InvalidInput as exc:
        field = exc.field
    else:
        field = "body"
    assert field == "body"


def form(*parts: tuple[str, bytes], end: bytes = b"--bound--\r\n") -> bytes:
    disposition = 'Content-Disposition: form-data; name="{}"\r\n\r\n'
    heads = [b"--bound\r\n" + disposition.format(name).encode() for name, _ in parts]
    return b"".join(h + part[1] + b"\r\n" for h, part in zip(heads, parts, strict=True)) + end


@pytest.mark.parametrize("cut", range(1, len(form(("a", b"xyz"), ("b", b"1"))) - 4))
def test_what_ends_too_early_is_refused(cut: int) -> None:
    body = form(("a", b"xyz"), ("b", b"1"))
    with pytest.raises(InvalidInput, match="before its last boundary"):
        read(TYPE, body[:cut])


def test_what_follows_the_last_boundary_does_not_count() -> None:
    assert read(TYPE, form(("a", b"1")) + b"epilogue\r\n--bound\r\n") == [("a", None, b"1")]


def test_parts_that_nobody_reads_are_skipped() -> None:
    async def names() -> list[str]:
        body = pieces(form(("a", b"x" * 1000), ("b", b"1"), ("c", b"2")), range(0, 1000, 7))
        return [part.name async for part in FormReader(TYPE, body, limit=10**6).parts()]

    assert asyncio.run(names()) == ["a", "b", "c"]


def test_a_file_passes_through_as_it_comes() -> None:
    """No more than a piece is held: each is given on before the next is asked for."""

    async def pass_through() -> None:
        given: list[int] = []

        async def body() -> AsyncIterator[bytes]:
            yield b'--bound\r\nContent-Disposition: form-data; name="file"\r\n\r\n'
            for number in range(100):
                given.append(number)
                yield bytes([number]) * 1000
            yield b"\r\n--bound--\r\n"

        async for part in FormReader(TYPE, body(), limit=10**6).parts():
            size = 0
            async for data in part.data():
                size += len(data)
                assert size >= 1000 * (len(given) - 1)
            assert size == 100_000

    asyncio.run(pass_through())


async def text_of_first(body: bytes) -> str:
    async for part in FormReader(TYPE, pieces(body, ()), limit=10**6).parts():
        return await part.text()
    raise AssertionError


def test_limits() -> None:
    with pytest.raises(BodyTooLarge, match="100 bytes"):
        read(TYPE, form(("a", b"x" * 100)), limit=100)
    with pytest.raises(BodyTooLarge):
        read(TYPE, form(("a", b"1"), end=b"--bound--" + b"x" * 2000), limit=1000)
    with pytest.raises(InvalidInput, match=f"more than {MAX_PARTS} parts"):
        read(TYPE, form(*[("a", b"")] * (MAX_PARTS + 1)))
    assert len(read(TYPE, form(*[("a", b"")] * MAX_PARTS))) == MAX_PARTS
    longest = form(("a", b"x" * MAX_FIELD))
    assert len(asyncio.run(text_of_first(longest))) == MAX_FIELD
    with pytest.raises(InvalidInput, match="a: is longer"):
        asyncio.run(text_of_first(form(("a", b"x" * (MAX_FIELD + 1)))))
    with pytest.raises(InvalidInput, match="header size"):
        read(TYPE, form(("a" * 5000, b"")))
    with pytest.raises(InvalidInput, match="header count"):
        read(TYPE, b"--bound\r\n" + b"X: y\r\n" * 9 + b"\r\n\r\n--bound--\r\n")


def test_what_is_no_form() -> None:
    for content_type in (
        "", "application/json", "multipart/form-data", "multipart/form-data; boundary=",
        f"multipart/form-data; boundary={'x' * 71}", "multipart/mixed; boundary=bound",
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match="multipart/form-data"):
            read(content_type, form(("a", b"1")))
    with pytest.raises(InvalidInput, match="no name"):
        read(TYPE, b"--bound\r\nContent-Type: text/plain\r\n\r\n1\r\n--bound--\r\n")
    with pytest.raises(InvalidInput, match="a: is not UTF-8"):
        asyncio.run(text_of_first(form(("a", b"\xff"))))
    assert read(TYPE, b"--bound--\r\n") == []
