#!/usr/bin/env bash
# What a machine with a CUDA device can prove, in one command of a few minutes. Needs only torch, Triton and pytest.
#
#   benchmarks/gpu_suite.sh [OUT]     OUT: the folder for results, benchmarks/results/gpu by default
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results/gpu}
mkdir -p "$out"
export TRITON_INTERPRET=0 PYTHONPATH=. PYTHONUNBUFFERED=1

{
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv
  python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
  git rev-parse HEAD 2>/dev/null
} | tee "$out/device.txt"
python3 -m pytest -q -m gpu python_tests/test_edit_gpu.py 2>&1 | tee "$out/tests.txt"
