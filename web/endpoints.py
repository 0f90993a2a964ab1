"""Endpoints declare what they take and answer; routing, validation and OpenAPI follow from that.

An endpoint is a coroutine whose parameters say what it needs of a request:

- ``request``: the request itself, always first;
- ``user``: a ``Principal``, who must have the endpoint's scope;
- ``query``, ``headers``, ``body``: a pydantic model each, read and checked;
- any other: a part of the path, a ``UUID`` (where none can be read, nothing is found) or a ``str``.

SpecTree and its kind were left alone: they read a body of any size before they check it, pass by
what is not announced as JSON, and answer errors in a form of their own.
"""

import inspect
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NoReturn, TypeVar
from uuid import UUID

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from jobs import logs
from jobs.errors import DeliveryNotFound, EndpointNotFound, InvalidInput, JobNotFound
from web.auth import Principal, Scope, authenticate, require
from web.middleware import allow_body

MAX_BODY = 64 * 1024  # bytes of JSON, unless an endpoint says otherwise

Handler = Callable[..., Awaitable[ASGIApp]]  # a response, or what else answers as one
HandlerT = TypeVar("HandlerT", bound=Handler)
ModelT = TypeVar("ModelT", bound=BaseModel)

_PATH_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")


@dataclass(frozen=True, slots=True)
class Answer:
    """One way in which an endpoint answers: a model as JSON, or other media types."""

    description: str
    model: type[BaseModel] | None = None
    media_types: tuple[str, ...] = ("application/json",)
    headers: Mapping[str, str] = field(default_factory=dict)  # name: description


@dataclass(frozen=True, slots=True)
class ErrorForm:
    """What the errors of some endpoints look like, where that is not problem details."""

    model: type[BaseModel]
    media_type: str
    statuses: Mapping[HTTPStatus, HTTPStatus]  # those of problem details that have others


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a request to ``method`` ``path`` needs, and how it may be answered."""

    method: str
    path: str
    handler: Handler
    tag: str
    scope: Scope | None
    answers: Mapping[HTTPStatus, Answer]
    problems: frozenset[HTTPStatus]
    #: Bytes; None where the handler limits what it reads.
    max_body: int | None
    takes: Mapping[str, Any]
    #: Media type and model of a body that the handler reads by itself, for the documentation.
    raw_body: Mapping[str, type[BaseModel] | None]
    error_form: ErrorForm | None = None
    #: Those of all answers, errors too.
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def path_parameters(self) -> list[str]:
        """Names of the path's variable parts."""
        return _PATH_PARAMETER.findall(self.path)

    def model(self, name: str) -> type[BaseModel] | None:
        """Return the model of ``query``, ``headers`` or ``body``, if the endpoint takes that."""
        return self.takes.get(name)

    async def respond(self, request: Request) -> ASGIApp:
        """Answer a request. Raises what ``web.problems`` answers."""
        arguments: dict[str, Any] = {}
        allow_body(request, self.max_body)
        if self.headers:
            request.state.response_headers.update(self.headers)
        if "user" in self.takes:
            arguments["user"] = await authenticate(request)
            if self.scope is not None:
                require(arguments["user"], self.scope)
        for name in self.path_parameters:
            arguments[name] = _path_part(name, request.path_params[name], self.takes[name])
            if name == "job_id":
                logs.bind(job_id=arguments[name])
        if query := self.model("query"):
            arguments["query"] = validate(query, dict(request.query_params))
        if headers := self.model("headers"):
            arguments["headers"] = _validate_headers(headers, request)
        if body := self.model("body"):
            arguments["body"] = validate(body, parse_json(await request.body()))
        return await self.handler(request, **arguments)


