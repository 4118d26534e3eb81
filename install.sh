#!/usr/bin/env bash
# bash install.sh [EXTRA] [VENV]: a virtual environment with fst-fast and the extra (train, the default, or dev).
# On Linux without an NVIDIA GPU it makes sure that torch is the CPU build, not gigabytes of CUDA.
set -euo pipefail
cd "$(dirname "$0")"
extra="${1:-train}"
venv="${2:-.venv$([ "$extra" = train ] || echo "-$extra")}"
torch="torch>=2.11,<2.14"

python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "install.sh: $("$python" --version) is too old, 3.11 or newer is needed; name one with PYTHON=..." >&2
  exit 2
}
"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
  if [ "$(uname)" != Linux ] || nvidia-smi >/dev/null 2>&1; then
    "${pip[@]}" install -q "$torch"
  elif "${pip[@]}" install -q --dry-run --no-deps --report - "$torch" 2>/dev/null | grep -q '"version": *"[^"]*+cpu"'; then
    "${pip[@]}" install -q "$torch" # pip is set up with an index or folder that has CPU builds
  else
    "${pip[@]}" install -q uv # knows PyTorch's own index of CPU builds
    "$venv/bin/uv" pip install -q --python "$venv/bin/python" --torch-backend=cpu "$torch"
  fi
fi
"${pip[@]}" install -q -e ".[$extra]"
