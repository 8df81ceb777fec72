"""Several processes: how they meet, what they say of each other, and that they train as one."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import types

import jax
import pytest
from conftest import ROOT
from multihost_fixtures import FakeStore, Group, config_for, receipt, settled

from gpt_jax.launch import group
from gpt_jax.parallel.distributed import Prefixed
from gpt_jax.parallel.peers import LateError, Peers
from gpt_jax.parallel.processes import Processes
from gpt_jax.runs.events import file_of, read_events
from gpt_jax.train.interrupts import SharedInterrupts
from gpt_jax.train.loop import fit
from gpt_jax.train.setup import set_up
from gpt_jax.train.stragglers import WINDOW, Stragglers


@contextlib.contextmanager
def peers_of(hosts, **options):
    """The peers of so many processes, which are threads here, over one store."""
    store, made = FakeStore(), [None] * len(hosts)

    def make(i):
        made[i] = Peers(store, i, hosts[i], len(hosts), beat=0.05, **options)

    together(make, len(hosts))
    yield made
    for peers in made:
        peers.close()


def together(fn, number):
    """fn(i) in a thread each; their results, or what they raised."""
    found = [None] * number

    def run(i):
        try:
            found[i] = fn(i)
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_two_processes_are_the_two_devices_of_one_and_stop_at_one_step(tmp_path, corpus, cache_dir):
    """The fast one of tests/test_multihost.py."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert fit(set_up(config_for(corpus), whole, cache_dir, jax.devices()[:2])) == 0
    two = Group(2, run, corpus, cache_dir)
    two.signal_at(4, signal.SIGTERM, process=1)
    codes = two.codes()
    assert codes == [75, 75], two.outputs()
    (stopped,) = [line for line in two.outputs().splitlines() if "SIGTERM: saved step" in line]
    step = int(stopped.split("saved step ")[1].split(";")[0])
    assert step >= 4 and (run / "checkpoints" / str(step) / "manifest").exists()
    assert settled(run) == [row for row in settled(whole) if row["step"] <= step]
    assert receipt(run)["sessions"][0]["processes"] == 2
    assert "] step " in two.output(0) and "1/12" not in two.output(1)
    for process in (0, 1):
        assert read_events(run / file_of(process))[-1]["step"] == step


def test_processes_meet_by_name_and_exchange(tmp_path):
    with peers_of(["a", "a", "b"]) as made:
        assert [p.is_first_of_host for p in made] == [True, False, True]
        assert made[2].hosts == ["a", "a", "b"] and made[0].num_hosts == 2
        found = together(lambda i: [made[i].exchange(f"{n}", [n, i]) for n in range(20)], 3)
        assert found == [[[[n, i] for i in range(3)] for n in range(20)]] * 3
        assert together(lambda i: made[i].from_first("who", lambda: i), 3) == [0, 0, 0]
        order = []
        together(lambda i: made[i].host_first("data", lambda: order.append(i)), 3)
        assert set(order[:2]) == {0, 2} and order[2:] == [1]


def test_who_is_late_is_named_with_host_and_phase():
    with peers_of(["a", "b", "c"], timeout=0.6) as made:
        made[1].tell_where(lambda: "phase 'restore' after step 7")
        found = together(lambda i: made[i].arrive("before the first step") if i != 1 else
                         threading.Event().wait(1.5), 3)  # fmt: skip
        for error in (found[0], found[2]):
            assert isinstance(error, LateError)
            assert "barrier 'before the first step': waited 0." in str(error) or "1." in str(error)
            assert "process 1 on b, last in phase 'restore' after step 7" in str(error)
            assert "on a" not in str(error) and "on c" not in str(error)


def test_who_has_ended_is_told_at_once_with_its_message_and_code():
    with peers_of(["a", "b"], timeout=30.0) as made:
        made[1].fail("--workdir: it is full", 2)
        (error, _) = together(lambda i: made[0].arrive("x") if i == 0 else None, 2)
        assert error.code == 2 and "process 1 on b has ended: --workdir: it is full" in str(error)
        assert made[0].why(RuntimeError("Gloo: Connection closed by peer")).code == 2


