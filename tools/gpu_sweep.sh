#!/usr/bin/env bash
# gpu_sweep - TTFT and TPS over VRAM budgets and policies on the GPU present, on synthetic models of real shapes with
# uniform routing: rows and a table in benchmarks/results/. The profile is measured first and kept beside. A run that is
# cut short goes on where it stopped.
#
#   tools/gpu_sweep.sh [FOLDER]      models go to FOLDER (default: a temporary one; 35 GB)
#   BUDGETS, PROMPTS, POLICIES, REPEATS, GEN, CELL_S, MODELS: what to measure
#   ROUNDS: how often, one after another with engines opened anew, for a host whose CPUs come and go; AGAIN: policies of
#   the rounds behind the first, those that come near each other
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${1:-$(mktemp -d)}
commit=${PIPESHARD_COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr ' ' '-' | tr '[:upper:]' '[:lower:]')
out=${OUT:-benchmarks/results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PIPESHARD_COMMIT=$commit

"$python" setup.py -q build_ext --inplace >/dev/null
rows=()
for model in ${MODELS:-Qwen3-30B-A3B:q4_0 Minitron-8B:f16}; do
    name=${model%:*} type=${model#*:}
    file=$folder/$name.$type.gguf
    [ -f "$file" ] || "$python" -m pipeshard synth "$name" "$file" --type "$type" --quiet
    "$python" -m pipeshard profile "$file" --device cuda -o "$out/profile_${gpu}_$name.json"
    policies=${POLICIES:-all}
    for round in $(seq "${ROUNDS:-1}"); do
        rows+=("$out/sweep_${gpu}_$name.$round.csv")
        "$python" -m pipeshard sweep "$file" --device cuda --vram "${BUDGETS:-2GiB,4GiB,8GiB,16GiB}" \
            -p "${PROMPTS:-1024,4096}" --policy "$policies" -r "${REPEATS:-3}" -n "${GEN:-24}" \
            --cell-s "${CELL_S:-12}" -o "${rows[-1]}"
        policies=${AGAIN:-$policies}
    done
done
"$python" benchmarks/sweep_table.py --commit "$commit" "${rows[@]}" | tee "$out/sweep_$gpu.txt"
