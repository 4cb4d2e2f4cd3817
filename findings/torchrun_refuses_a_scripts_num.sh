#!/usr/bin/env bash
# torch 2.13: torchrun refuses options of the script that it starts, such as --num 8.
#
# Expected: what follows the script's name is the script's. torchrun declares it as argparse.REMAINDER.
# Seen: argparse compares every word of the command line with torchrun's own options first, also as an abbreviation, and
# ends where it finds two: "ambiguous option: --num could match --numa-binding, --numa_binding". torchrun declares most
# of its options in two spellings, so any beginning of such a name is refused: --num, --no, --max, --log, --node, --start.
# A script with such an option cannot be started by torchrun. With allow_abbrev=False in its parser it could.
#
# Exit 0 while this is so, 1 once it changes. Needs Python 3.10 or newer and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
echo 'import sys; print("script:", sys.argv[1:])' > "$folder/script.py"
"$folder/venv/bin/python" -c 'import sys, torch; print("torch", torch.__version__, "python", sys.version.split()[0])'
"$folder/venv/bin/torchrun" --nproc-per-node 1 "$folder/script.py" --ids 8 2> "$folder/errors" || true
changed=0
for option in --num --max --log; do
    if "$folder/venv/bin/torchrun" --nproc-per-node 1 "$folder/script.py" "$option" 8 2> "$folder/errors"; then
        echo "$option: passed on"
        changed=1
    else
        grep -o "ambiguous option.*" "$folder/errors"
    fi
done
exit "$changed"
