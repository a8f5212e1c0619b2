#!/bin/sh
# On a GPU, in less than eight minutes: its tests, then its times beside PyTorch.
#   bench/gpu.sh FOLDER
# What they say goes into FOLDER too; compiled kernels are kept in FOLDER/kernels for the next time.
set -eu
mkdir -p "$1"
export CUPY_CACHE_DIR="$1/kernels" CUPY_TF32=0 PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
status=0
# Without shrinking: each smaller example would be compiled. After a fault nothing more is tried, as
# a GPU that has reported one reports it for ever.
TINYLDM_HYPOTHESIS_PROFILE=mutants timeout -s INT 200 python3 -m pytest -q -x -p no:cacheprovider \
    tests/test_gpu.py >"$1/tests.txt" 2>&1 || status=$?
tail -n 40 "$1/tests.txt"
timeout -s INT 240 python3 -m bench.gpu >"$1/bench.txt" 2>&1 || status=$?
cat "$1/bench.txt"
exit $status
