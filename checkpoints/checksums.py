"""The checksum beside a checkpoint, in the form of sha256sum."""

import hashlib
from pathlib import Path


def checksum_file(path: Path) -> Path:
    """Where the checksum of a file lies."""
    return path.with_name(f"{path.name}.sha256")


def checksum_line(path: Path, name: str) -> str:
    """The checksum of a file, as `sha256sum --check` reads it, under the name it will have."""
    return f"{_sha256(path)}  {name}\n"


def matches_checksum(path: Path) -> bool:
    """Whether a file is as its checksum says; True without one."""
    checksum = checksum_file(path)
    words = checksum.read_text(errors="replace").split() if checksum.is_file() else []
    return not words or words[0] == _sha256(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
