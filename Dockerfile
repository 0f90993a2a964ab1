# syntax=docker/dockerfile:1
# One image for `pgscribe web`, `worker`, `migrate` and `setup-storage`. It has no torch and no models.
#   docker build -t pgscribe .                        workers have audio transcribed on Modal
#   docker build -t pgscribe:local --target local .   workers transcribe on their own CPU
# scripts/check-image.sh installs the same into an empty folder and runs it, without Docker.

FROM python:3.11.15-slim-trixie AS base
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1

# Wheels of everything in the exact versions of constraints.txt. Compilers are not needed: all have
# wheels for amd64 and arm64.
FROM base AS builder
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY db db
COPY jobs jobs
COPY modal_functions modal_functions
COPY web web
RUN pip wheel --wheel-dir /wheels/pgscribe --constraint constraints.txt '.[telemetry]' \
    && pip wheel --wheel-dir /wheels/local --constraint constraints.txt '.[local,telemetry]'

FROM base AS runtime
# A fixed number, so that folders of the host can be given to it.
RUN groupadd --gid 10001 pgscribe \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/pgscribe --create-home \
        --shell /usr/sbin/nologin pgscribe
# What is written lies under here: scratch files, weights. All else may be read-only.
WORKDIR /var/lib/pgscribe
ENV HOME=/var/lib/pgscribe
EXPOSE 8000
STOPSIGNAL SIGTERM
# That of the web server; workers have theirs at PGSCRIBE_WORKER_HEALTH_PORT (docker-compose.yml).
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s --retries=4 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["pgscribe"]
CMD ["web", "--host", "0.0.0.0"]

FROM runtime AS local
RUN --mount=type=bind,from=builder,source=/wheels/local,target=/wheels \
    pip install --no-index --no-deps /wheels/*.whl
USER 10001:10001

# The last one is what `docker build` makes where no other is named.
FROM runtime AS pgscribe
RUN --mount=type=bind,from=builder,source=/wheels/pgscribe,target=/wheels \
    pip install --no-index --no-deps /wheels/*.whl
USER 10001:10001
