#!/usr/bin/env bash
# Prove peftcli on a GPU, in one command; see README.md beside this file.
#
#   scripts/gpu/prove.sh a             kernels, trainings, memory, resume, commands, speed: at most 590 s
#   scripts/gpu/prove.sh b             whole trainings beside plain SFTTrainer: at most 200 s
#   scripts/gpu/prove.sh a --tiny      for a GPU of 16 GB, as Kaggle and Colab have it: at most 1800 s
#   scripts/gpu/prove.sh --rehearse    the same steps on a CPU at tiny shapes
#
# Options: --wheels FOLDER (install these first, without a package index), --out FOLDER (of the JSON), --collect FILE
# (all JSON in one file), --only STEP (may be repeated). PYTHON (default python3) runs everything.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "${PYTHON:-python3}" "$root/scripts/gpu/prove.py" "$@"
