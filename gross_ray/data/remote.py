"""Copies of Parquet files from a store like s3:// to this machine, where many processes can read them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from gross_ray.atomic import whole_or_not_at_all
from gross_ray.data.image_files import size_and_time
from gross_ray.errors import DatasetError, InvalidValueError, StorageError, one_line
from gross_ray.storage import Storage


def copied(name: str, address: str, ending: str, root: str, note: Callable[[str], object]) -> Path:
    """Copy the files with this ending at a URI, of a folder or of one file, to ROOT/parquet; return where they are.

    Files with the size and time of those at the URI are not copied again, and files that are no longer there are
    deleted. Credentials come from the environment. `name` is the dataset's, for errors. Raises DatasetError if the
    store cannot be read, or the files cannot be written.
    """
    folder = Path(root).expanduser() / "parquet" / hashlib.sha256(address.encode()).hexdigest()[:16]
    base, separator, query = address.partition("?")
    above, _, only = base.rpartition("/") if base.endswith(ending) else (base, "", "")
    try:
        store = Storage(above + separator + query)
        found = {file: rest for file, *rest in store.all_files() if (file == only if only else file.endswith(ending))}
        if not found:
            raise DatasetError(f"{name}: there is no {ending} file at {base}; name a file, or a folder with such files")
        missing = {file: rest for file, rest in found.items() if size_and_time(folder / file) != rest}
        if missing:
            size = sum(size for size, _ in missing.values()) / 1e9
            note(f"{name}: copying {len(missing):,} files, {size:.2f} GB, to {folder}")
        for file, (_, time) in missing.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            with whole_or_not_at_all(folder / file) as path:
                path.write_bytes(store.read(file))
                os.utime(path, ns=(time, time))
        for path in [*folder.rglob(f"*{ending}")]:
            if str(path.relative_to(folder)) not in found:
                path.unlink()
    except (StorageError, InvalidValueError) as error:
        raise DatasetError(f"parquet: {error}") from error  # the name may have a secret
    except OSError as error:
        text = f"its files cannot be copied to {folder} ({one_line(error)})"
        raise DatasetError(f"{name}: {text}; make room there, or name another folder with --data-root") from error
    return folder / only if only else folder
