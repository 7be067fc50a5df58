"""Writing files so that nothing half-written is ever left behind."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["output_folder", "replacing", "to_json", "write_json"]


class replacing:
    """``with replacing(path) as temporary``: what is written to `temporary` becomes `path` if all goes well."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], record: Any) -> None:
    """Write a record as JSON; see :func:`to_json`."""
    with replacing(path) as temporary:
        temporary.write_text(to_json(record, indent=1) + "\n", encoding="utf-8")


def to_json(record: Any, indent: int | None = None) -> str:
    """A record as JSON; NaN and infinity, which JSON does not have, become null. On one line it is ASCII, for any terminal."""
    return json.dumps(_finite(record), indent=indent, ensure_ascii=indent is None, allow_nan=False)


def output_folder(path: str | os.PathLike[str]) -> Path:
    """Make the folder if it is missing and prove that files can be written there, before any work.

    Raises
    ------
    OSError
        If it cannot be made or written to.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"cannot write to the output folder {path}: {error.strerror or error}") from error
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
