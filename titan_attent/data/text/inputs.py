"""Lists the files of the inputs of the text writer, folders sorted by path."""

from collections.abc import Sequence
from pathlib import Path

from titan_attent.data.io.walk import LeftOut
from titan_attent.data.text.folders import is_metadata, list_folder
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
        inputs: source and path of each input, from :func:`titan_attent.data.io.inputs.parse_inputs`.
        extensions: the extensions to read of a folder (``txt``), for records and texts; None for the rule of
            folders.py.
        text_key: the key of the text in .json records.
        left_out: counts the files that are not read.
        skip: accept folders with more files left out than read.

    Raises:
        ValueError: an input is missing or has an unknown extension, a folder has no file to read, or it has more data
            files left out than read (without ``skip``).
    """
    files: list[InputFile] = []
    for source, path in inputs:
        if path.is_dir():
            omitted = LeftOut()
            folder_files = list_folder(path, source=source, extensions=extensions, text_key=text_key, left_out=omitted)
            if left_out is not None:
                left_out.update(omitted)
            if not folder_files:
                expected = extensions if extensions is not None else TEXT_EXTENSIONS
                details = f" ({omitted.summary()})" if omitted else ""
                raise ValueError(
                    f"{path}: this folder has no file with extension {', '.join(expected)}"
                    f"{'' if extensions is not None else ', or ' + ', '.join(RECORD_EXTENSIONS)}{details}; give the "
                    "extensions to read with --extensions"
                )
            # A README beside data files is not data.
            num_data = sum(file.kind != "text" or not is_metadata(file.path) for file in folder_files)
            if extensions is None and not skip and omitted.num_counted > num_data:
                raise ValueError(
                    f"{path}: {omitted.summary()}, and only {len(folder_files)} files to read, {num_data} of them not "
                    "metadata such as a README; give the extensions to read with --extensions, or leave out the other "
                    "files with --on-bad skip"
                )
            files += folder_files
        else:
            text_extensions = TEXT_EXTENSIONS if extensions is None else extensions
            files.append(list_named_file(path, source=source, extensions=text_extensions, text_key=text_key))
    return files
