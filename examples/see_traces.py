"""See traces without installing anything: receive spans, and print each trace as a tree.

    python -m examples.see_traces [spans.jsonl [4318]]
    OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 pgscribe dev        # in another terminal

It takes what OpenTelemetry's exporters send over HTTP, appends each span to the file as a line of
JSON and, on Ctrl-C, prints what it has.
"""

import argparse
import gzip
import json
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

Span = dict[str, Any]


def read_spans(body: bytes) -> Iterator[Span]:
    """Yield the spans of an export request. Times are in seconds since the epoch."""
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        about = _attributes(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield {
                    "trace_id": span.trace_id.hex(),
                    "span_id": span.span_id.hex(),
                    "parent": span.parent_span_id.hex() or None,
                    "links": [link.span_id.hex() for link in span.links],
                    "name": span.name,
                    "service": about.get("service.name"),
                    "start": span.start_time_unix_nano / 1e9,
                    "end": span.end_time_unix_nano / 1e9,
                    "failed": span.status.code == span.status.STATUS_CODE_ERROR,
                    "attributes": _attributes(span.attributes),
                    "events": [event.name for event in span.events],
                }


def _attributes(pairs: Sequence[Any]) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@contextmanager
def receiving(file: Path, port: int = 0) -> Iterator[str]:
    """Append each span that comes to a file; yield the URL to send them to."""
    writing = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            with writing, file.open("a", encoding="utf-8") as lines:
                lines.writelines(json.dumps(span) + "\n" for span in read_spans(body))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def load(file: Path) -> list[Span]:
    """Return the spans of a file, in the order in which they began."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return sorted(map(json.loads, lines), key=lambda span: (span["start"], -span["end"]))


def trees(spans: Sequence[Span]) -> Iterator[str]:
    """Yield a line for each span, each trace as a tree: when it began, and how long it took."""
    children = defaultdict(list)
    known = {span["span_id"] for span in spans}
    for span in spans:
        children[span["parent"] if span["parent"] in known else None].append(span)
    for root in children[None]:
        yield f"trace {root['trace_id']}"
        yield from _branch(root, children, root["start"], "")
        yield ""


def _branch(
    span: Span, children: dict[str | None, list[Span]], begin: float, indent: str
) -> Iterator[str]:
    name = indent + span["name"]
    times = f"{span['start'] - begin:8.3f} s {span['end'] - span['start']:8.3f} s"
    failed = f"  {span['attributes'].get('error.type')}" if span["failed"] else ""
    yield f"  {name:32}{times}  {span['service']}{failed}"
    for child in children[span["span_id"]]:
        yield from _branch(child, children, begin, indent + "  ")


def main() -> None:
    """Receive until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=Path("spans.jsonl"))
    parser.add_argument("port", nargs="?", type=int, default=4318)
    given = parser.parse_args()
    file: Path = given.file
    with receiving(file, given.port) as url:
        print(f"Waiting for spans at {url}; Ctrl-C prints them.", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()
    print("\n".join(trees(load(file))))


if __name__ == "__main__":
    main()
