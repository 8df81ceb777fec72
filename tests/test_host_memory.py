"""What a process does with memory that XLA:CPU frees."""

import os
import platform
import subprocess
import sys

import pytest

# A program that makes an array of 96 MiB a device, more than an arena of a thread's own holds, and
# lets it go. The first calls take it from the kernel, and some more where another thread still held
# the array before.
_FAULTS = """
import resource
from gpt_jax.parallel.startup import keep_memory
keep_memory()
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((jax.device_count(),), ("data",))
rows = jax.device_put(jnp.ones(4096 * jax.device_count()), NamedSharding(mesh, P("data")))
columns = jax.device_put(jnp.ones(6144), NamedSharding(mesh, P()))
outer = jax.jit(jnp.outer)

def calls():
    for _ in range(24):
        outer(rows, columns).block_until_ready()

calls()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
calls()
print(jax.device_count(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
@pytest.mark.parametrize("num_devices", [1, 2])
def test_what_a_step_frees_the_next_one_gets(num_devices, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(num_devices))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS], stdout=subprocess.PIPE, text=True, check=True
    )
    devices, faults = map(int, done.stdout.split())
    assert devices == num_devices
    pages = 24 * devices * (96 << 20) // os.sysconf("SC_PAGE_SIZE")  # given back, the arrays alone
    assert faults < pages / 4


# Threads that live side by side; one after the other each fills 32 MiB and lets go of them.
_WRITERS = """
import threading
from gpt_jax.parallel.startup import keep_memory
keep_memory()
import numpy as np

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:"))

over = threading.Event()

def write(done):
    np.ones(32 << 20, np.uint8)
    done.set()
    over.wait()

before = resident()
for _ in range(8):
    done = threading.Event()
    threading.Thread(target=write, args=(done,)).start()
    done.wait()
print((resident() - before) // 1024)
over.set()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_threads_that_write_by_turns_keep_the_memory_of_one(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    done = subprocess.run(
        [sys.executable, "-c", _WRITERS], stdout=subprocess.PIPE, text=True, check=True
    )
    assert int(done.stdout) < 4 * 32  # MiB; with an arena for each thread it is 8 times 32
