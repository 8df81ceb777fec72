"""What programs that a model wrote can and cannot do."""

import subprocess
import sys
import time

import pytest

from gpt_jax.tasks import sandbox, sandbox_child
from gpt_jax.tasks.sandbox import BARRIERS, Limits, barriers, run_program, run_programs

LIMITS = Limits(seconds=10.0, memory_mb=256)
held = pytest.mark.skipif(
    set(barriers()) < set(BARRIERS), reason="this kernel has neither Landlock nor seccomp"
)


def run(source, limits=LIMITS):
    return run_program(source, limits, allow_code_execution=True)


def test_nothing_runs_unless_it_is_allowed():
    with pytest.raises(ValueError, match=r"^allow_code_execution: False"):
        run_program("")
    with pytest.raises(ValueError, match=r"^allow_code_execution: False"):
        run_programs([""])


def test_a_right_program_passes():
    outcome = run("import math, json, random\nassert math.sqrt(4) == 2\nprint('é')")
    assert outcome.passed and not outcome.reason and outcome.output == "é\n"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 + 1 == 3, 'sum'", "AssertionError: sum"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "exit status 0"),
        ("import os; os.abort()", "signal"),
        ("x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError"),
        ("with open('a', 'wb') as f:\n while True: f.write(bytes(1 << 16))", "OSError"),
        ("while True: print('x' * 999)", ""),
    ],
)
def test_a_wrong_program_fails(source, reason):
    outcome = run(source)
    assert not outcome.passed and outcome.reason.startswith(reason)
    assert len(outcome.output) <= 2000


def test_an_endless_loop_ends():
    for source in ("while True: pass", "import time; time.sleep(60)"):
        start = time.monotonic()
        assert run(source, Limits(seconds=0.5)).reason == "time limit"
        assert time.monotonic() - start < 5


def test_programs_have_a_folder_of_their_own_that_goes(tmp_path):
    outcome = run("open('a', 'w').write('x')\nimport os\nos.mkdir('b')\nprint(os.getcwd())")
    assert outcome.passed
    assert not sandbox.Path(outcome.output.strip()).exists()


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET", "s")
    outcome = run("import os; print(sorted(set(os.environ) - {'HOME', 'TMPDIR', 'LANG'}))")
    assert outcome.output == "[]\n"


FORBIDDEN = {
    "write": "open({path!r}, 'w')",
    "write into the library": "import os; open(os.path.dirname(os.__file__) + '/of_a_test', 'w')",
    "append": "open({path!r}, 'a')",
    "read": "open({path!r}).read()",
    "list": "import os; os.listdir({folder!r})",
    "delete": "import os; os.remove({path!r})",
    "mode": "import os; os.chmod({path!r}, 0o777)",
    "rename": "import os; os.rename({path!r}, 'mine')",
    "shorten": "import os; os.truncate({path!r}, 0)",
    "connect": "import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
    "listen": "import socket; socket.create_server(('127.0.0.1', 0))",
    "fork": "import os; os.fork()",
    "thread": "import threading; threading.Thread(target=print).start()",
    "command": "import subprocess; subprocess.run(['true'])",
    "shell": "import os; assert os.system('true') == 0",
    "signal": "import os; os.kill(os.getppid(), 0)",
    "limits": "import resource as r; r.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40))",
    "parent's environment": "import os; open(f'/proc/{{os.getppid()}}/environ').read()",
}


@pytest.fixture
def outside(tmp_path):
    """A file of somebody else, and a port on which somebody listens."""
    import socket

    path = tmp_path / "theirs.txt"
    path.write_text("theirs")
    path.chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        yield {"path": str(path), "folder": str(tmp_path), "port": port}
    assert path.read_text() == "theirs" and path.stat().st_mode & 0o777 == 0o644
    assert [file.name for file in tmp_path.iterdir()] == ["theirs.txt"]


@held
@pytest.mark.parametrize("name", FORBIDDEN)
def test_barriers(name, outside):
    assert not run(FORBIDDEN[name].format(**outside)).passed


@held
def test_barriers_are_not_pythons(outside):
    """C functions called past Python fail too."""
    source = (
        "import ctypes, os\nc = ctypes.CDLL(None)\n"
        "assert c.open({path!r}.encode(), os.O_WRONLY | os.O_TRUNC) == -1\n"
        "assert c.open(b'/etc/hostname', 0) == -1\n"
        "assert c.fork() == -1 and c.socket(2, 1, 0) == -1 and c.kill(os.getppid(), 0) == -1\n"
        "assert c.execv(b'/bin/true', None) == -1 and c.unlink({path!r}.encode()) == -1\n"
    )
    outcome = run(source.format(**outside))
    assert outcome.passed, outcome.reason


# What the fence cannot see: a thread begins without an event.
@pytest.mark.parametrize("name", [name for name in FORBIDDEN if name not in ("thread", "list")])
def test_fence_where_there_are_no_barriers(name, outside, tmp_path_factory):
    """The audit hook alone refuses the same, and still lets programs work."""
    folder = tmp_path_factory.mktemp("folder")
    source = FORBIDDEN[name].format(**outside)
    program = (
        f"import os, sys; sys.path.insert(0, {str(sandbox._CHILD.parent)!r})\n"
        "import sandbox_child\n"
        "sandbox_child.put_up_fence(os.getcwd(), [os.path.dirname(os.__file__)])\n"
        "import fractions\nopen('mine', 'w').close(); os.remove('mine')\n"
        f"try:\n  exec({source!r})\nexcept PermissionError as e:\n  print('refused', e)\n"
    )
    command = [sys.executable, "-I", "-S", "-B", "-c", program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("refused"), done.stderr


def test_a_missing_barrier_is_said(monkeypatch):
    monkeypatch.setattr(sandbox, "barriers", lambda: ("files",))
    with pytest.warns(UserWarning, match="no barrier around calls"):
        assert run_program("", LIMITS, allow_code_execution=True).passed


def test_several_programs_keep_their_order():
    sources = [f"assert {i} % 2 == 0" for i in range(6)]
    outcomes = run_programs(sources, LIMITS, allow_code_execution=True)
    assert [outcome.passed for outcome in outcomes] == [True, False] * 3


def test_denied_calls_are_listed_for_both_machines():
    tables = sandbox_child._DENIED
    assert set(tables) == set(sandbox_child._AUDIT_ARCH)
    assert tables["x86_64"].keys() == tables["aarch64"].keys()