def test_who_gives_no_sign_of_life_is_lost():
    with peers_of(["a", "b", "c"]) as made:
        made[2].close()
        late = made[0].why(ValueError("Gloo: Connection closed by peer"))
        assert "lost process 2 on c, last in " in str(late) and "Gloo" in str(late)
        made[1].tell_where(lambda: "x")
        assert made[0].lost(1.0) == [2]


def test_a_process_that_is_alone_waits_for_nobody():
    alone = Peers()
    assert alone.exchange("x", 3) == [3] and alone.is_first and alone.is_first_of_host
    assert alone.why(ValueError("x")) is None


@pytest.mark.parametrize("seed", range(5))
def test_all_stop_at_one_boundary_whoever_is_told_wherever_they_are(seed):
    """Loops of threads, each some steps ahead or behind, held together only by a small lead."""
    import numpy as np

    number, rng = 3, np.random.default_rng(seed)
    told, at = int(rng.integers(number)), int(rng.integers(1, 60))
    pauses = rng.uniform(0, 0.004, (number, 100_000))
    with peers_of(["a"] * number) as made:
        passed, done = [0] * number, [None] * number

        def loop(i):
            shared = SharedInterrupts(made[i])
            shared._thread.start()  # without the signals, which are the main thread's
            for n in range(100_000):
                while min(passed) < passed[i] - 2:  # collectives: nobody is far ahead
                    threading.Event().wait(0.001)
                reason = shared.boundary()
                passed[i] = n + 1
                if i == told and n == at:
                    shared.requested = "SIGTERM"
                if reason:
                    done[i] = n, reason
                    passed[i] = 1 << 30
                    break
                threading.Event().wait(pauses[i][n])
            shared._closed.set()
            shared._thread.join()

        together(loop, number)
        assert len(set(done)) == 1 and done[0][1] == "SIGTERM" and done[0][0] > at


def test_a_loop_that_is_done_leaves_the_others_alone():
    with peers_of(["a", "b"]) as made:
        shared = [SharedInterrupts(p) for p in made]
        for one in shared:
            one._thread.start()
        shared[0].boundary(), shared[1].boundary()
        shared[0]._closed.set()
        shared[0]._thread.join()
        shared[1].requested = "SIGTERM"
        shared[1]._thread.join(20)
        assert not shared[1]._thread.is_alive() and shared[1].boundary() is None


def straggling(busy, waits=lambda i, step: 0.1):
    """What process 0 is told when process i is busy and waits so many seconds of a step."""
    import gpt_jax.train.stragglers as module

    with peers_of(["a", "b", "c"]) as made:
        found, clocks = [], [0.0] * 3
        all_of_them = [Stragglers(p, lambda *told: found.append((*told, clocks[0]))) for p in made]
        real = module.time
        try:
            for step in range(1, 101):
                for i, one in reversed(list(enumerate(all_of_them))):
                    module.time = types.SimpleNamespace(monotonic=lambda i=i: clocks[i])
                    one._since = clocks[i]
                    clocks[i] += busy(i, step)
                    with one.waiting():
                        clocks[i] += waits(i, step)
                    one.lap(step, idle=True)
        finally:
            module.time = real
    return found


@pytest.mark.parametrize("begins", range(20, 20 + WINDOW))
def test_a_slow_host_is_found_within_20_steps(begins):
    found = straggling(lambda i, step: 0.05 if i == 1 and step >= begins else 0.002)
    ((process, step, more, _),) = found
    assert process == 1 and begins < step < begins + 20 and more == pytest.approx(0.048, rel=0.1)


def test_who_is_slow_for_a_moment_or_waits_is_no_straggler():
    assert not straggling(lambda i, step: 0.5 if step % WINDOW == i else 0.002)
    assert not straggling(lambda i, step: 0.5 if i == 1 and 50 <= step < 57 else 0.002)
    assert not straggling(lambda i, step: 0.05)  # all of them alike
    assert not straggling(lambda i, step: 0.002, waits=lambda i, step: 0.1 + 0.4 * i)


