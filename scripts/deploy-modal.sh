#!/usr/bin/env bash
# Deploys to Modal, for CI and for people: `pgscribe deploy` of this checkout's .venv, or of PATH.
# Takes its arguments (--check, --environment NAME); settings and token: see docs/modal.md.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

if [[ -x $root/.venv/bin/pgscribe ]]; then
  pgscribe=$root/.venv/bin/pgscribe
elif ! pgscribe=$(command -v pgscribe); then
  echo "deploy-modal.sh: pgscribe is neither in $root/.venv nor in PATH; install it:" \
    "pip install $root" >&2
  exit 127
fi
exec "$pgscribe" deploy "$@"
