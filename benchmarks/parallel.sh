#!/usr/bin/env bash
# What docs/scaling.md and benchmarks/results/parallel.md show of time, on a quiet machine of two cores, part by part:
#
#     benchmarks/parallel.sh loopback WIDTH BATCH [rest]        256 16, 256 16 rest, 256 4, 256 1, 128 16, 128 4, 128 1
#     benchmarks/parallel.sh link MBIT DELAY_MS BATCH GROUP     1000 1, 100 20, 20 100; 16, 4; stages, pipelines, replicas
#     benchmarks/parallel.sh characters SEED [ARM ..]           accuracy against time; of all arms, or of these
#     benchmarks/parallel.sh images SEED [ARM ..]
#     benchmarks/parallel.sh emulate [R]                        up to 32 stages, copies refreshed every R steps
#     benchmarks/parallel.sh tables                             what has been found so far
#     benchmarks/parallel.sh                                    all of it
#
# A part takes about five minutes or less, of accuracy an arm does. Timings and runs are added to files in $OUT (runs/parallel).
# $LINK is a command that starts another one on two hosts over a link, as in
#
#     $LINK --mbit 100 --delay-ms 20 -- python benchmarks/parallel.py ...
#
# with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME set. $HBLL_DATA is the folder of the data sets,
# $PYTHON the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-runs/parallel}
DATA=${HBLL_DATA:-$HOME/.cache/hbll}
export OMP_NUM_THREADS=1
mkdir -p "$OUT"

MAIN=(bp "bp, two threads" DDP "1F1B, m = 4" stream "solo, R = 16" greedy)
REST=(bp "1F1B, m = 2" "1F1B, m = 8" "ZBV, m = 2" "ZBV, m = 4" "ZBV, m = 8" "2BW, m = 2" "2BW, m = 4" "2BW, m = 8"
    "DiLoCo, H = 50" "DiLoCo, H = 500" "stream, bf16 on the link")
STAGES=(bp stream "stream, bf16 on the link" "solo, R = 16" greedy)
PIPELINES=("1F1B, m = 2" "1F1B, m = 4" "1F1B, m = 8" "ZBV, m = 2" "ZBV, m = 4" "2BW, m = 4")
REPLICAS=(DDP "DiLoCo, H = 50" "DiLoCo, H = 500")

rivals() {
    "$PYTHON" benchmarks/parallel.py rivals --out "$OUT/rivals.jsonl" "$@" 2>&1 | tee -a "$OUT/rivals.log"
}

loopback() { # WIDTH BATCH [rest]
    local steps=20 rounds=3 arms=("${MAIN[@]}")
    case $2 in 1) steps=100 ;; 4) steps=30 ;; esac
    if [[ ${3:-} == rest ]]; then
        steps=10 rounds=2 arms=("${REST[@]}")
    elif [[ $1 != 256 || $2 != 16 ]]; then # time enough for all at once
        arms+=("${REST[@]:1}")
    fi
    rivals --widths "$1" --batches "$2" --steps "$steps" --rounds "$rounds" --arms "${arms[@]}"
}

link() { # MBIT DELAY_MS BATCH GROUP
    local steps=20 rounds=2 arms=("${STAGES[@]}")
    if [[ $4 != stages ]]; then
        case $1 in 1000) steps=10 ;; 100) steps=5 ;; *) steps=3 rounds=1 ;; esac
        [[ $4 == pipelines ]] && arms=("${PIPELINES[@]}") || arms=("${REPLICAS[@]}")
    fi
    ${LINK:?"say by LINK how a command is started on two hosts over a link"} --mbit "$1" --delay-ms "$2" -- \
        "$PYTHON" benchmarks/parallel.py rivals --mbit "$1" --delay-ms "$2" --widths 256 --batches "$3" --steps "$steps" \
        --rounds "$rounds" --arms "${arms[@]}" --out "$OUT/rivals.jsonl" 2>&1 | tee -a "$OUT/rivals.log"
}

accuracy() { # TASK SEED RATE WIDTH [ARM ..]
    local task=$1 seed=$2 rate=$3 width=$4
    shift 4
    "$PYTHON" benchmarks/wallclock.py "$task" --seeds "$seed" --rate "$rate" --width "$width" --steps "${STEPS:-1000}" \
        --data-dir "$DATA" --out "$OUT/wallclock.jsonl" --plot "$OUT/$task.png" ${1+--arms "$@"} 2>&1 |
        tee -a "$OUT/wallclock.log"
}

characters() { accuracy characters "$1" 8e-3 128 "${@:2}"; }
images() { accuracy images "$1" 1.6e-2 32 "${@:2}"; }

emulate() { # [R]
    local schemes=(bp stream "stream, one jump" greedy)
    [[ ${1:-} ]] && schemes=("stream, one jump" greedy solo)
    "$PYTHON" benchmarks/parallel.py emulate --block-seconds 0.05 ${1+--refresh "$1"} --schemes "${schemes[@]}" \
        --out "$OUT/emulated.jsonl" 2>&1 | tee -a "$OUT/emulated.log"
}

tables() {
    "$PYTHON" benchmarks/parallel.py table "$OUT/rivals.jsonl"
    "$PYTHON" benchmarks/wallclock.py table "$OUT/wallclock.jsonl"
}

all() {
    for width in 256 128; do for batch in 1 4 16; do loopback $width $batch; done; done
    loopback 256 16 rest
    if [[ ${LINK:-} ]]; then
        for way in "1000 1" "100 20" "20 100"; do
            for batch in 4 16; do
                for group in stages pipelines replicas; do link $way $batch $group; done
            done
        done
    fi
    for seed in 0 1; do
        characters $seed
        images $seed
    done
    emulate
    emulate 16
    tables
}

case ${1:-all} in
    loopback | link | characters | images | emulate | tables | all) "${@:-all}" ;;
    *) sed -n '2,20s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
