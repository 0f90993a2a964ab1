"""Which of several forms a client would rather have (RFC 9110), and what it calls the file."""

import re
from collections.abc import Iterable, Iterator
from urllib.parse import quote

_UNSAFE = re.compile(r"[^A-Za-z0-9 ._()+,@=-]")


def choose(accept: str, offered: Iterable[str]) -> str | None:
    """Return the media type that an ``Accept`` header prefers; of equals, the first offered.

    None where it takes none of them. An empty header takes all.
    """
    ranges = list(_ranges(accept)) or [("*/*", 1.0)]
    best, best_quality = None, 0.0
    for media_type in offered:
        quality = _quality(media_type, ranges)
        if quality > best_quality:
            best, best_quality = media_type, quality
    return best


def _ranges(accept: str) -> Iterator[tuple[str, float]]:
    for part in accept.lower().split(","):
        media_range, *parameters = (text.strip() for text in part.split(";"))
        if media_range:
            values = [p.removeprefix("q=") for p in parameters if p.startswith("q=")]
            yield media_range, _number(values[0]) if values else 1.0


def _number(text: str) -> float:
    """Return a quality; what is none counts as 0."""
    return float(text) if re.fullmatch(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?", text) else 0.0


def _quality(media_type: str, ranges: Iterable[tuple[str, float]]) -> float:
    """Return what the most specific range that fits says."""
    family = media_type.partition("/")[0] + "/*"
    known = dict(ranges)
    return next((known[r] for r in (media_type, family, "*/*") if r in known), 0.0)


def attachment(name: str) -> str:
    """Return a ``Content-Disposition`` that offers a file under a name, whatever is in it.

    Clients that know RFC 5987 take the second, exact form.
    """
    plain = _UNSAFE.sub("_", name)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
