#!/usr/bin/env bash
# The tests as other machines would run them: other CPU kernels, other thread counts, other last bits, and bitsandbytes
# with and without its repacking of 4-bit weights. One line a run; the exit code is that of the worst.
#
#   scripts/portability.sh                 every setting, the tests marked numeric
#   scripts/portability.sh --all           every setting, the whole suite (about ten minutes each)
#   scripts/portability.sh --only NAME...  some settings
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
LOGS=${LOGS:-$(mktemp -d)}
marks='numeric and not gpu and not slow'
only=()
while (($#)); do
    case $1 in
        --all) marks='not gpu and not slow' ;;
        --only) shift; only=("$@"); break ;;
        *) echo "unknown word: $1" >&2; exit 2 ;;
    esac
    shift
done
# A processor lacks what it lacks: MKL_CBWR=AVX512 on an AVX2 machine is refused by MKL with a warning and changes nothing.
settings=(
    "plain"
    "mkl-compatible MKL_CBWR=COMPATIBLE"
    "mkl-avx2 MKL_CBWR=AVX2"
    "mkl-avx512 MKL_CBWR=AVX512"
    "aten-default ATEN_CPU_CAPABILITY=default"
    "onednn-avx2 ONEDNN_MAX_CPU_ISA=AVX2"
    "threads-2 OMP_NUM_THREADS=2"
    "threads-4 OMP_NUM_THREADS=4"
    "disturbed PEFTCLI_TEST_DISTURBED=1"
    "compatible-disturbed MKL_CBWR=COMPATIBLE PEFTCLI_TEST_DISTURBED=1"
    "repacking-on PEFTCLI_TEST_REPACKING=on"
    "repacking-off PEFTCLI_TEST_REPACKING=off"
)
worst=0
for setting in "${settings[@]}"; do
    read -r name variables <<<"$setting"
    if ((${#only[@]})) && [[ ! " ${only[*]} " == *" $name "* ]]; then continue; fi
    # shellcheck disable=SC2086  # the variables are words
    env $variables "$PYTHON" -m pytest -q -n 2 --dist loadgroup -p no:cacheprovider -m "$marks" >"$LOGS/$name.txt" 2>&1
    code=$?
    printf '%-22s %s\n' "$name" "$(tail -n 1 "$LOGS/$name.txt")"
    ((code > worst)) && worst=$code
done
((worst)) && echo "the output of each run is in $LOGS" >&2
exit "$worst"
