#!/usr/bin/env bash
# Vision and language on one GPU, the most worth first: the paper's tables 2 and 4 at small scale with a learning rate for
# every rule, language models on the novels, vision transformers with the paper's hyper-parameters, and language models of
# width 256. Needs nothing that is installed but torch, numpy, safetensors and tokenizers.
#
#     HBLL_DATA=DIR OUT=DIR [PARTS="table2 novels table4 vit novels-256"] [MINUTES=3] [RUNS=DIR] [GATE=0] benchmarks/gpu_vision.sh
#
# HBLL_DATA holds cifar-10-batches-bin/, cifar-100-binary/ and novels/. PARTS are made in this order, MINUTES the most that
# each may take, also by part (MINUTES_table2=6, MINUTES_novels_256=2); then its runs are saved where they stand, and the same
# command goes on. RUNS gets their folders, OUT what is small: vision.md, tables, logs, metrics, configurations. GATE=0 leaves
# out the tests of the rules that come first, where they have passed on another machine.
#
#     RULES     of the tables, the first first ("bp stream scan greedy paper tree")
#     RATES     learning rates of the tables, the first first ("0.004 0.002 0.008")
#     WORKERS   runs of a table at once (12)
#     EPOCHS    of the tables (10)
#     STEPS     of language models (8000), of 16 texts each
#     RATE      learning rate of language models (0.004)
#     PAPER_EPOCHS   with the paper's hyper-parameters (40; the paper makes 500), over which the learning rate falls to 0
#     OPTIONS   of all, as JSON, before all others ({})
set -euo pipefail
cd "$(dirname "$0")/.."
: "${HBLL_DATA:?names the folder that holds the data sets}" "${OUT:?names the folder for the results}"
: "${RUNS:=runs/gpu_vision}" "${RULES:=bp stream scan greedy paper tree}" "${RATES:=0.004 0.002 0.008}" "${RATE:=0.004}"
export HBLL_DATA PYTHONPATH=src
mkdir -p "$OUT" "$RUNS"
python benchmarks/gate.py $RULES solo
export GATE=0  # once is enough

minutes() {  # PART
    local own="MINUTES_${1//-/_}"
    echo "${!own:-${MINUTES:-3}}"
}

options() {  # JSON..: as one, the last first
    python -c 'import json, sys; print(json.dumps({k: v for text in sys.argv[1:] for k, v in json.loads(text).items()}))' \
        "$@" "${OPTIONS:-{\}}"
}

reproduce() {  # TABLE
    # Words of RULES and RATES are arguments of their own.
    python benchmarks/vision.py reproduce "$1" --rules $RULES --rates $RATES --workers "${WORKERS:-12}" \
        --options "$(options "{\"epochs\": ${EPOCHS:-10}}")" --minutes "$(minutes "$1")" --folder "$RUNS/$1" \
        2>"$OUT/$1.log" | tee "$OUT/$1.md" || echo "$1 failed: see $OUT/$1.log" >&2
}

side_by_side() {  # PART RECIPE PRESET OPTIONS RULE+OPTIONS..: a process for each rule
    local part=$1 recipe=$2 preset=$3 shared=$4 processes=() arm rule
    shift 4
    for arm in "$@"; do
        rule=${arm%%\{*}
        python benchmarks/vision.py train "$recipe" "$rule" --preset "$preset" \
            --options "$(options "$shared" "${arm#"$rule"}")" --minutes "$(minutes "$part")" --folder "$RUNS/$part-$rule" \
            >"$OUT/$part-$rule.log" 2>&1 &
        processes+=($!)
    done
    for process in "${processes[@]}"; do
        wait "$process" || echo "a run of $part failed: see $OUT/$part-*.log" >&2
    done
}

for part in ${PARTS:-table2 novels table4 vit novels-256}; do
    case $part in
    table*) reproduce "$part" ;;
    novels)
        side_by_side novels novels-gpt small \
            "{\"width\": 128, \"epochs\": 1, \"train_samples\": $((16 * ${STEPS:-8000})), \"learning_rate\": $RATE}" \
            'bp{}' 'stream{"stage": [3, 4], "copies": true, "readout_depth": 2}' 'solo{"stage": [3, 4]}'
        ;;
    vit)
        side_by_side vit cifar10-vit paper "{\"epochs\": ${PAPER_EPOCHS:-40}}" 'bp{}' 'stream{"stage": [3, 4]}'
        ;;
    novels-256)
        side_by_side novels-256 novels-gpt small \
            '{"width": 256, "context": 256, "batch_size": 32, "precision": "bfloat16", "learning_rate": 0.002}' \
            'bp{}' 'stream{"stage": [3, 4]}'
        ;;
    esac
done

for configuration in "$RUNS"/*/configuration.json "$RUNS"/table*/*/configuration.json "$RUNS"/table*/table.json; do
    [ -e "$configuration" ] || continue
    run=$(dirname "$configuration")
    mkdir -p "$OUT/${run#"$RUNS"/}"
    cp "$run"/*.json* "$OUT/${run#"$RUNS"/}"
done
runs=("$RUNS"/*/configuration.json)
[ ! -e "${runs[0]}" ] || python benchmarks/vision.py table "${runs[@]%/*}" | tee "$OUT/vision.md"
