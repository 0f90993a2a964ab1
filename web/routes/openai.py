"""OpenAI's API for transcriptions: a durable job behind a request that waits for it.

The job has been committed before the wait begins and goes on if the client goes away. Requests are
repeated by OpenAI's clients after time-outs and broken connections; what says that it is a repeat,
or has an ``Idempotency-Key``, is answered from the first one's job.
"""

import asyncio
import hashlib
import json
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal
from uuid import UUID

import psycopg
from psycopg_pool import PoolTimeout
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from sse_starlette import EventSourceResponse
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from jobs import service, subtitles
from jobs.database import as_user
from jobs.errors import InvalidInput, PgscribeError, UploadTooLarge
from jobs.models import JobStatus, ProcessingJob, Segment, Transcript
from jobs.settings import Settings
from jobs.storage.base import Storage, media_type
from jobs.subtitles import Layout
from modal_functions.transcript import INITIAL_PROMPT_MAX, MODEL_NAME_MAX, is_model_name
from web import languages, openai_errors, waiting
from web.auth import require
from web.endpoints import Answer, Endpoints, ErrorForm, Principal, Scope, validate
from web.multipart import FormReader, Part
from web.routes.jobs import IdempotencyKey
from web.routes.transcripts import MEDIA_TYPES
from web.routes.uploads import MAX_NAME, new_path

Task = Literal["transcribe", "translate"]

endpoint = Endpoints(
    "OpenAI-compatible",
    error_form=ErrorForm(
        openai_errors.OpenAIError, "application/json", openai_errors.STATUSES
    ),
)  # fmt: skip

JOB_HEADER = "Pgscribe-Job-Id"
_FORM_SLACK = 1024 * 1024  # bytes of a form beside its file
_PING = 15  # seconds of silence after which a stream says that it is there

#: Names that users of OpenAI's API have in their programs; the setting says what runs for them.
STANDINS = ("whisper-1", "gpt-transcribe", "gpt-4o-transcribe", "gpt-4o-mini-transcribe")
_STANDIN = re.compile(rf"({'|'.join(STANDINS)})(-\d{{4}}-\d\d-\d\d)?")
MODELS = (
    "tiny", "tiny.en", "base", "base.en", "small", "small.en", "medium", "medium.en",
    "large", "large-v1", "large-v2", "large-v3", "large-v3-turbo", "turbo",
)  # fmt: skip
_WHISPER_CAME_OUT = 1_663_718_400  # 21 September 2022

_UNSUPPORTED = {
    "include": "log probabilities of tokens are not kept",
    "keywords": "put names and words to expect into `prompt`",
    "known_speaker_names": "speakers are not told apart",
    "known_speaker_references": "speakers are not told apart",
    "languages": "name one `language`, or none to detect it",
}
_LISTS = {"timestamp_granularities"}
_IGNORED = {"chunking_strategy"}  # long audio is always split at pauses


# Forms --------------------------------------------------------------------------------------------

_TextFormat = Literal["json", "text", "srt", "verbose_json", "vtt"]


class TranslationForm(BaseModel):
    """A recording to translate into English."""

    model_config = ConfigDict(extra="forbid")

    file: Annotated[str, WithJsonSchema({"type": "string", "format": "binary"})]
    model: str = Field(
        min_length=1,
        max_length=MODEL_NAME_MAX,
        description="whisper-1, or one of Whisper's own names: tiny, base, small, medium, "
        "large-v3, turbo, …",
    )
    prompt: str | None = Field(
        None, max_length=INITIAL_PROMPT_MAX, description="Names and words to expect."
    )
    response_format: _TextFormat = "json"
    temperature: float = Field(
        0, ge=0, le=1, allow_inf_nan=False, description="0 lets the engine raise it where needed."
    )

    @field_validator("response_format", mode="before")
    @classmethod
    def _knows_no_speakers(cls, value: object) -> object:
        if value == "diarized_json":
            raise ValueError("diarized_json: speakers are not told apart; use verbose_json")
        return value

    @field_validator("model")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if "diarize" in name:
            raise ValueError("speakers are not told apart; use another model, such as whisper-1")
        if not is_model_name(name):
            raise ValueError("is no model's name; GET /v1/models lists them")
        return name

    def options(self, settings: Settings) -> dict[str, Any]:
        """Return the options of the job."""
        stands_in = _STANDIN.fullmatch(self.model)
        options: dict[str, Any] = {"model": settings.openai_model if stands_in else self.model}
        if self.prompt:
            options["initial_prompt"] = self.prompt
        if self.temperature:
            options["temperature"] = self.temperature
        return options


