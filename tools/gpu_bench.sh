#!/usr/bin/env bash
# gpu_bench - all-resident speed on the GPU present, on synthetic models of real shapes with uniform routing, written to
# benchmarks/results/. Models go to FOLDER (default: a temporary one; 35 GB).
#
#   tools/gpu_bench.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${1:-$(mktemp -d)}
commit=${PIPESHARD_COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr ' ' '-' | tr '[:upper:]' '[:lower:]')
out=${OUT:-benchmarks/results}/resident_$gpu.txt
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

"$python" setup.py -q build_ext --inplace > /dev/null
{
    echo "tools/gpu_bench.sh at commit $commit, $(date -u +%F)"
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
    "$python" -m pipeshard --version
} | tee "$out"
bench() { # NAME TYPE PROMPTS
    local file=$folder/$1.$2.gguf
    [ -f "$file" ] || "$python" -m pipeshard synth "$1" "$file" --type "$2" --quiet
    { echo; echo "$1 $2"; "$python" -m pipeshard bench -m "$file" --device cuda -c 4608 -p "$3" -n 128 -d 1024 -r 5; } | tee -a "$out"
}
bench Qwen3-30B-A3B q4_0 1024,4096
bench Minitron-8B f16 1024,4096
bench Llama-3.2-1B q4_0 1024
