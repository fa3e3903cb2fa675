#!/bin/sh
# Build sdist and wheel, and use the wheel as a new user would:  sh packaging/try_wheel.sh [MODEL TEXT OTHER_TEXT]
#
# The wheel goes into a fresh environment outside this clone, together with vLLM (packaging/install.sh). Then, in an
# empty folder and with the hub switched off: doctor, calibrate on TEXT, verify, report, evaluate on OTHER_TEXT, answers
# through vllm.LLM and through `vllm serve`. All three are those of `make demo` if none are given. It takes some minutes
# and 4 GB; everything is deleted at the end, except the two distributions if DIST names a folder for them.
set -eu
clone=$(realpath "$(dirname "$0")/..")
model=$(realpath -m "${1:-$clone/.cache/SmolLM2-135M-Instruct}")
text=$(realpath -m "${2:-$clone/.cache/calibration.jsonl}")
other=$(realpath -m "${3:-$clone/.cache/evaluation.jsonl}")
for needed in "$model/config.json" "$text" "$other"; do
    [ -f "$needed" ] && continue
    echo "$needed: expected a file, got none; give MODEL, TEXT and OTHER_TEXT, or run \`make demo\`" >&2
    exit 1
done
cd "$clone"
unset PYTHONPATH # the clone must not be found

folder=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true; rm -rf "$folder"' EXIT
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
export VLLM_LOGGING_LEVEL=WARNING VLLM_CPU_KVCACHE_SPACE=1
python -c 'import sys, vllm_smoothquant as ours; sys.exit(not ours.__file__.startswith(sys.prefix) and ours.__file__)'
run() { echo "\$ $*"; "$@"; }
run smoothquant doctor
run smoothquant calibrate "$model" -o INT8 --dataset "$text" --samples 4 --seq-len 128
run smoothquant verify INT8
run smoothquant report INT8
run smoothquant evaluate INT8 --baseline "$model" --text "$other" --samples 4 --seq-len 128 --no-speed --enforce-eager
run python "$clone/examples/offline_batch.py" INT8 --enforce-eager

port=${PORT:-8765}
echo "\$ vllm serve INT8 --quantization smoothquant --port $port --enforce-eager"
vllm serve INT8 --quantization smoothquant --host 127.0.0.1 --port "$port" --enforce-eager >"$folder/serve.log" 2>&1 &
server=$!
until curl --silent --fail "http://127.0.0.1:$port/health"; do
    kill -0 "$server" || {
        cat "$folder/serve.log" >&2
        exit 1
    }
    sleep 1
done
run curl --silent --show-error --fail "http://127.0.0.1:$port/v1/completions" --header "Content-Type: application/json" \
    --data '{"model": "INT8", "prompt": "The heart pumps", "max_tokens": 16, "temperature": 0}'
echo
kill "$server"
wait "$server" || true
server=
say "done"