class TranscriptionForm(TranslationForm):
    """A recording to transcribe."""

    language: str | None = Field(
        None, max_length=50, description="A code such as en, or english; detected by default."
    )
    timestamp_granularities: list[Literal["word", "segment"]] = Field(
        [],
        alias="timestamp_granularities[]",
        description="What verbose_json has times of; segments by default.",
    )
    stream: bool = Field(
        default=False, description="Send the text as it comes, as server-sent events."
    )
    chunking_strategy: Any = Field(
        None, description="Not used: long audio is always split at pauses."
    )

    @field_validator("language")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        code = languages.code_of(value) if value else None
        if value and code is None:
            raise ValueError("must be a code such as en, of a language that Whisper knows")
        return code

    @model_validator(mode="after")
    def _fits_together(self) -> "TranscriptionForm":
        if self.timestamp_granularities and self.response_format != "verbose_json":
            raise ValueError("timestamp_granularities: needs response_format verbose_json")
        if self.stream and self.response_format not in {"json", "text"}:
            raise ValueError("stream: needs response_format json or text")
        return self

    def options(self, settings: Settings) -> dict[str, Any]:
        """Return the options of the job."""
        options = super().options(settings)
        if self.language:
            options["language"] = self.language
        if "word" in self.timestamp_granularities:
            options["word_timestamps"] = True
        return options


def _as_form(model: type[TranslationForm], fields: Iterable[tuple[str, str]]) -> TranslationForm:
    """Return the form. Raises ``InvalidInput`` that names the field; empty ones count as absent."""
    found: dict[str, Any] = {}
    for name, value in fields:
        plain = name.partition("[")[0]
        if reason := _UNSUPPORTED.get(plain):
            raise InvalidInput(f"{plain}: is not supported: {reason}", field=plain)
        if plain in _LISTS:
            found.setdefault(f"{plain}[]", []).append(value)
        elif value and plain not in _IGNORED:
            found[name] = value
    if "file" not in found:
        raise InvalidInput(
            "file: is missing; send the recording as a part named file", field="file"
        )
    return validate(model, found)


# Uploads ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Received:
    """A request that has come in whole: its file lies in storage."""

    file_path: str
    digest: str
    form: TranslationForm


class _Upload:
    """What comes of a request: its fields, and its file, which goes to storage."""

    def __init__(self, request: Request, user: Principal) -> None:
        self._request = request
        self._user = user
        self._stored: tuple[str, str] | None = None
        self._fields: list[tuple[str, str]] = []

    async def take(self, part: Part) -> None:
        """Take a part. Raises ``InvalidInput``, ``TooLarge``."""
        if part.name != "file":
            self._fields.append((part.name, await part.text()))
        elif self._stored is None:
            self._stored = await _store(self._request, self._user, part)
            self._fields.append(("file", self._stored[0]))
        else:
            raise InvalidInput("file: send one recording at a time", field="file")

    def finish(self, model: type[TranslationForm]) -> _Received:
        """Return the request, now that all parts are here. Raises ``InvalidInput``."""
        form = _as_form(model, self._fields)
        assert self._stored is not None
        return _Received(*self._stored, form)

    async def discard(self) -> None:
        """Delete the file."""
        if self._stored is not None:
            await _storage(self._request).delete(self._stored[0])


