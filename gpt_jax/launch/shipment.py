"""The code that a launch ships: one commit, as a repository of that commit alone."""

import dataclasses
import hashlib
import io
import os
import pathlib
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Shipment:
    """What is shipped.

    Attributes:
      root: Of the repository.
      commit: Its HEAD.
      diff: From there to the files as they are, new ones too; empty: nothing is uncommitted.
    """

    root: pathlib.Path
    commit: str
    diff: bytes

    @property
    def described(self) -> str:
        """The commit in words."""
        if not self.diff:
            return self.commit[:12]
        digest = hashlib.sha256(self.diff).hexdigest()[:12]
        return f"{self.commit[:12]} and a diff of {len(self.diff):,} bytes, sha256 {digest}"


def shipment(folder: pathlib.Path, *, allow_dirty: bool = False) -> Shipment:
    """What lies in the repository around a folder.

    Raises:
      ValueError: It is no repository, has no commit, or files that are not committed.
    """
    try:
        root = pathlib.Path(_git(folder, "rev-parse", "--show-toplevel").decode().rstrip("\n"))
        commit = _git(root, "rev-parse", "--verify", "HEAD").decode().strip()
    except (subprocess.CalledProcessError, FileNotFoundError):
        raise ValueError(
            "--config: gpt_jax does not run from a git repository with a commit, and code is "
            "shipped by commit"
        ) from None
    changed = _git(root, "status", "--porcelain", "-z", "--no-renames").decode().split("\0")
    changed = [entry[3:] for entry in changed if entry]
    if not changed:
        return Shipment(root, commit, b"")
    if not allow_dirty:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(
            f"--allow_dirty: {', '.join(changed[:3])}{more}: not committed; commit, or give "
            "--allow_dirty to ship the differences too"
        )
    with tempfile.TemporaryDirectory() as scratch:
        # An index of our own: what the user has staged stays as it is.
        index = {"GIT_INDEX_FILE": str(pathlib.Path(scratch) / "index")}
        _git(root, "read-tree", "HEAD", env=index)
        _git(root, "add", "--all", env=index)
        diff = _git(root, "diff", "--cached", "--binary", "--no-ext-diff", "HEAD", env=index)
    return Shipment(root, commit, diff)


def pack(what: Shipment, job: str, archive: pathlib.Path) -> None:
    """Writes an archive: `code/`, the repository with this commit alone and the diff applied to it
    but not committed, so that a run's receipt has both, and `job.json`.

    Raises:
      ValueError: The repository has moved on since.
    """
    with tempfile.TemporaryDirectory() as scratch:
        code = pathlib.Path(scratch) / "code"
        code.mkdir()
        _git(code, "init", "--quiet")
        source = what.root.absolute().as_uri()
        _git(code, "fetch", "--quiet", "--depth=1", "--no-tags", source, "HEAD")
        if _git(code, "rev-parse", "FETCH_HEAD").decode().strip() != what.commit:
            raise ValueError("--config: a commit was made meanwhile; give the command again")
        _git(code, "checkout", "--quiet", "--detach", "FETCH_HEAD")
        (code / ".git" / "FETCH_HEAD").unlink()  # it names a folder of this machine
        if what.diff:
            _git(code, "apply", "--index", "--whitespace=nowarn", "-", stdin=what.diff)
        with tarfile.open(archive, "w:gz", compresslevel=6) as tar:
            tar.add(code, "code", filter=_owned_by_nobody)
            member, content = tarfile.TarInfo("job.json"), job.encode()
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _owned_by_nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _git(
    folder: pathlib.Path, *words: str, env: Mapping[str, str] | None = None, stdin: bytes = b""
) -> bytes:
    command = ["git", "-C", str(folder), *words]
    # A git hook that starts us would point git to its own repository.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment = {**clean, **(env or {})}
    done = subprocess.run(command, input=stdin, capture_output=True, check=True, env=environment)
    return done.stdout
