#!/usr/bin/env bash
# Pack, as wheels, what a GPU machine without a package index lacks: all that peftcli needs except torch and the
# packages of companions.txt. About 25 MB, at most 40.
#
#   scripts/gpu/pack.sh [FOLDER] [--python 3.12] [--cuda 130] [NAME==VERSION ...]
#
# FOLDER (default wheels) is made and must be empty. --cuda is the CUDA version of that machine's torch without its dot;
# of the libraries in the wheel of bitsandbytes only that one and the one for CPUs are kept. Further NAME==VERSION words
# are added without what they need in turn. PYTHON (default python3) runs pip; it need not be the packed version.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
folder=wheels target=3.12 cuda=130 most=40
more=()
while (($#)); do
    case $1 in
        --python) target=$2; shift ;;
        --cuda) cuda=${2//./}; shift ;;
        --*) echo "error: $1 is not an option; the options are --python and --cuda" >&2; exit 2 ;;
        *==*) more+=("$1") ;;
        *) folder=$1 ;;
    esac
    shift
done
mkdir -p "$folder"
if [[ -n $(ls -A "$folder") ]]; then
    echo "error: $folder is not empty; name another folder, since two versions of a package stop the installation" >&2
    exit 2
fi
fetch=("$python" -m pip download --quiet --dest "$folder" --only-binary=:all: --python-version "$target"
    --implementation cp --constraint "$here/../../constraints.txt")
for version in 39 35 34 31 28 27 24 17; do fetch+=(--platform "manylinux_2_${version}_x86_64"); done
fetch+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
# Without what they need in turn, which is torch and the companions.
"${fetch[@]}" --no-deps trl transformers peft datasets bitsandbytes liger-kernel==0.8.5 rapidfuzz typing-extensions \
    'dill<0.4.2' 'multiprocess<0.70.20' "${more[@]}"
# With what it needs: pydantic-core has to be of exactly the version that pydantic names.
"${fetch[@]}" pydantic
# Published as source only; it is plain Python.
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" --constraint "$here/../../constraints.txt" seqeval
"$python" "$here/cut_wheel.py" "$folder"/bitsandbytes-*.whl "cuda$cuda" cpu
size=$(du -sm "$folder" | cut -f1)
echo "$folder: $(find "$folder" -name '*.whl' | wc -l) wheels for Python $target and CUDA $cuda, $size MB"
if ((size > most)); then
    echo "error: that is more than $most MB; leave out some of: ${more[*]:-}" >&2
    exit 1
fi
