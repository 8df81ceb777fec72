#!/usr/bin/env python3
"""A gcloud whose one host is the folder $FAKE_HOST_HOME: commands for it are really run there.

What would install something is a stub. The slices are taken away once, when a checkpoint is there.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

cloud = pathlib.Path(os.environ["FAKE_CLOUD"])
home, buckets = pathlib.Path(os.environ["FAKE_HOST_HOME"]), os.environ["FAKE_BUCKETS"]
words = sys.argv[1:]
verb = "describe_slice" if words[2] == "tpu-vm" else words[3]
state = cloud / "state"  # of the queued resource; absent: there is none
STUBS = {
    "sudo": '"$@"',
    "mountpoint": 'test -L "$2"',
    # The last two words are the bucket and where it is to appear.
    "gcsfuse": f'shift 3; rmdir "$2" && ln -s {buckets}/"$1" "$2"',
    "uv": 'if [ "$1" = venv ]; then for last; do :; done; mkdir -p "$last/bin"; '
    f'printf \'#!/bin/sh\\nexec {sys.executable} "$@"\\n\' > "$last/bin/python"; '
    'chmod +x "$last/bin/python"; fi',
}


def take_away() -> None:
    """What a machine does that goes: SIGTERM, a moment, and it is gone with its disk."""
    for runner in home.glob("gpt-jax/*/runner.json"):
        pid = json.loads(runner.read_text())["pid"]
        try:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        while pathlib.Path(f"/proc/{pid}").exists():
            pass
    shutil.rmtree(home, ignore_errors=True)


if verb in ("describe", "delete") and not state.exists():
    sys.exit("ERROR: (gcloud) NOT_FOUND: it is not there")
if verb == "create":
    home.mkdir(parents=True, exist_ok=True)
    state.write_text("ACTIVE")
if verb == "delete":
    take_away()
    state.unlink()
if verb == "describe":
    once = cloud / "was_taken"
    if not once.exists() and list(pathlib.Path(buckets).glob("*/runs/a/checkpoints/1*")):
        once.touch()
        take_away()
        state.write_text("SUSPENDED")
    print(json.dumps({"state": {"state": state.read_text()}}))
if verb == "describe_slice":
    print(json.dumps({"networkEndpoints": [{}]}))
if verb == "scp":
    shutil.copy(words[4], home)
if verb == "ssh":
    stubs = home / "stubs"
    stubs.mkdir(exist_ok=True)
    for name, does in STUBS.items():
        (stubs / name).write_text(f"#!/bin/sh\n{does}\n")
        (stubs / name).chmod(0o755)
    command = words[-1].removeprefix("--command=")
    kept = ("GPT_JAX_CACHE", "JAX_PLATFORMS", "LANG")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"HOME": str(home), "PATH": f"{stubs}:/usr/local/bin:/usr/bin:/bin"}
    sys.exit(subprocess.run(["bash", "-c", command], cwd=home, env=environment).returncode)
