#!/usr/bin/env bash
# Does what the Dockerfile does, without Docker: builds the wheels of a target, installs them and
# nothing else into an empty environment, and runs migrate, web and worker from there as `nobody`,
# with a home that can't be written to, on an embedded Postgres. Run it as root, from anywhere:
#   scripts/check-image.sh [pgscribe|local]
# It needs the .venv of `make` for pip and the Postgres, or another Python that has them in PYTHON,
# and in BASE a Python that `nobody` can run, of the same version.
set -euo pipefail

target=${1:-pgscribe}
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
base=${BASE:-/usr/bin/python3}
case $target in
  pgscribe) wanted='.[telemetry]' compute=modal ;;
  local) wanted='.[local,telemetry]' compute=local ;;
  *) echo "check-image.sh: no such target: $target" >&2; exit 2 ;;
esac

work=$(mktemp -d)
children=()
clean_up() {
  for child in "${children[@]}"; do kill "$child" 2>/dev/null || true; done
  wait
  rm -rf "$work"
}
trap clean_up EXIT
chmod 755 "$work"
mkdir -p "$work/source" "$work/data" "$work/home"
chown nobody "$work/data"
chmod 555 "$work/home"

echo "Building wheels and installing them …"
tar -C "$root" --exclude=__pycache__ --exclude='*.egg-info' -cf - \
  pyproject.toml README.md LICENSE constraints.txt db jobs modal_functions web | tar -C "$work/source" -xf -
"$base" -m venv --without-pip "$work/venv"
pip=("$python" -m pip --disable-pip-version-check)
(cd "$work/source" && "${pip[@]}" wheel --quiet --wheel-dir "$work/wheels" \
  --constraint constraints.txt "$wanted")
before=$(du -sm "$work/venv" | cut -f1)
"${pip[@]}" --python "$work/venv/bin/python" install --quiet --no-index --no-deps "$work"/wheels/*.whl
"${pip[@]}" --python "$work/venv/bin/python" check
if [[ -d $(echo "$work"/venv/lib/python3*/site-packages)/torch ]]; then
  echo "check-image.sh: torch was installed" >&2
  exit 1
fi
echo "$(find "$work/wheels" -name '*.whl' | wc -l) packages, $(($(du -sm "$work/venv" | cut -f1) - before)) MB installed"

cat >"$work/services.py" <<'PY'
import shlex
import sys
from pathlib import Path
from db.embedded import EmbeddedPostgres
from tests.local_modal.server import in_thread
from tests.local_modal.settings import Settings
modal = in_thread(Settings(apps=("modal_functions.app:app",)))
with EmbeddedPostgres(Path(sys.argv[1])) as server, modal as address:
    said = address.environment() | {"PGSCRIBE_DATABASE_URL": server.url()}
    Path(sys.argv[2]).write_text("".join(f"export {k}={shlex.quote(v)}\n" for k, v in said.items()))
    sys.stdin.read()
PY
mkfifo "$work/until"
(cd "$root" && exec env PYTHONPATH="$root" "$python" "$work/services.py" "$work/postgres" \
  "$work/services" <"$work/until") &
children+=($!)
exec 9>"$work/until" # which ends them, however this script ends
for _ in $(seq 600); do
  [[ -s $work/services ]] && break
  sleep 0.1
done
# shellcheck source=/dev/null
source "$work/services"

as_nobody() {
  cd "$work/data"
  exec setpriv --reuid=65534 --regid=65534 --clear-groups env -i PATH="$work/venv/bin:/usr/bin:/bin" \
    HOME="$work/home" PYTHONDONTWRITEBYTECODE=1 PGSCRIBE_DATABASE_URL="$PGSCRIBE_DATABASE_URL" \
    PGSCRIBE_STORAGE=supabase PGSCRIBE_SUPABASE_URL=http://127.0.0.1:9 \
    PGSCRIBE_SUPABASE_SECRET_KEY=sb_secret_none PGSCRIBE_COMPUTE="$compute" \
    MODAL_SERVER_URL="$MODAL_SERVER_URL" MODAL_TOKEN_ID="$MODAL_TOKEN_ID" \
    MODAL_TOKEN_SECRET="$MODAL_TOKEN_SECRET" MODAL_CONFIG_PATH=/dev/null "$@"
}
is_up() {
  "$python" - <<'PY' 2>/dev/null
import os, urllib.request
import psycopg
urllib.request.urlopen("http://127.0.0.1:18000/healthz", timeout=4)
with psycopg.connect(os.environ["PGSCRIBE_DATABASE_URL"]) as conn:
    assert conn.execute("select id from procrastinate.procrastinate_workers").fetchone()
PY
}
if [[ $target = local ]]; then
  (as_nobody python -c 'import faster_whisper, imageio_ffmpeg, subprocess
subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-version"], check=True)') | head -n 1
fi
(as_nobody pgscribe --version)
(as_nobody bash -c 'time python -c "import web.app"') 2>&1 | sed -n 's/^real/importing the web server took/p'
(as_nobody pgscribe migrate) | tail -n 1
(as_nobody pgscribe web --port 18000) >"$work/web.log" 2>&1 &
web=$!
children+=("$web")
(as_nobody pgscribe worker) >"$work/worker.log" 2>&1 &
worker=$!
children+=("$worker")
for _ in $(seq 100); do
  if is_up; then
    up=1
    break
  fi
  kill -0 "$web" "$worker" || break
  sleep 0.2
done
if [[ -z ${up:-} ]]; then
  cat "$work/web.log" "$work/worker.log" >&2
  exit 1
fi
for name in web worker; do
  grep -h VmRSS "/proc/${!name}/status" | sed "s/^VmRSS: */$name is up, with /"
done
kill -TERM "$web" "$worker"
for child in "$web" "$worker"; do
  status=0
  wait "$child" || status=$?
  # uvicorn hands the signal on, once it has stopped in order.
  if [[ $status != 0 && $status != 143 ]]; then
    echo "check-image.sh: ended with status $status" >&2
    cat "$work/web.log" "$work/worker.log" >&2
    exit 1
  fi
done
if [[ $(ls -A "$work/home") ]]; then
  echo "check-image.sh: something wrote into HOME" >&2
  exit 1
fi
echo "Both stopped on SIGTERM; nothing was written into HOME"
