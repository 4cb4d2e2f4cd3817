"""Lists the files of the inputs of the text writer, folders sorted by path."""

from collections.abc import Sequence
from typing import Any

from titan_attent.data.io.remote import InputPath
from titan_attent.data.io.walk import LeftOut
from titan_attent.data.text.folders import is_metadata, list_folder
from titan_attent.data.text.input_files import RECORD_EXTENSIONS, TEXT_EXTENSIONS, InputFile, list_named_file
from titan_attent.data.text.records import TEXT_RECORDS, Records
from titan_attent.data.text.saved_folder import list_saved_folder

__all__ = ["TEXT_EXTENSIONS", "InputFile", "list_files"]


def list_files(
    inputs: Sequence[tuple[str, InputPath]],
    *,
    extensions: Sequence[str] | None = None,
    records: Records = TEXT_RECORDS,
    left_out: LeftOut | None = None,
    skip: bool = False,
) -> list[InputFile]:
    """The files of ``inputs``, folders by path, without hidden ones.

    Args:
        inputs: source and path of each input, from :func:`titan_attent.data.io.inputs.parse_any_inputs`.
        extensions: the extensions to read of a folder (``txt``), for records and texts; None for the rule of
            folders.py.
        records: the keys of the text, for .json files.
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
            listing: dict[str, Any] = {"source": source, "extensions": extensions, "left_out": omitted}
            saved_files = list_saved_folder(path, **listing)
            folder_files = saved_files or list_folder(path, records=records.of(source), **listing)
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
            one = list_named_file(path, source=source, extensions=text_extensions, records=records.of(source))
            files.append(one)
    return files
