"""The inside of the sandbox: locks itself in, then runs one program.  Started by `sandbox.py`.

Barriers are the kernel's and cannot be taken down from inside: resource limits, Landlock (files:
read Python's own library, write the working folder), a seccomp filter (no sockets, no processes, no
signals, no new rights) and the loss of all capabilities.  They are up before the program's first
line.  Where the kernel lacks one, an audit hook refuses the same things: a fence, which stops
accidents, but not a program that calls C functions by itself.

Standard library only; nothing of this file may be imported by the rest of the package.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import struct
import sys
import traceback

# System calls that a program needs for nothing that it is asked to do.
_DENIED = {
    "x86_64": {
        "network": (41, 42, 43, 44, 49, 50, 53, 425),  # socket ... socketpair, io_uring_setup
        "processes": (56, 57, 58, 59, 322, 435),  # clone, fork, vfork, execve, execveat, clone3
        "others' processes": (62, 101, 200, 234, 310, 311, 424, 434, 438),  # kill, ptrace ...
        "owners, modes, times": (76, 90, 91, 92, 93, 94, 132, 188, 189, 190, 197, 198, 199,
                                 235, 260, 261, 268, 280, 452),
        "rights": (155, 160, 161, 165, 166, 248, 249, 250, 272, 298, 302, 308, 321, 323),
    },
    "aarch64": {
        "network": (198, 199, 200, 201, 202, 203, 206, 425),
        "processes": (220, 221, 281, 435),
        "others' processes": (117, 129, 130, 131, 270, 271, 424, 434, 438),
        "owners, modes, times": (5, 6, 7, 14, 15, 16, 45, 52, 53, 54, 55, 88, 452),
        "rights": (39, 40, 41, 51, 97, 164, 217, 218, 219, 241, 261, 268, 280, 282),
    },
}  # fmt: skip
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ = 1 << 2 | 1 << 3  # files, folders


def limit_resources(limits: dict) -> None:
    """Time, memory, size of a file, open files; no core dumps, no processes."""
    seconds = int(limits["seconds"]) + 1
    for name, value in (
        ("RLIMIT_AS", limits["memory_mb"] << 20),
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_FSIZE", limits["file_mb"] << 20),
        ("RLIMIT_NOFILE", 32),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NPROC", 0),  # the kernel does not hold root to it; the filter below does
    ):
        if hasattr(resource, name):
            resource.setrlimit(getattr(resource, name), (value, value))


def give_up_rights(libc) -> bool:
    """No capabilities, and no way to gain any."""
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    return libc.prctl(38, 1, 0, 0, 0) == 0 and libc.capset(header, nothing) == 0


def restrict_files(libc, folder: str, readable: list[str]) -> bool:
    """Landlock: everything below `folder`, reading below `readable`, and nothing else."""
    version = libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return False
    num_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    handled = (1 << num_rights) - 1
    rules = libc.syscall(_LANDLOCK_CREATE, struct.pack("Q", handled), 8, 0)
    if rules < 0:
        return False
    for path, allowed in [(folder, handled & ~1), *((path, _READ) for path in readable)]:
        try:
            place = os.open(path, os.O_PATH)
        except OSError:
            continue
        if not os.path.isdir(path):
            allowed &= ~(1 << 3)
        libc.syscall(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    done = libc.syscall(_LANDLOCK_RESTRICT, rules, 0) == 0
    os.close(rules)
    return done


def restrict_calls(libc) -> bool:
    """seccomp: the calls of _DENIED fail with EPERM."""
    machine = platform.machine()
    if machine not in _DENIED:
        return False
    denied = sorted(number for group in _DENIED[machine].values() for number in group)
    load, equal, at_least, ret = 0x20, 0x15, 0x35, 0x06
    deny, allow, kill = 0x00050001, 0x7FFF0000, 0x80000000
    program = [(load, 0, 0, 4), (equal, 1, 0, _AUDIT_ARCH[machine]), (ret, 0, 0, kill)]
    program += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (ret, 0, 0, deny)]
    for number in denied:
        program += [(equal, 0, 1, number), (ret, 0, 0, deny)]
    program += [(ret, 0, 0, allow)]
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_ = struct.pack("HxxxxxxP", len(program), ctypes.addressof(buffer))
    return libc.prctl(22, 2, filter_, 0, 0) == 0


def put_up_fence(folder: str, readable: list[str]) -> None:
    """An audit hook with the same rules, for systems without those barriers."""
    inside = (os.path.realpath(folder) + os.sep,)
    known = (*inside, *(path if os.path.isfile(path) else path + os.sep for path in readable))
    forbidden = ("socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.system",
                 "os.kill", "os.chmod", "os.chown", "os.utime", "os.truncate", "resource.",
                 "ctypes.", "os.spawn", "pty.", "shutil.chown", "signal.pthread_kill")  # fmt: skip
    two_paths = ("os.rename", "os.link", "os.symlink")

    def under(path, roots) -> bool:
        return isinstance(path, int) or os.path.realpath(os.fsdecode(path)).startswith(roots)

    def hook(event: str, arguments: tuple) -> None:
        allowed = not event.startswith(forbidden)
        if event == "open" and arguments[0] is not None:
            flags = arguments[2] or 0
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            allowed = under(arguments[0], inside if writes else known)
        elif event in ("os.mkdir", "os.remove", "os.rmdir", *two_paths):
            allowed = all(under(p, inside) for p in arguments[: 1 + (event in two_paths)])
        if not allowed:
            raise PermissionError(f"the sandbox allows no {event}")

    sys.addaudithook(hook)


def lock_in(limits: dict) -> list[str]:
    """Puts everything up; returns the names of the barriers that hold."""
    folder, library = os.getcwd(), os.path.dirname(os.__file__)
    readable = [library, "/lib", "/lib64", "/usr/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache",
                "/dev/null", "/dev/urandom", os.path.join(sys.base_prefix, "lib")]  # fmt: skip
    limit_resources(limits)
    holding = []
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if give_up_rights(libc):
            steps = (("files", lambda: restrict_files(libc, folder, readable)),
                     ("calls", lambda: restrict_calls(libc)))  # fmt: skip
            holding = [name for name, step in steps if step()]
    if len(holding) < 2:
        put_up_fence(folder, [os.path.realpath(path) for path in readable])
    return holding


def main() -> None:
    order = json.loads(sys.stdin.readline())
    source = sys.stdin.read()
    holding = lock_in(order["limits"])
    if order["report"]:
        print(json.dumps(holding))
    code = 1
    try:
        exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        code = order["success"]
    except BaseException as error:
        # Only the line that says what went wrong; the program may have made it long.
        message = traceback.format_exception_only(error)[-1].strip()[:500]
        with contextlib.suppress(OSError):
            os.write(2, f"\n{message}\n".encode("utf-8", "replace"))
    # Nothing that the program left to be done at the end is done.
    os._exit(code)


if __name__ == "__main__":
    main()
