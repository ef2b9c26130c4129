#!/usr/bin/env bash
# Vision transformers with the paper's hyper-parameters and language models of width 256 on one GPU, by backpropagation and
# by stream side by side, two runs at a time. Needs nothing that is installed but torch, numpy, safetensors and tokenizers.
#
#     HBLL_DATA=DIR OUT=DIR [EPOCHS=40] [MINUTES=4] [RULES="bp stream"] [RUNS=DIR] [GATE=0] benchmarks/gpu_vision.sh
#
# GATE=0 leaves out the tests of the rules that come first, where they have passed on another machine.
# HBLL_DATA holds cifar-10-batches-bin/ and novels/. EPOCHS are those of the images (the paper makes 500), whose learning
# rate falls to 0 over them. MINUTES is the most that each of the two pairs may take, after which runs are saved where they
# stand, and the same command goes on. RUNS gets their folders, OUT what is small: vision.md, logs, metrics, configurations.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${HBLL_DATA:?names the folder that holds the data sets}" "${OUT:?names the folder for the results}"
: "${RUNS:=runs/gpu_vision}"
export HBLL_DATA PYTHONPATH=src
mkdir -p "$OUT" "$RUNS"
[ "${GATE:-1}" = 0 ] || python benchmarks/gate.py ${RULES:-bp stream}

side_by_side() {  # NAME RECIPE PRESET OPTIONS: a process for each rule
    local processes=() rule options
    for rule in ${RULES:-bp stream}; do
        options=$4
        case $rule in stream | greedy | solo) options="${options%\}}, \"stage\": [3, 4]}" ;; esac
        python benchmarks/vision.py train "$2" "$rule" --preset "$3" --options "$options" --minutes "${MINUTES:-4}" \
            --folder "$RUNS/$1-$rule" >"$OUT/$1-$rule.log" 2>&1 &
        processes+=($!)
    done
    for process in "${processes[@]}"; do
        wait "$process" || echo "a run of $1 failed: see $OUT/$1-*.log" >&2
    done
}

side_by_side cifar10-vit cifar10-vit paper "{\"epochs\": ${EPOCHS:-40}}"
side_by_side novels-256 novels-gpt small \
    '{"width": 256, "context": 256, "batch_size": 32, "precision": "bfloat16", "learning_rate": 0.002}'

for run in "$RUNS"/*/; do
    mkdir -p "$OUT/$(basename "$run")"
    cp "$run"/*.json* "$OUT/$(basename "$run")"
done
python benchmarks/vision.py table "$RUNS"/*/ | tee "$OUT/vision.md"
