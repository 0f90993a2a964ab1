"""The public keys of tokens, from a real endpoint that rotates, breaks, hangs and floods."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from jobs.errors import SigningKeysUnavailable
from tests.jwks_server import PATH, JwksServer, SigningKey, ec_key, rsa_key, serve
from web import jwks
from web.jwks import SigningKeys

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def server() -> Iterator[JwksServer]:
    with serve() as running:
        running.keys = [ec_key()]
        yield running


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def keys(server: JwksServer, clock: Clock) -> AsyncIterator[SigningKeys]:
    signing_keys = SigningKeys(server.url + PATH, clock=clock)
    yield signing_keys
    await signing_keys.aclose()


async def test_keys_are_fetched_once_for_ten_minutes(
    keys: SigningKeys, server: JwksServer, clock: Clock
) -> None:
    for _ in range(3):
        key = await keys.get(server.keys[0].id)
        assert key is not None
        assert key.algorithm_name == "ES256"
    assert server.paths == [PATH]
    clock.now += jwks.LIFETIME - 1
    await keys.get(server.keys[0].id)
    assert len(server.paths) == 1
    clock.now += 1
    await keys.get(server.keys[0].id)
    assert len(server.paths) == 2


async def test_a_new_key_is_fetched_and_a_removed_one_forgotten(
    keys: SigningKeys, server: JwksServer, clock: Clock
) -> None:
    (old,) = server.keys
    assert await keys.get(old.id)
    new = rsa_key()
    server.keys = [new]
    assert await keys.get(new.id) is None, "a fetch so soon after the last one"
    clock.now += jwks.COOLDOWN
    key = await keys.get(new.id)
    assert key is not None
    assert key.algorithm_name == "RS256"
    assert await keys.get(old.id) is None


async def test_a_flood_of_unknown_ids_is_one_fetch(
    keys: SigningKeys, server: JwksServer, clock: Clock
) -> None:
    new = ec_key()
    assert await keys.get(server.keys[0].id)
    clock.now += jwks.COOLDOWN
    server.keys.append(new)
    server.gate.clear()
    unknown = [asyncio.create_task(keys.get(f"../{number}")) for number in range(500)]
    known = asyncio.create_task(keys.get(server.keys[0].id))
    fresh = asyncio.create_task(keys.get(new.id))
    assert await known, "a known key waits for nobody"
    assert not fresh.done()
    server.gate.set()
    assert set(await asyncio.gather(*unknown)) == {None}
    assert await fresh
    for number in range(500):
        assert await keys.get(str(number)) is None
    assert server.paths == [PATH, PATH]


async def test_old_keys_are_good_for_a_day_while_the_endpoint_is_away(
    keys: SigningKeys, server: JwksServer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    (key,) = server.keys
    assert await keys.get(key.id)
    server.status = 500
    clock.now += jwks.LIFETIME
    assert await keys.get(key.id)
    assert await keys.get(key.id)
    assert len(server.paths) == 2, "one try per cooldown"
    assert "can't be fetched" in caplog.text
    clock.now += jwks.MAX_AGE - jwks.LIFETIME
    with pytest.raises(SigningKeysUnavailable):
        await keys.get(key.id)
    server.status = 200
    clock.now += jwks.COOLDOWN
    assert await keys.get(key.id)


async def test_a_known_key_does_not_wait_for_a_slow_endpoint(
    keys: SigningKeys, server: JwksServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks, "PATIENCE", 0.01)
    (key,) = server.keys
    assert await keys.get(key.id)
    server.gate.clear()
    clock.now += jwks.LIFETIME
    assert await keys.get(key.id)
    assert server.asked.is_set()


async def test_no_keys_ever_is_no_verdict(clock: Clock) -> None:
    with serve() as server:
        url = server.url
    keys = SigningKeys(url + PATH, clock=clock)
    with pytest.raises(SigningKeysUnavailable):
        await keys.get("any")
    await keys.aclose()


async def test_a_silent_endpoint_is_given_up(server: JwksServer, clock: Clock) -> None:
    server.gate.clear()
    keys = SigningKeys(server.url + PATH, timeout=0.1, clock=clock)
    with pytest.raises(SigningKeysUnavailable):
        await keys.get("any")
    assert await asyncio.to_thread(server.asked.wait, 20)
    await keys.aclose()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"keys": {}}',
        b"\xff",
        b"[" * 5000,
        b'{"keys": [' + b" " * jwks.MAX_BYTES + b"]}",
    ],
)
async def test_answers_that_are_no_key_set_change_nothing(
    keys: SigningKeys, server: JwksServer, clock: Clock, body: bytes
) -> None:
    (key,) = server.keys
    server.body = body
    with pytest.raises(SigningKeysUnavailable):
        await keys.get(key.id)
    server.body = None
    clock.now += jwks.COOLDOWN
    assert await keys.get(key.id)
    server.body = body
    clock.now += jwks.COOLDOWN
    assert await keys.get("other") is None
    assert await keys.get(key.id)


async def test_redirects_are_not_followed(keys: SigningKeys, server: JwksServer) -> None:
    server.status = 302
    server.headers = {"Location": "/elsewhere"}
    with pytest.raises(SigningKeysUnavailable):
        await keys.get(server.keys[0].id)
    assert server.paths == [PATH]


async def test_an_empty_set_is_one(keys: SigningKeys, server: JwksServer) -> None:
    server.keys = []
    assert await keys.get("any") is None


@pytest.mark.parametrize(
    ("unusable", "why"),
    [
        ({"use": "enc"}, "not for signatures"),
        ({"key_ops": ["sign"]}, "not for checking"),
        ({"key_ops": 7}, "no list"),
        ({"alg": "HS256"}, "another algorithm"),
        ({"alg": "RS256"}, "another key's algorithm"),
        ({"kty": "oct", "k": "c2VjcmV0", "alg": "HS256", "crv": None}, "a secret"),
        ({"kty": "oct", "k": "c2VjcmV0", "alg": None, "crv": None}, "a secret"),
        ({"kty": ["EC"]}, "no text"),
        ({"kid": 7}, "no text"),
        ({"x": "!"}, "no point"),
        ({"x": "AAAA"}, "not on the curve"),
    ],
)
async def test_unusable_keys_are_passed_over(
    keys: SigningKeys, server: JwksServer, unusable: dict[str, Any], why: str
) -> None:
    key = ec_key(**unusable)
    server.keys.append(key)
    assert await keys.get(key.id) is None, why
    assert await keys.get(server.keys[0].id)


@pytest.mark.parametrize("key", [rsa_key(1024), ec_key(ec.SECP384R1(), alg="ES384")])
async def test_short_keys_and_other_curves_are_passed_over(
    keys: SigningKeys, server: JwksServer, key: SigningKey
) -> None:
    server.body = json.dumps({"keys": [key.jwk, 7, None]}).encode()
    assert await keys.get(key.id) is None


async def test_closing_ends_a_fetch(server: JwksServer, clock: Clock) -> None:
    server.gate.clear()
    keys = SigningKeys(server.url + PATH, clock=clock)
    waiting = asyncio.create_task(keys.get("any"))
    await asyncio.to_thread(server.asked.wait)
    await keys.aclose()
    with pytest.raises(SigningKeysUnavailable):
        await waiting
