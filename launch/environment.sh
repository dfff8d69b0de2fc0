# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: a virtual environment with syncbn. $1: syncbn's extras, comma-separated; further arguments:
# dependency groups of pyproject.toml. An active environment is reused; otherwise .venv is, which the interpreter PYTHON creates if it is
# missing. TORCH is the torch to install if there is none.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
  . .venv/bin/activate
fi
python - <<'EOF' || exit 1
import sys
cure = "deactivate the environment or remove .venv, then set PYTHON"
sys.exit(0 if sys.version_info >= (3, 10) else f"syncbn needs Python 3.10 or newer, this is {sys.version.split()[0]}: {cure}")
EOF
if ! python -c 'import torch' 2>/dev/null; then
  # Without a GPU, install the version that is known to work. From PyPI it takes several gigabytes on Linux, for it brings CUDA.
  command -v nvidia-smi >/dev/null && TORCH=${TORCH:-torch>=2.11} || TORCH=${TORCH:-torch==2.13.0}
  echo "Installing $TORCH (set TORCH for another one, or install torch yourself first)"
  python -m pip install --quiet "$TORCH"
fi
# Compiling the CUDA kernels takes minutes, so build them only if a GPU is present, and only for its architecture.
if command -v nvidia-smi >/dev/null; then
  export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | paste -sd';')}
else
  export SYNCBN_BUILD_CUDA=${SYNCBN_BUILD_CUDA:-0}
fi
if ! compgen -G 'build/objects/*/*.o' >/dev/null; then
  also=$([ "${SYNCBN_BUILD_CUDA:-}" = 0 ] || echo ', and for the GPU, which takes minutes more')
  echo "Compiling the kernels for the CPU: about two minutes on two cores, the first time$also"  # pip prints nothing meanwhile
fi
# A new virtual environment's pip may be older than 25.1, which introduced --group.
[ $# = 1 ] || [[ $(python -m pip install --help) == *--group* ]] || python -m pip install --quiet 'pip>=25.1'
wanted=(-e ".[$1]")
for group in "${@:2}"; do wanted+=(--group "$group"); done
# Without isolation the build uses this torch, and downloads no other.
python -m pip install --quiet setuptools wheel
python -m pip install --quiet --no-build-isolation "${wanted[@]}"
