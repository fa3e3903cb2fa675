#!/bin/sh
# Build sdist and wheel, and use the wheel as a new user would:  sh packaging/try_wheel.sh [MODEL TEXT]
#
# The wheel goes into a fresh environment outside this clone, together with vLLM (packaging/install.sh). Then, in an
# empty folder and with the hub switched off: doctor, calibrate, verify, report, and answers through vllm.LLM. MODEL and
# TEXT are those of `make demo` if none are given. It takes some minutes and 4 GB; everything is deleted at the end,
# except the two distributions if DIST names a folder for them.
set -eu
clone=$(realpath "$(dirname "$0")/..")
model=$(realpath -m "${1:-$clone/.cache/SmolLM2-135M-Instruct}")
text=$(realpath -m "${2:-$clone/.cache/calibration.jsonl}")
for needed in "$model/config.json" "$text"; do
    [ -f "$needed" ] && continue
    echo "$needed: expected a file, got none; give MODEL and TEXT, or run \`make demo\`" >&2
    exit 1
done
cd "$clone"
unset PYTHONPATH # the clone must not be found

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
dist=${DIST:-$folder/dist}
say() { echo "[try_wheel] $*"; }

say "build"
"${PYTHON:-python3}" -m venv "$folder/build"
"$folder/build/bin/python" -m pip install --quiet build twine
"$folder/build/bin/python" -m build --outdir "$dist" . >"$folder/build.log" 2>&1 || {
    cat "$folder/build.log" >&2
    exit 1
}
"$folder/build/bin/python" -m twine check --strict "$dist"/*
wheel=$(ls -t "$dist"/*.whl | head -n 1)

say "install $(basename "$wheel")"
sh packaging/install.sh "$folder/venv" "$wheel" calibration,report

mkdir "$folder/user"
cd "$folder/user"
# An own cache, because a kernel that was compiled before would hide a source that the wheel lacks.
export PATH="$folder/venv/bin:$PATH" HF_HUB_OFFLINE=1 VLLM_CACHE_ROOT="$folder/cache"
python -c 'import sys, vllm_smoothquant as ours; sys.exit(not ours.__file__.startswith(sys.prefix) and ours.__file__)'
run() { echo "\$ $*"; "$@"; }
run smoothquant doctor
run smoothquant calibrate "$model" -o INT8 --dataset "$text" --samples 4 --seq-len 128
run smoothquant verify INT8
run smoothquant report INT8
VLLM_LOGGING_LEVEL=WARNING VLLM_CPU_KVCACHE_SPACE=1 run python "$clone/examples/offline_batch.py" INT8 --enforce-eager
say "done"