async def _receive(request: Request, user: Principal, model: type[TranslationForm]) -> _Received:
    """Read the form and store its file; a request that is refused leaves no file behind."""
    limit = request.app.state.settings.max_upload_bytes + _FORM_SLACK
    _check_announced_size(request, limit)
    reader = FormReader(request.headers.get("content-type", ""), request.stream(), limit=limit)
    upload = _Upload(request, user)
    try:
        async with aclosing(reader.parts()) as parts:
            async for part in parts:
                await upload.take(part)
        received = upload.finish(model)
        await _check_connected(request)
    except BaseException:
        await upload.discard()
        raise
    return received


async def _check_connected(request: Request) -> None:
    """Make no job for a client that is gone: it was told nothing, and may send it all again."""
    if await request.is_disconnected():
        raise ClientDisconnect


def _check_announced_size(request: Request, limit: int) -> None:
    """Refuse what will be too large before its bytes are sent."""
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise UploadTooLarge(f"file: {announced} bytes; the limit is {limit}", limit=limit)


def _storage(request: Request) -> Storage:
    storage: Storage = request.app.state.storage
    return storage


async def _store(request: Request, user: Principal, part: Part) -> tuple[str, str]:
    """Store a file and return its path and the SHA-256 of its bytes."""
    sha256 = hashlib.sha256()

    async def hashed() -> AsyncIterator[bytes]:
        async for data in part.data():
            sha256.update(data)
            yield data

    file_path = new_path(request, user, _file_name(part.file_name))
    content_type = media_type(file_path, part.content_type)
    try:
        await _storage(request).save(file_path, hashed(), content_type)
    except InvalidInput as exc:
        raise InvalidInput(f"file: {exc}", field=exc.field or "file") from exc
    return file_path, sha256.hexdigest()


def _file_name(name: str | None) -> str:
    """Return a name that storage can have, as near to the given one as that allows."""
    base = PurePosixPath((name or "").replace("\\", "/")).name
    kept = "".join(char if char.isprintable() else "_" for char in base)
    stem, dot, extension = kept.rpartition(".")
    if dot and stem and len(extension) <= 10:  # noqa: PLR2004 - as long as extensions are
        room = MAX_NAME - len(f".{extension}".encode())
        kept = f"{stem.encode()[:room].decode(errors='ignore')}.{extension}"
    kept = kept.encode()[:MAX_NAME].decode(errors="ignore")
    return kept if kept.strip(". ") else "audio"


async def _submit(
    request: Request, user: Principal, received: _Received, task: Task, key: str | None
) -> UUID:
    """Submit the job, or find that of the request that this one repeats."""
    options = received.form.options(request.app.state.settings) | {"task": task}
    content = json.dumps([received.digest, options], sort_keys=True)
    repeatable = service.Repeatable(
        fingerprint=hashlib.sha256(content.encode()).hexdigest(), key=key,
        is_repeat=request.headers.get("x-stainless-retry-count", "0") not in {"", "0"},
    )  # fmt: skip
    storage = _storage(request)
    try:
        async with as_user(request.app.state.pool, user.claims) as conn:
            job_id, is_new = await service.submit_once(
                conn, received.file_path, options, repeatable
            )
    except Exception as exc:
        if not _may_have_been_committed(exc):
            await storage.delete(received.file_path)
        raise
    if not is_new:
        await storage.delete(received.file_path)
    return job_id


def _may_have_been_committed(exc: Exception) -> bool:
    return isinstance(exc, psycopg.OperationalError) and not isinstance(exc, PoolTimeout)


# Answers ------------------------------------------------------------------------------------------


class Usage(BaseModel):
    """What was transcribed."""

    type: Literal["duration"] = "duration"
    seconds: int


class TextAnswer(BaseModel):
    """The text alone."""

    text: str
    usage: Usage


class VerboseSegment(BaseModel):
    """A segment; what is not kept of the decoding is 0 or empty."""

    id: int
    seek: int = Field(default=0, description="Not kept: always 0.")
    start: float
    end: float
    text: str
    tokens: list[int] = Field(default=[], description="Not kept: always empty.")
    temperature: float = Field(description="The one that was asked for.")
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class VerboseWord(BaseModel):
    """A word with its punctuation."""

    word: str
    start: float
    end: float


