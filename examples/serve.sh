#!/bin/sh
# Serve a checkpoint over the OpenAI API, ask it one question with curl, stop the server.
#
#   sh examples/serve.sh SmolLM2-INT8 [more arguments of vllm serve]        PORT=8000 sets the port
set -eu

checkpoint=${1:?usage: sh examples/serve.sh CHECKPOINT [vllm serve arguments]}
shift
url=http://127.0.0.1:${PORT:=8000}

vllm serve "$checkpoint" --quantization smoothquant --served-model-name int8 --host 127.0.0.1 --port "$PORT" "$@" &
server=$!
trap 'kill $server 2>/dev/null; wait $server || true' EXIT INT TERM

until curl --silent --fail --output /dev/null "$url/health"; do
    kill -0 $server || exit 1 # the server has ended; its output has the reason
    sleep 1
done

curl --silent --fail --show-error "$url/v1/chat/completions" --header 'Content-Type: application/json' --data '{
    "model": "int8",
    "messages": [{"role": "user", "content": "What is the name of the capital city of France?"}],
    "temperature": 0,
    "max_tokens": 40
}'
echo
