"""Finds the files of an input that is a folder: an LMDB, or Arrow files of HuggingFace datasets."""

import json
import os
import re
from collections import Counter

from megatron.errors import DataError

_SHARD = re.compile(r"(.*)-\d+-of-(\d+)\.arrow")


def files_of(path: str) -> list[str]:
    """The files to read for the input `path`: itself or, in order, those of a folder with an LMDB or Arrow files.

    Raises DataError for any other folder.
    """
    if not os.path.isdir(path):
        return [path]
    try:
        found = sorted(os.listdir(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give files of proteins") from None
    if "data.mdb" in found:
        return [os.path.join(path, "data.mdb")]
    if "dataset_dict.json" in found:
        raise DataError(f"{path}: is a DatasetDict of HuggingFace; name its parts, for example {path}/train")
    if any(name.endswith(".arrow") for name in found):
        return [os.path.join(path, name) for name in _arrow_files(path, found)]
    raise DataError(f"{path}: is a folder, and neither LMDB (it has no data.mdb) nor of Arrow files; give files "
                    "of proteins, or patterns such as 'FOLDER/*.fasta'")


def _arrow_files(path: str, found: list[str]) -> list[str]:
    """The Arrow files of a folder, in the order of its `state.json`, or else by name; raises DataError if some lack."""
    listed = _listed(path) if "state.json" in found else []
    names = listed or [name for name in found if name.endswith(".arrow")]
    if not listed and any(name.startswith("cache-") for name in names):
        raise DataError(f"{path}: holds results of HuggingFace's map() (cache-*.arrow) beside the data; name the files "
                        "themselves")
    shards = Counter((match[1], int(match[2])) for name in names if (match := _SHARD.fullmatch(name)))
    lost = [name for name in names if name not in found]
    lost += [f"one of {stem}-*-of-{total:05}.arrow" for (stem, total), number in shards.items() if number != total]
    if lost:
        raise DataError(f"{path}: has lost {lost[0]}; copy it again")
    return names


def _listed(path: str) -> list[str]:
    """The files listed in the `state.json` of HuggingFace's save_to_disk; raises DataError."""
    try:
        with open(os.path.join(path, "state.json"), encoding="utf-8") as file:
            state = json.load(file)
        listed = [str(entry["filename"]) for entry in state.get("_data_files") or []]
        is_selection = state.get("_indices_files") or state.get("_indices_data_files")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise DataError(f"{path}/state.json: not the list of Arrow files that HuggingFace's save_to_disk writes; "
                        "save it again") from None
    if is_selection:
        raise DataError(f"{path}: is a selection of rows by their numbers; flatten_indices() before save_to_disk()")
    return listed