class VerboseAnswer(BaseModel):
    """The text with times."""

    task: Task
    language: str = Field(description="The language's name, `english`.")
    duration: float
    text: str
    segments: list[VerboseSegment] | None = None
    words: list[VerboseWord] | None = None
    usage: Usage


class TranscriptionAnswer(RootModel[VerboseAnswer | TextAnswer]):
    """A transcription as ``response_format`` asks for."""


async def _answer(
    request: Request, user: Principal, job: ProcessingJob, form: TranslationForm
) -> Response:
    transcript = _transcript(job)
    if transcript is None:
        return openai_errors.respond(*_failure(job), {"x-should-retry": "false"})
    if form.response_format == "json":
        return _json(TextAnswer(text=transcript.text, usage=_usage(transcript)))
    if form.response_format == "verbose_json":
        return _json(_verbose(transcript, job, form))
    name = "txt" if form.response_format == "text" else form.response_format
    text = await request.app.state.renderer.run(
        user.user_id, lambda: subtitles.FORMATS[name](transcript, Layout())
    )
    return Response(text, headers={"Content-Type": f"{MEDIA_TYPES[name]}; charset=utf-8"})


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


def _transcript(job: ProcessingJob) -> Transcript | None:
    """Return an ended job's transcript, an empty one where nobody spoke, as OpenAI does."""
    if job.status is JobStatus.COMPLETED:
        assert job.result is not None
        return Transcript.from_dict(job.result)
    if job.status is JobStatus.FAILED and job.error_code == "no_speech":
        language = job.options.get("language") or ""
        return Transcript("", language, job.audio_seconds or 0.0, (), "", "")
    return None


def _usage(transcript: Transcript) -> Usage:
    return Usage(seconds=math.ceil(transcript.duration))


def _verbose(transcript: Transcript, job: ProcessingJob, form: TranslationForm) -> VerboseAnswer:
    task: Task = job.options.get("task", "transcribe")
    wanted = getattr(form, "timestamp_granularities", []) or ["segment"]
    segments = [_segment(n, s, form.temperature) for n, s in enumerate(transcript.segments)]
    words = [
        VerboseWord(word=word.word, start=word.start, end=word.end)
        for segment in transcript.segments
        for word in segment.words or ()
    ]
    return VerboseAnswer(
        task=task,
        language="english" if task == "translate" else languages.name_of(transcript.language),
        duration=transcript.duration,
        text=transcript.text,
        segments=segments if "segment" in wanted else None,
        words=words if "word" in wanted else None,
        usage=_usage(transcript),
    )


def _segment(number: int, segment: Segment, temperature: float) -> VerboseSegment:
    return VerboseSegment(
        id=number,
        start=segment.start,
        end=segment.end,
        text=segment.text,
        temperature=temperature,
        avg_logprob=segment.avg_logprob,
        compression_ratio=segment.compression_ratio,
        no_speech_prob=segment.no_speech_prob,
    )


#: Status and field to blame for what is not our fault.
_FAILURES: Mapping[str, tuple[HTTPStatus, str | None]] = {
    **dict.fromkeys(
        (
            "empty_file", "invalid_audio", "no_audio_stream", "empty_audio", "truncated_audio",
            "audio_too_long",
        ),
        (HTTPStatus.BAD_REQUEST, "file"),
    ),
    "file_too_large": (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "file"),
    "invalid_options": (HTTPStatus.BAD_REQUEST, None),
    "model_unavailable": (HTTPStatus.NOT_FOUND, "model"),
    "quota_exceeded": (HTTPStatus.TOO_MANY_REQUESTS, None),
}  # fmt: skip


