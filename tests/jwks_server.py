"""An endpoint for signing keys, as Supabase Auth has one, on a real socket; it can misbehave."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

PATH = "/auth/v1/.well-known/jwks.json"
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


class SigningKey:
    """A key pair with an id."""

    def __init__(self, private: PrivateKey, algorithm: str, **said: Any) -> None:
        self.id = str(uuid4())
        self.private = private
        self.algorithm = algorithm
        self._said = said

    @property
    def jwk(self) -> dict[str, Any]:
        """The public half, as the endpoint shows it."""
        public = self.private.public_key()
        if isinstance(public, ec.EllipticCurvePublicKey):
            shown = ECAlgorithm.to_jwk(public, as_dict=True)
        else:
            shown = RSAAlgorithm.to_jwk(public, as_dict=True)
        shown |= {"kid": self.id, "use": "sig", "alg": self.algorithm, "key_ops": ["verify"]}
        return {name: value for name, value in (shown | self._said).items() if value is not None}

    def sign(self, claims: dict[str, Any], **headers: Any) -> str:
        return jwt.encode(claims, self.private, self.algorithm, {"kid": self.id} | headers)


def ec_key(curve: ec.EllipticCurve | None = None, **said: Any) -> SigningKey:
    return SigningKey(ec.generate_private_key(curve or ec.SECP256R1()), "ES256", **said)


def rsa_key(bits: int = 2048, **said: Any) -> SigningKey:
    return SigningKey(rsa.generate_private_key(65537, bits), "RS256", **said)


class JwksServer:
    """``keys`` are shown unless ``body`` replaces the document. ``gate``: answers wait for it."""

    def __init__(self) -> None:
        self.keys: list[SigningKey] = []
        self.body: bytes | None = None
        self.status = 200
        self.headers: dict[str, str] = {}
        self.paths: list[str] = []
        self.asked = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.url = ""

    def document(self) -> bytes:
        if self.body is not None:
            return self.body
        return json.dumps({"keys": [key.jwk for key in self.keys]}).encode()


@contextmanager
def serve() -> Iterator[JwksServer]:
    state = JwksServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.paths.append(self.path)
            state.asked.set()
            state.gate.wait()
            try:
                body = state.document()
                own_date = "Date" in state.headers
                (self.send_response_only if own_date else self.send_response)(state.status)
                for name, value in state.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                pass  # the client has gone away

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        state.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()
