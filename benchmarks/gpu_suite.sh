#!/usr/bin/env bash
# All tests and benchmarks that need a GPU, as many as fit into eight minutes (by estimate all take fifteen).
#
#     benchmarks/gpu_suite.sh [folder]          default: runs/gpu_suite
#     PYTHON=.venv/bin/python LIMIT_S=300 benchmarks/gpu_suite.sh /tmp/h200
#     PARTS="tests train_speed" benchmarks/gpu_suite.sh        these alone: a session of short calls takes two
#
# Tests that need a GPU, generation and training at the published sizes in bfloat16 and float16, each kernel's speed,
# generation through HTTP, a thousand candidates alone and in batches. The most important come first. Each part has its own
# limit, and a failure does not stop the others. A part that is stopped stores what it measured. Leaves in the folder: suite.log (all output),
# tests.xml, <part>.json (the part's document), <part>.png, summary.json. The last line of output is the summary; the exit
# code is 0 when all parts passed, 1 when one did not, 2 when nothing could be measured.
# Needs torch, triton, numpy, safetensors, transformers, pydantic, PyYAML, Pillow, einops, taming-transformers-rom1504, pytest,
# hypothesis; pytest-xdist where it is there; for training deepspeed (with hjson, psutil, py-cpuinfo, msgpack, ninja); for
# HTTP what pyproject's `serve` names but ray, and httptools. No installation of this repository, no compiler, no network.
set -u -o pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-$root/runs/gpu_suite}
python=${PYTHON:-python3}
limit_s=${LIMIT_S:-470}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

refuse() {
    echo "gpu_suite: $1" >&2
    exit 2
}

command -v "$python" >/dev/null || refuse "there is no $python: set PYTHON"
"$python" -c "import torch" 2>/dev/null || refuse "$python has no torch: set PYTHON to one that has"
"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" ||
    refuse "no CUDA device is visible to torch: nothing to measure here"

mkdir -p "$folder" || refuse "cannot write to $folder"
folder=$(cd "$folder" && pwd)
log=$folder/suite.log
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TMPDIR=$scratch  # a part that is stopped leaves gigabytes behind
summary=""
all_passed=1
SECONDS=0

# part NAME LIMIT_S COMMAND...: runs it within its limit and what is left of the whole; notes exit code and seconds.
part() {
    local name=$1 limit=$2 left=$((limit_s - SECONDS)) code=0 started_at=$SECONDS
    shift 2
    [[ -z ${PARTS:-} || " $PARTS " == *" $name "* ]] || return 0
    ((limit > left)) && limit=$left
    if ((limit < 5)); then
        code=124
        echo "== $name: no time left" | tee -a "$log"
    else
        echo "== $name, at most $limit s: $*" | tee -a "$log"
        # SIGINT: scripts store what they have and stop what they started, pytest writes its file
        timeout --signal=INT --kill-after=20 "$limit" "$@" >"$scratch/$name.out" 2> >(tee -a "$log" >"$scratch/$name.err") || code=$?
        cat "$scratch/$name.out" >>"$log"
        tail -n 1 "$scratch/$name.out" | grep '^{' >"$folder/$name.json" || rm -f "$folder/$name.json"
        ((code)) && tail -n 5 "$scratch/$name.err" "$scratch/$name.out"
    fi
    ((code)) && all_passed=0
    echo "== $name: exit code $code after $((SECONDS - started_at)) s" | tee -a "$log"
    summary+="${summary:+, }\"$name\": {\"exit_code\": $code, \"seconds\": $((SECONDS - started_at))}"
}

: >"$log"
nvidia-smi >>"$log" 2>&1 || echo "nvidia-smi does not run here" >>"$log"
"$python" -m pip list >>"$log" 2>/dev/null || echo "no pip here" >>"$log"

cd "$root" || refuse "cannot enter $root"
# Not all files: pytest would import ray and others that need not be here. These hold all tests marked gpu.
mapfile -t gpu_tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
spread=()
"$python" -c "import xdist" 2>/dev/null && spread=(-n 8 --dist worksteal)
part tests 200 "$python" -m pytest -q -m gpu "${spread[@]}" --no-showlocals --continue-on-collection-errors \
    -p no:cacheprovider --junitxml="$folder/tests.xml" "${gpu_tests[@]}"
sample() {
    part "sample_speed_$1" 130 "$python" benchmarks/sample_speed.py --dtype "$1" --out "$scratch/$1"
    for plot in "$scratch/$1"/plots/*.png; do
        [[ -e $plot ]] && cp "$plot" "$folder/sample_speed_$1.png"
    done
}
sample bfloat16
part train_speed 120 "$python" benchmarks/train_speed.py --batch 256 --limit-s 60 --out "$scratch/train_speed"
part kernel_speed 100 "$python" benchmarks/kernel_speed.py --rows 16 1 256 --dtype bfloat16 --out "$scratch/kernel_speed"
part serve_load 120 "$python" benchmarks/serve_load.py --published --servers direct --only saturation,concurrency_one \
    --rounds 1 --out "$scratch/serve_load"
part seed_equality 80 "$python" benchmarks/seed_equality.py
sample float16

line="{\"gpu_suite\": {$summary}, \"all_passed\": $([[ $all_passed == 1 ]] && echo true || echo false), \"seconds\": $SECONDS, \"folder\": \"$folder\"}"
echo "$line" | tee "$folder/summary.json"
[[ $all_passed == 1 ]]
