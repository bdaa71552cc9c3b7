#!/usr/bin/env bash
# What a machine with a CUDA device can prove, in one command of at most nine minutes and in pieces that stand alone.
#
#   benchmarks/gpu_suite.sh [OUT] [--only PIECE[,PIECE...]] [--limit SECONDS]
#
# OUT is the folder for results, benchmarks/results/gpu by default; every piece writes its output to OUT/PIECE.txt, and
# timings and ceilings write their files as they go, so that a piece that is cut off loses nothing that came before.
# Pieces, in the order in which they run: build native tests ceilings timings orthonormal model training sanitizer
# plots.
# GPU_SUITE_ONLY and PYTHON (python3) may be set instead. Needs only torch, Triton and pytest, and what Triton compiles its launchers with: a C
# compiler (CC, gcc or clang) and Python.h. `native` builds the CUDA C++ kernels for this GPU, which takes nvcc, cmake
# and pybind11 as well; a library with CUDA kernels that lies there already (REFT_KERNELS_FORCE_CUDA_BUILD=1
# TORCH_CUDA_ARCH_LIST=9.0a python setup.py build_ext --inplace, on any machine) is taken as it is. Tests run in parallel: by pytest-xdist, or where that is not installed in
# processes started here, which write to OUT/tests.N.txt. Exit status 1 if a piece failed or had no time.
# shellcheck disable=SC2317,SC2329 # the functions of the pieces are called through `bash -c`
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

pieces=(build native tests ceilings timings orthonormal model training sanitizer plots)
out=benchmarks/results/gpu
only=${GPU_SUITE_ONLY:-}
limit=530
python=${PYTHON:-python3}
while (($#)); do
  case $1 in
    --only) only=${2:?--only needs the names of pieces} && shift 2 ;;
    --limit) limit=${2:?--limit needs a number of seconds} && shift 2 ;;
    -*) echo "error: unknown option $1" >&2 && exit 2 ;;
    *) out=$1 && shift ;;
  esac
