#!/bin/sh
# On a GPU, in less than eight minutes: its tests, then its times beside PyTorch.
#   bench/gpu.sh FOLDER
# What they say goes into FOLDER too; compiled kernels are kept in FOLDER/kernels for the next time.
set -eu
mkdir -p "$1"
export CUPY_CACHE_DIR="$1/kernels" CUPY_TF32=0 PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
status=0
timeout 200 python3 -m pytest -q -p no:cacheprovider tests/test_gpu.py >"$1/tests.txt" 2>&1 || status=$?
tail -n 15 "$1/tests.txt"
timeout 240 python3 -m bench.gpu >"$1/bench.txt" 2>&1 || status=$?
cat "$1/bench.txt"
exit $status