def _failure(job: ProcessingJob) -> tuple[HTTPStatus, openai_errors.OpenAIError]:
    """Return how to say that an ended job has no transcript. Another attempt would be no better."""
    if job.status is JobStatus.CANCELLED:
        message = f"The job {job.id} was cancelled"
        status = HTTPStatus.CONFLICT
        return status, openai_errors.detail(status, "job_cancelled", message)
    code = job.error_code or "internal_error"
    status, param = _FAILURES.get(code, (HTTPStatus.INTERNAL_SERVER_ERROR, None))
    message = job.error or "The job failed"
    return status, openai_errors.detail(status, code, message, param=param)


def _waited(job_id: UUID, seconds: int) -> tuple[HTTPStatus, openai_errors.OpenAIError]:
    status = HTTPStatus.GATEWAY_TIMEOUT
    return status, openai_errors.detail(
        status,
        "wait_timeout",
        f"The job {job_id} was not done within {seconds} seconds and goes on: see "
        f"GET /jobs/{job_id}/transcript, or send the request again with its Idempotency-Key",
    )


# Streams ------------------------------------------------------------------------------------------


def _stream(request: Request, user: Principal, job_id: UUID) -> Response:
    return EventSourceResponse(
        _events(request, user, job_id), headers={"Cache-Control": "no-store"}, sep="\n", ping=_PING
    )


async def _events(request: Request, user: Principal, job_id: UUID) -> AsyncIterator[dict[str, str]]:
    sent = ""
    try:
        async with aclosing(_texts(request, user, job_id)) as texts:
            async for text in texts:
                if delta := rest_of(text, sent):
                    yield _event({"type": "transcript.text.delta", "delta": delta})
                    sent = text
        job = await waiting.get(request.app, user, job_id)
    except TimeoutError:
        yield _error(_waited(job_id, request.app.state.settings.openai_wait)[1])
        return
    except (PgscribeError, psycopg.OperationalError) as exc:
        code = exc.code if isinstance(exc, PgscribeError) else "database_unavailable"
        status = HTTPStatus.SERVICE_UNAVAILABLE
        message = f"The job {job_id} can't be followed any more: {code}"
        yield _error(openai_errors.detail(status, code, message))
        return
    transcript = _transcript(job)
    if transcript is None:
        yield _error(_failure(job)[1])
        return
    if delta := rest_of(transcript.text, sent):
        yield _event({"type": "transcript.text.delta", "delta": delta})
    yield _event({"type": "transcript.text.done", "text": transcript.text})
    yield {"data": "[DONE]"}


async def _texts(request: Request, user: Principal, job_id: UUID) -> AsyncGenerator[str]:
    """Yield the text as far as it is there, until the job has ended. Raises ``TimeoutError``."""
    until = asyncio.get_running_loop().time() + request.app.state.settings.openai_wait
    async with aclosing(waiting.follow(request.app, user, job_id, with_text=True)) as updates:
        while True:
            async with asyncio.timeout_at(until):
                update = await anext(updates, None)
            if update is None:
                return
            yield update.text


def rest_of(text: str, sent: str) -> str:
    """Return what of a text follows what was sent, which may differ in its spaces.

    Empty where what was sent is not the beginning of the text.
    """
    if text.startswith(sent):
        return text[len(sent) :]
    place = 0
    for char in "".join(sent.split()):
        while place < len(text) and text[place].isspace():
            place += 1
        if place == len(text) or text[place] != char:
            return ""
        place += 1
    return text[place:]