done
for name in ${only//,/ }; do # names are split on purpose
  if [[ " ${pieces[*]} " != *" $name "* ]]; then
    echo "error: no piece $name (there are: ${pieces[*]})" >&2
    exit 2
  fi
done
mkdir -p "$out"
export TRITON_INTERPRET=0 PYTHONPATH=. PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
REFT_KERNELS_COMMIT=${REFT_KERNELS_COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}
export REFT_KERNELS_COMMIT

# device: facts about the machine; fails without a CUDA device.
device() {
  echo "commit $REFT_KERNELS_COMMIT"
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu --format=csv 2>/dev/null
  "$python" - <<'PY'
import os, pathlib, shutil, sys, sysconfig
import torch

print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
try:
    import triton
except ImportError:
    print("triton is not installed")
else:
    print("triton", triton.__version__)
print("C compiler:", os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "absent")
header = pathlib.Path(sysconfig.get_path("include"), "Python.h")
print("Python.h:", header if header.is_file() else f"absent ({header})")
if not torch.cuda.is_available():
    sys.exit("no CUDA device")
p = torch.cuda.get_device_properties(0)
print(f"{p.name}: sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors, L2 {p.L2_cache_size >> 20} MiB, "
      f"{p.total_memory / 2**30:.1f} GiB")
PY
}

# arch: the nearest architecture at or below the GPU's of those that benchmarks.aot knows; without a GPU sm_90.
arch() {
  "$python" - <<'PY'
import torch
from benchmarks.aot import SHARED_LIMIT

known = sorted(int(name[3:]) for name in SHARED_LIMIT if name.startswith("sm_"))
major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
print(f"sm_{max((a for a in known if a <= 10 * major + minor), default=known[0])}")
PY
}

sanitizer_path() {
  local candidate
  command -v compute-sanitizer && return
  for candidate in "${CUDA_HOME:-/usr/local/cuda}"/{bin,compute-sanitizer}/compute-sanitizer; do
    [[ -x $candidate ]] && echo "$candidate" && return
  done
  "$python" - <<'PY'
import importlib.util, pathlib, sys

spec = importlib.util.find_spec("nvidia")
for folder in (spec.submodule_search_locations or []) if spec else []:
    for path in pathlib.Path(folder).glob("*/**/compute-sanitizer"):
        if path.is_file():
            print(path)
            sys.exit()
sys.exit(1)
PY
}

# The commands of the pieces. Each runs in a shell of its own, with its time limit in seconds as $1.
build() {
  local arch
  arch=$(arch) || return
  echo "for $arch"
  "$python" -m benchmarks.aot --quick --arch "$arch" --out "$out/triton_resources.csv"
}
native() {
  local reason
  reason=$("$python" -c 'import reft_kernels; print(reft_kernels.available_backends()["cuda"])')
  if [[ $reason != ok ]]; then
    echo "backend cuda: $reason"
    TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
    [[ $TORCH_CUDA_ARCH_LIST =~ ^(9|10|12)\.0$ ]] && TORCH_CUDA_ARCH_LIST+=a
    export TORCH_CUDA_ARCH_LIST REFT_KERNELS_FORCE_CUDA_BUILD=1
    "$python" setup.py --quiet build_ext --inplace || return
  fi
  "$python" - <<'PY'
import sys
import reft_kernels

try:
    from reft_kernels import _native
except ImportError as error:
    print("no build information:", error)
else:
    print(_native.build_info())
print(reft_kernels.available_backends())
sys.exit(reft_kernels.available_backends()["cuda"] != "ok")
PY
}
# pytest_within SECONDS ARGUMENTS...: the tests of the GPU, in the group of processes that the limit of the piece ends.
pytest_within() {
  local seconds=$1
  shift
  ((seconds > 0)) || return 124
  # -v and the -q of pyproject.toml cancel out. Of a test that hangs, faulthandler prints where; to end its workers and
  # print what failed until then, pytest-xdist takes ten seconds.
  timeout --foreground --kill-after=12 "$seconds" "$python" -m pytest -vv -o faulthandler_timeout=60 \
    -p no:cacheprovider python_tests/test_edit_gpu.py python_tests/test_orthonormal_gpu.py python_tests/test_model_gpu.py "$@"
}
tests() {
  local beside='gpu and not alone' last=60 workers i status=0 shards=()
  ((last > $1 / 2)) && last=$(($1 / 2)) # seconds left for the tests that need the GPU's memory for themselves
  # Most of the time goes into compiling kernels, which takes one core a process.
  workers=$(nproc)
  ((workers > 12)) && workers=12
  if "$python" -c 'import xdist' 2>/dev/null; then
    pytest_within $(($1 - last)) -m "$beside" --numprocesses "$workers" --dist worksteal || status=$?
  else
    for ((i = 0; i < workers; i++)); do
      REFT_KERNELS_SHARD=$i/$workers pytest_within $(($1 - last)) -m "$beside" >"$out/tests.$i.txt" 2>&1 &
      shards+=($!)
    done
    for i in "${!shards[@]}"; do
      wait "${shards[$i]}" || status=$?
      echo "== shard $i of $workers"
      grep -E '^(FAILED|ERROR|Timeout) ' "$out/tests.$i.txt"
      tail -n 1 "$out/tests.$i.txt"
    done
  fi
  echo "== one at a time"
  pytest_within $(($1 - SECONDS - 7)) -m 'gpu and alone' || status=$?
  return "$status"
}
ceilings() {
  "$python" -m benchmarks.run --suite ops --device cuda --out "$out" --only ceilings
}
timings() {
  "$python" -m benchmarks.run --suite ops --device cuda --out "$out" --only timings --budget "$(($1 - 25))"
}
orthonormal() {
  "$python" -m benchmarks.orthonormal --device cuda --seconds 0.1 --out "$out"
}
model() {
  "$python" -m benchmarks.drop_in --device cuda --random --rounds 15 --out "$out/drop_in.json"
}
training() {
  "$python" -m benchmarks.training_steps --device cuda --dtype bfloat16 --random --rounds 20 --warmup 3 \
    --out "$out/training_steps.json"
}
sanitizer() {
  local tool status=0
  "$python" -m benchmarks.sanitizer_case || return # compiles the kernels before a sanitizer slows everything down
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # every tensor its own allocation, so that its bounds are known
  for tool in memcheck racecheck; do
    echo "== $tool"
    "$sanitizer_program" --tool "$tool" --error-exitcode 9 "$python" -m benchmarks.sanitizer_case || status=$?
  done
  return "$status"
}
plots() {
  "$python" -m benchmarks.run --suite ops --device cuda --out "$out" --only plots
}

declare -A seconds_of=([build]=45 [native]=60 [tests]=150 [ceilings]=25 [timings]=95 [orthonormal]=25 [model]=25 [training]=25 [sanitizer]=65 [plots]=15)
names=() results=() spent=()
note() { names+=("$1") results+=("$2") spent+=("$3"); }

# run PIECE: in a shell of its own under `timeout`, which also ends what the piece has started.
run() {
  local name=$1 start=$SECONDS allowed=${seconds_of[$1]} status
  ((allowed > limit - SECONDS)) && allowed=$((limit - SECONDS))
  if ((allowed < 5)); then
    note "$name" "no time left" 0
    return
  fi
  echo "== $name (at most $allowed s)"
  timeout --kill-after=5 "$allowed" bash -c '"$@"' piece "$name" "$allowed" 2>&1 | tee "$out/$name.txt"
  status=${PIPESTATUS[0]}
  case $status in
    0) note "$name" ok $((SECONDS - start)) ;;
    124 | 137) note "$name" "cut off after $allowed s" $((SECONDS - start)) ;;
    *) note "$name" "failed ($status)" $((SECONDS - start)) ;;
  esac
}

sanitizer_program=$(sanitizer_path)
export out python sanitizer_program
export -f arch build native pytest_within tests ceilings timings orthonormal model training sanitizer plots

device 2>&1 | tee "$out/device.txt"
has_gpu=$((PIPESTATUS[0] == 0))
note device "$( ((has_gpu)) && echo ok || echo 'no CUDA device')" "$SECONDS"
for name in "${pieces[@]}"; do
  if [[ -n $only && ",${only// /,}," != *",$name,"* ]]; then
    continue
  elif [[ $name != build ]] && ! ((has_gpu)); then
    note "$name" "no CUDA device" 0
  elif [[ $name == sanitizer && -z $sanitizer_program ]]; then
    note "$name" "absent: compute-sanitizer is not on PATH, nor in CUDA's folder, nor in a package nvidia" 0
  else
    run "$name"
  fi
done

failed=0
{
  printf '\n%-12s %8s  %s\n' piece seconds status
  for i in "${!names[@]}"; do
    printf '%-12s %8s  %s\n' "${names[$i]}" "${spent[$i]}" "${results[$i]}"
  done
} | tee "$out/summary.txt"
for result in "${results[@]}"; do
  [[ $result == ok || $result == absent:* ]] || failed=1
done
echo "$SECONDS s in all, results in $out"
exit "$failed"
