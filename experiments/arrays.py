"""Named arrays in a file: numbers, booleans or strings, never objects, so that reading one runs nothing."""

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from rlhfjax.run_folder import write_atomically

# What NumPy and zipfile raise on a file that is not whole.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, KeyError, TypeError, OverflowError),
    *(NotImplementedError, RuntimeError, MemoryError, AttributeError, SyntaxError, IndexError),
)


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes PATH, an .npz: all of it or, where that fails, nothing. TypeError for an array of objects."""
    objects = [key for key, array in arrays.items() if array.dtype == object]
    if objects:
        raise TypeError(f"{path.stem}: {objects} cannot be kept; arrays of numbers, booleans or strings can")
    buffer = io.BytesIO()
    np.savez(buffer, **cast(dict[str, Any], arrays))
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays that `save_arrays` wrote. FileNotFoundError, or ValueError for a file that is damaged or not ours.

    What we write is not compressed, so nothing that is read grows beyond the size of its file.
    """
    content = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            grown = [
                entry.filename for entry in packed.infolist() if entry.compress_type != zipfile.ZIP_STORED
            ]
        if grown:
            raise ValueError(f"{grown} are compressed, and not written here")
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged ({error}); --resume the run to make it again") from error