class Endpoints:
    """The endpoints of one module, in the order in which they are matched.

    ``headers`` are those of all answers, errors too.
    """

    def __init__(
        self,
        tag: str,
        *,
        error_form: ErrorForm | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._tag = tag
        self._error_form = error_form
        self._headers = headers or {}
        self.all: list[Endpoint] = []

    def __call__(  # noqa: PLR0913 - a declaration, by name
        self,
        method: str,
        path: str,
        *,
        answers: Mapping[HTTPStatus, Answer],
        scope: Scope | None = None,
        problems: tuple[HTTPStatus, ...] = (),
        max_body: int | None = MAX_BODY,
        raw_body: Mapping[str, type[BaseModel] | None] | None = None,
    ) -> Callable[[HandlerT], HandlerT]:
        """Declare the decorated coroutine as the endpoint of ``method`` ``path``.

        ``problems``: statuses beside those that follow from what the endpoint takes. ``GET``
        answers ``HEAD`` as well, unless the path has an endpoint for that.
        """

        def declare(handler: HandlerT) -> HandlerT:
            takes = dict(inspect.get_annotations(handler, eval_str=True))
            del takes["return"], takes["request"]
            self.all.append(
                Endpoint(
                    method, path, handler, self._tag, scope, answers,
                    frozenset(problems) | _usual_problems(path, takes, raw_body), max_body, takes,
                    raw_body or {}, self._error_form, self._headers,
                )
            )  # fmt: skip
            return handler

        return declare


def routes(endpoints: Iterable[Endpoint]) -> list[Route]:
    """Return one route for each path, so that 405 names all methods that it has."""
    paths: dict[str, dict[str, Endpoint]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method] = endpoint
    return [Route(path, _respond(by), methods=list(by)) for path, by in paths.items()]


def _respond(by_method: Mapping[str, Endpoint]) -> Callable[[Request], Awaitable[ASGIApp]]:
    async def respond(request: Request) -> ASGIApp:
        endpoint = by_method.get(request.method) or by_method["GET"]  # which answers HEAD, too
        return await endpoint.respond(request)

    return respond


def _usual_problems(path: str, takes: Mapping[str, Any], raw_body: object) -> frozenset[HTTPStatus]:
    usual = {HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS}
    if "user" in takes:
        usual |= {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.UNPROCESSABLE_ENTITY}
    if takes.keys() & {"query", "headers", "body"} or raw_body:
        usual |= {HTTPStatus.UNPROCESSABLE_ENTITY}
    if "body" in takes or raw_body:
        usual |= {HTTPStatus.REQUEST_ENTITY_TOO_LARGE}
    if _PATH_PARAMETER.search(path):
        usual |= {HTTPStatus.NOT_FOUND}
    return frozenset(usual)


#: What is not found where a part of the path is no id.
_NOT_FOUND = {"endpoint_id": EndpointNotFound, "delivery_id": DeliveryNotFound}


def _path_part(name: str, value: str, kind: type) -> UUID | str:
    if kind is not UUID:
        return value
    try:
        return UUID(value)
    except ValueError:
        raise _NOT_FOUND.get(name, JobNotFound) from None


def parse_json(body: bytes) -> Any:
    """Return a body's JSON. Raises ``InvalidInput``, also for NaN and Infinity."""
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        raise InvalidInput("body: is not JSON; send an object as UTF-8", field="body") from exc


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def validate(model: type[ModelT], data: Any, *, within: str = "") -> ModelT:
    """Return ``data`` as a model. Raises ``InvalidInput`` that names the first unusable field."""
    try:
        return model.model_validate(data)
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_input=False)[0]
        where = _field_path((within, *error["loc"])) or "body"
        message = _PLAIN.get(error["type"]) or error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
            message += f"; there are {', '.join(_names(model))}"
        raise InvalidInput(f"{where}: {message}", field=where) from exc


# What pydantic says in words that only those understand who write Python.
_PLAIN = {
    "dict_type": "must be a JSON object",
    "extra_forbidden": "is unknown here",
    "list_type": "must be a JSON array",
    "missing": "is missing",
    "model_attributes_type": "must be a JSON object",
    "model_type": "must be a JSON object",
}


def _names(model: type[BaseModel]) -> list[str]:
    """Return the names that a model's fields have in requests."""
    return sorted(info.alias or name for name, info in model.model_fields.items())


def _field_path(parts: tuple[str | int, ...]) -> str:
    """Return ``jobs[3].options`` for ``("jobs", 3, "options")``."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part:
            path += f".{part}" if path else part
    return path[:200]


def _validate_headers(model: type[ModelT], request: Request) -> ModelT:
    names = [info.alias or name for name, info in model.model_fields.items()]
    return validate(model, {n: request.headers[n] for n in names if n in request.headers})


__all__ = [
    "Answer",
    "Endpoint",
    "Endpoints",
    "Principal",
    "Scope",
    "parse_json",
    "routes",
    "validate",
]
