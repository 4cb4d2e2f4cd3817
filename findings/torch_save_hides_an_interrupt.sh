#!/usr/bin/env bash
# torch 2.13: Ctrl-C while torch.save writes into a stream arrives as a RuntimeError about positions.
#
# Expected: torch.save(tensor, stream) passes on what stream.write raises, so KeyboardInterrupt ends the program.
# Seen: of the 39 writes of a small tensor, 20 turn it into RuntimeError("... unexpected pos 704 vs 598"), the one of the
# tensor's bytes, by far the longest, among them; the other 19 pass it on. The archive is closed while the exception is on
# its way; closing writes the end of the current record, does not find the position that it expects, and raises. That
# error replaces the first one, which is left in __context__ only. An OSError that is raised once is replaced as well.
# So programs that save into streams (fsspec, wrappers that hash or count) have to look at __context__: `except
# KeyboardInterrupt` around a save does not match, and one that tries again after a RuntimeError tries after Ctrl-C.
#
# Exit 0 while this is so, 1 once it changes. Needs Python 3.10 or newer and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import io
import sys

import torch

print("torch", torch.__version__)


class Interrupted(io.RawIOBase):
    """Raises KeyboardInterrupt in the write of this number, which counts from 1."""

    def __init__(self, number):
        self.number, self.sizes = number, []

    def writable(self):
        return True

    def write(self, data):
        self.sizes.append(len(data))
        if len(self.sizes) == self.number:
            raise KeyboardInterrupt
        return len(data)


tensor, whole = torch.zeros(1000), Interrupted(0)
torch.save(tensor, whole)
of_data = 1 + whole.sizes.index(max(whole.sizes))
hidden = []
for number in range(1, len(whole.sizes) + 1):
    try:
        torch.save(tensor, Interrupted(number))
    except KeyboardInterrupt:
        pass
    except RuntimeError as error:
        assert isinstance(error.__context__, KeyboardInterrupt)
        hidden.append(number)
        if number == of_data:
            print(f"write {number}, the tensor's bytes:", str(error).partition("] . ")[2].splitlines()[0])
print(f"{len(hidden)} of {len(whole.sizes)} writes turn KeyboardInterrupt into RuntimeError:", *hidden)
if len(hidden) != 20 or of_data not in hidden:
    sys.exit("this has changed")
PY
