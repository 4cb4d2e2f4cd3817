"""Files that the inputs of the writer of text hold, listed once, folders by path."""

from collections.abc import Sequence
from pathlib import Path

from titan_attent.data.io.walk import LeftOut
from titan_attent.data.text.folders import is_about, list_folder
from titan_attent.data.text.input_files import RECORD_EXTENSIONS, TEXT_EXTENSIONS, InputFile, list_named_file

__all__ = ["TEXT_EXTENSIONS", "InputFile", "list_files"]


def list_files(
    inputs: Sequence[tuple[str, Path]],
    *,
    extensions: Sequence[str] | None = None,
    text_key: str = "text",
    left_out: LeftOut | None = None,
    skip: bool = False,
) -> list[InputFile]:
    """The files of ``inputs``, folders by path, without hidden ones.

    Args:
        inputs: source and path of each, of :func:`~.inputs.parse_inputs`.
        extensions: what is read of a folder (``txt``), records and texts alike; None for the rule of folders.py.
        text_key: of .json files that are records.
        left_out: counts what is not read.
        skip: leave out also where that is the greater part.

    Raises:
        ValueError: an input is missing or of unknown extension, or a folder has no file to read, or more that are not
            read than are.
    """
    files: list[InputFile] = []
    for source, path in inputs:
        if path.is_dir():
            here = LeftOut()
            found = list_folder(path, source=source, extensions=extensions, text_key=text_key, left_out=here)
            if left_out is not None:
                left_out.update(here)
            if not found:
                wanted = extensions if extensions is not None else TEXT_EXTENSIONS
                told = f" ({here.summary()})" if here else ""
                raise ValueError(
                    f"{path}: this folder has no file with extension {', '.join(wanted)}"
                    f"{'' if extensions is not None else ', and none of ' + ', '.join(RECORD_EXTENSIONS)}{told}; name "
                    "those to read with --extensions"
                )
            # A README beside data is none.
            num_data = sum(file.kind != "text" or not is_about(file.path) for file in found)
            if extensions is None and not skip and here.num_counted > num_data:
                raise ValueError(
                    f"{path}: {here.summary()}, and only {len(found)} files to read, {num_data} of them no README or "
                    "licence; name those to read with --extensions, or leave out the others with --on-bad skip"
                )
            files += found
        else:
            known = TEXT_EXTENSIONS if extensions is None else extensions
            files.append(list_named_file(path, source=source, extensions=known, text_key=text_key))
    return files