def _event(content: Mapping[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(content, ensure_ascii=False)}


def _error(error: openai_errors.OpenAIError) -> dict[str, str]:
    return {"data": error.model_dump_json()}


# Endpoints ----------------------------------------------------------------------------------------

_ANSWERS = {
    HTTPStatus.OK: Answer(
        "The transcription, in the form that `response_format` names",
        TranscriptionAnswer,
        ("application/json", *(MEDIA_TYPES[name] for name in ("txt", "srt", "vtt"))),
        {JOB_HEADER: "The job, for `GET /jobs/{job_id}`"},
    )
}
_STREAMED = {
    HTTPStatus.OK: Answer(
        _ANSWERS[HTTPStatus.OK].description,
        TranscriptionAnswer,
        (*_ANSWERS[HTTPStatus.OK].media_types, "text/event-stream"),
        _ANSWERS[HTTPStatus.OK].headers,
    )
}
_PROBLEMS = (
    HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT,
    HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.GATEWAY_TIMEOUT,
)  # fmt: skip


@endpoint(
    "POST",
    "/v1/audio/transcriptions",
    scope=Scope.JOBS_WRITE,
    answers=_STREAMED,
    problems=_PROBLEMS,
    raw_body={"multipart/form-data": TranscriptionForm},
    max_body=None,
)
async def create_transcription(
    request: Request, user: Principal, headers: IdempotencyKey
) -> Response:
    """Transcribe a recording and wait for the text, as OpenAI's API has it.

    The job behind it is named in the header `Pgscribe-Job-Id` and goes on if you don't wait.
    A request that says by `x-stainless-retry-count` that it repeats one, as OpenAI's packages do,
    is answered from the first one's job; with an `Idempotency-Key`, any request is.
    """
    return await _serve(request, user, headers.key, TranscriptionForm, "transcribe")


@endpoint(
    "POST",
    "/v1/audio/translations",
    scope=Scope.JOBS_WRITE,
    answers=_ANSWERS,
    problems=_PROBLEMS,
    raw_body={"multipart/form-data": TranslationForm},
    max_body=None,
)
async def create_translation(
    request: Request, user: Principal, headers: IdempotencyKey
) -> Response:
    """Translate a recording into English and wait for the text, as OpenAI's API has it."""
    return await _serve(request, user, headers.key, TranslationForm, "translate")


async def _serve(
    request: Request, user: Principal, key: str | None, model: type[TranslationForm], task: Task
) -> Response:
    require(user, Scope.AUDIO_WRITE)
    request.app.state.waiters.check(user)
    received = await _receive(request, user, model)
    job_id = await _submit(request, user, received, task, key)
    request.state.job_id = job_id  # for the answers of exception handlers
    if getattr(received.form, "stream", False):
        response = _stream(request, user, job_id)
    else:
        response = await _wait(request, user, job_id, received.form)
    response.headers[JOB_HEADER] = str(job_id)
    return response


async def _wait(request: Request, user: Principal, job_id: UUID, form: TranslationForm) -> Response:
    seconds = request.app.state.settings.openai_wait
    try:
        async with asyncio.timeout(seconds):
            job = await waiting.end_of(request, user, job_id)
    except TimeoutError:
        return openai_errors.respond(*_waited(job_id, seconds))
    return await _answer(request, user, job, form)


class Model(BaseModel):
    """A model that `model` may name."""

    id: str
    object: Literal["model"] = "model"
    created: int = _WHISPER_CAME_OUT
    owned_by: str = "openai"


class ModelList(BaseModel):
    """The models that `model` may name."""

    object: Literal["list"] = "list"
    data: list[Model]


@endpoint("GET", "/v1/models", answers={HTTPStatus.OK: Answer("The models", ModelList)})
async def list_models(request: Request, user: Principal) -> Response:  # noqa: ARG001
    """List the models, as OpenAI's API has it. Workers have those whose weights they have."""
    models = [Model(id=name) for name in (*STANDINS, *MODELS)]
    return JSONResponse(ModelList(data=models).model_dump())


@endpoint(
    "GET",
    "/v1/models/{model:path}",
    answers={HTTPStatus.OK: Answer("The model", Model)},
    problems=(HTTPStatus.NOT_FOUND,),
)
async def get_model(request: Request, user: Principal, model: str) -> Response:  # noqa: ARG001
    """Get a model, as OpenAI's API has it."""
    if model not in {*STANDINS, *MODELS}:
        status = HTTPStatus.NOT_FOUND
        message = f"The model {model[:MODEL_NAME_MAX]!r} does not exist"
        return openai_errors.respond(
            status, openai_errors.detail(status, "model_not_found", message, param="model")
        )
    return JSONResponse(Model(id=model).model_dump())
