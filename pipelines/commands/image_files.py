"""The command `gross data`: list, verify and delete files of images."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import click

from gross_ray.data.image_files import ROOT, ImageFiles, all_files, folder_of
from gross_ray.errors import InvalidValueError

ALL = "all"


def data(keys: Sequence[str], *, verify: bool, clear: bool, root: str | None) -> None:
    """Print a line for each dataset with files; compare them with their hashes, or delete them.

    If images have changed, it ends with an error and the exit status 1. Raises InvalidValueError for an unknown key and
    for --clear without one.
    """
    if clear and verify:
        raise InvalidValueError("--clear with --verify: choose one of them")
    if clear and not keys:
        raise InvalidValueError(f"--clear: name the KEYs whose files are deleted, or {ALL}: gross data {ALL} --clear")
    root = root or ROOT
    found = {files.key: files for files in all_files(root)}
    if unknown := [key for key in keys if key not in found and key != ALL]:
        rule = f"there are no such files in {folder_of(root)}; known keys: {', '.join(found) or 'none'}"
        raise InvalidValueError(f"KEY = {unknown[0]!r}: {rule}")
    chosen = [*found.values()] if not keys or ALL in keys else [found[key] for key in keys]
    if not chosen:
        click.echo(f"no files of images in {folder_of(root)}")
    else:
        click.echo(f"files of images in {folder_of(root)}:", err=True)
    changed = []
    for files in chosen:
        line, complete = _line(files)
        if clear:
            _delete(files)
            line += "  deleted"
        elif verify and complete:
            good = files.verify()
            line += "  verified" if good else "  CHANGED"
            changed += [] if good else [files.key]
        click.echo(line)
    if changed:
        rule = "their images are not those that were read; delete them with --clear, and they are read again"
        click.echo(f"Error: {', '.join(changed)}: {rule}", err=True)
        raise click.exceptions.Exit(1)  # nothing that the user has typed is wrong


def _line(files: ImageFiles) -> tuple[str, bool]:
    """Return the line for a dataset's files, and whether they are complete."""
    size = sum(path.stat().st_size for path in files.folder.iterdir()) / 1e6
    described, (name, done, total) = files.description(), files.progress()
    if described is None:
        return f"{files.key}  {size:10,.1f} MB  {done:,} of {total:,} images, not complete  {name}", False
    _, _, height, width = described["splits"]["train"]["shape"]
    return f"{files.key}  {size:10,.1f} MB  {total:,} images of {height}x{width}, {files.read_at()}  {name}", True


def _delete(files: ImageFiles) -> None:
    with files.locked(lambda text: click.echo(text, err=True)):
        shutil.rmtree(files.folder)
