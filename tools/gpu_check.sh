#!/usr/bin/env bash
# gpu_check - what must hold on a machine with a GPU: builds for the GPUs present and runs the C tests on host, emu and
# cuda, then the tests named below under compute-sanitizer. Needs nvcc, gcc and python3 without packages.
#
#   tools/gpu_check.sh [MODULE ...]     only tests/c/test_MODULE.c; no sanitizer pass
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PIPESHARD_JOBS=${PIPESHARD_JOBS:-$(nproc)} PIPESHARD_TEST_DEVICES=host,emu,cuda
# The op table: every CUDA kernel and format, ragged shapes included.
sanitized_modules=(cuda_ops)

nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total --format=csv,noheader
"$python" tools/psbuild.py archs
status=0
"$python" tools/ctest.py --cuda "$@" || status=1

if [ $# -eq 0 ]; then
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
    for module in "${sanitized_modules[@]}"; do
        if [ -z "$sanitizer" ] || [ ! -f "tests/c/test_$module.c" ]; then
            echo "skip: compute-sanitizer over $module: $([ -n "$sanitizer" ] && echo no such test || echo not installed)"
            continue
        fi
        echo "== memcheck $module"
        PIPESHARD_TEST_DEVICES=cuda "$python" tools/ctest.py --cuda --timeout 1200 \
            --wrap "$sanitizer --tool memcheck --error-exitcode 9" "$module" || status=1
        # racecheck takes the way in which cuBLAS's kernels (nvjet) pass shared memory from the copy engine to the tensor
        # cores for races. They are not ours to mend, and leaving them out of the instrumentation makes the tool itself
        # fail: so its report is read, and any race that is not in one of them counts.
        echo "== racecheck $module"
        report=$(mktemp)
        PIPESHARD_TEST_DEVICES=cuda "$python" tools/ctest.py --cuda --timeout 1200 \
            --wrap "$sanitizer --tool racecheck" "$module" | tee "$report" || status=1
        if grep 'Race reported' "$report" | grep -v nvjet; then status=1; fi
        if grep 'Internal Sanitizer Error' "$report"; then status=1; fi
        rm -f "$report"
    done
fi
exit $status