def test_lines_say_who_writes_them(capsys):
    stream = Prefixed(sys.stdout, "[h/1] ")
    print("a\nb", file=stream)
    print("c", end="", file=stream)
    print("d", file=stream)
    assert capsys.readouterr().out == "[h/1] a\n[h/1] b\n[h/1] cd\n"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_processes": 2}, "--coordinator: is not given"),
        ({"coordinator": "h:1", "num_processes": 2}, "--process_id: is not given"),
        ({"coordinator": "h:1", "process_id": 0}, "--num_processes: is not given"),
        ({"coordinator": "h"}, "--coordinator: 'h' is not HOST:PORT"),
        ({"num_processes": 2, "process_id": 2}, "--process_id: 2 is not below"),
        ({"num_processes": -1}, "--num_processes: -1"),
        ({"process_id": -2}, "--process_id: -2"),
        ({"heartbeat_timeout": 0}, "--heartbeat_timeout: 0"),
        ({"barrier_timeout": 0}, "--barrier_timeout: 0"),
    ],
)
def test_options_that_do_not_fit_are_named(fields, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        Processes(**fields).check_complete()


def test_a_supervisor_starts_all_or_its_own():
    local = group.commands(["train"], Processes(num_processes=3, heartbeat_timeout=10))
    assert [words[-1] for words in local] == [f"--process_id={i}" for i in range(3)]
    assert len({words[-2] for words in local}) == 1 and "--num_processes=3" in local[0]
    assert local[0][-2].startswith("--coordinator=127.0.0.1:")
    assert "--heartbeat_timeout=10" in local[2]
    own = Processes(coordinator="h:1", num_processes=3, process_id=1)
    assert group.commands(["train"], own) == [["train", *own.words()]]
    assert group.commands(["train"], Processes(auto=True)) == [["train", "--distributed=auto"]]
    assert group.commands(["train"], Processes()) == [["train"]]


_STUB = """
import os, signal, sys, time
own = sys.argv[1 + int(sys.argv[-1].split("=")[1])]
if own == "hangs":
    time.sleep(60)
code = int(own)
if code < 0:
    os.kill(os.getpid(), -code)
    time.sleep(60)
time.sleep(3 if code == 1 else 0)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("ends", "code", "says"),
    [
        (["0", "0"], 0, ""),
        (["75", "75"], 75, ""),
        (["2", "2"], 2, ""),
        (["1", "-9"], -signal.SIGKILL, "process 1 on"),
        (["-9", "hangs"], -signal.SIGKILL, "process 1 did not end with the others"),
    ],
)
def test_the_first_process_that_crashes_is_named(tmp_path, monkeypatch, ends, code, says):
    from gpt_jax.train.interrupts import Interrupts

    monkeypatch.setattr(group, "_GRACE", 1.0)
    (tmp_path / file_of(1)).write_text(json.dumps({"phase": "step", "step": 7}) + "\n")
    started = [[sys.executable, "-S", "-c", _STUB, *ends, f"--process_id={i}"] for i in (0, 1)]
    lines = []
    assert group.run_together(started, Interrupts(), tmp_path, lines.append) == code
    assert says in "\n".join(lines) and bool(lines) == bool(says)
    if code == -signal.SIGKILL and ends[1] == "-9":
        assert "SIGKILL, last heard of at step 7 (phase 'step')" in lines[0]


def test_a_machine_that_is_no_cluster_is_a_users_mistake(tmp_path, corpus):
    words = ["train", "--config=configs/gpt.py:size=100k,debug", f"--workdir={tmp_path}"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "JAX_", "KUBE"))}
    done = subprocess.run(
        [sys.executable, "-m", "gpt_jax", *words, "--distributed=auto",
         f"--config.data.path={corpus}"],
        cwd=ROOT, env={**env, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith("error: --distributed: 'auto' found no TPU pod, SLURM")
    assert "Traceback" not in done.stderr
