#!/usr/bin/env bash
# test_long - the tests that take too long for every change: C and Python tests marked long, and ten times the fuzz
# mutations. The result, with its commit and machine, is written to tests/long.txt, which is checked in.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
export PIPESHARD_TEST_LONG=1
log=build/long.log status=0
mkdir -p build
: >"$log"

step() {
    local name=$1 start=$SECONDS
    shift
    "$@" 2>&1 | tee build/long_step.log || status=1
    echo "$name: $(tail -n 1 build/long_step.log) ($((SECONDS - start)) s)" >>"$log"
}

step "C tests" "$python" tools/ctest.py --timeout 3600
step "C tests, ASan and UBSan" "$python" tools/ctest.py --sanitize address --timeout 3600
step "C tests, TSan" "$python" tools/ctest.py --sanitize thread --timeout 3600
step "fuzz corpus, 20,000 mutations a file" "$python" tools/ctest.py --sanitize address --fuzz 20000 --timeout 3600
export PIPESHARD_TEST_C=0
step "Python tests" "$python" -m pytest -q -m "long or not long"
{
    echo "commit $(git rev-parse --short HEAD)$([ -z "$(git status --porcelain -- csrc pipeshard tests/c tests/python)" ] || echo ' with changes')"
    echo "$(date -u +%Y-%m-%d), $(nproc) CPUs, $(sed -n 's/^model name\s*: //p' /proc/cpuinfo | head -n 1)"
    cat "$log"
} >tests/long.txt
cat tests/long.txt
exit $status
