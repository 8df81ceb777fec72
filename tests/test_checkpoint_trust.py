"""What is restored is what was saved, or an older step with a warning; what failed is no step."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.path import atomicity

from gpt_jax.ops.digests import digest, digest_on_host
from gpt_jax.parallel.config import MeshConfig
from gpt_jax.parallel.mesh import make_mesh
from gpt_jax.runs.checkpoint_reader import CheckpointReader
from gpt_jax.runs.checkpoints import Checkpoints, SaveError
from gpt_jax.runs.config import run_config
from gpt_jax.runs.line_file import LineFile
from gpt_jax.runs.manifest import DamagedError
from gpt_jax.runs.quarantine import CheckpointWarning, damaged
from gpt_jax.runs.retention import preserved
from gpt_jax.runs.run import open_run
from gpt_jax.runs.state import TrainState
from gpt_jax.train.loop import FINISHED, fit
from gpt_jax.train.setup import set_up

KINDS = ("flip", "truncate", "empty", "delete")
ITEMS = ("manifest", "params", "rest", "")


def state(step):
    """A state of a few small arrays; all of them differ from step to step."""
    layers = {f"layers_{i}": {"w": jnp.full((3, 5), step + i / 4)} for i in range(2)}
    # Orbax writes small arrays into its index, others into files of data.
    wide = jnp.sin(jnp.arange(4000.0) * step)
    params = {"head": jnp.arange(7.0) * step, "stack": layers, "wide": wide}
    return TrainState(
        step=jnp.int32(step),
        index=jnp.int32(step),
        params=params,
        opt_state={"mu": jax.tree.map(jnp.negative, params), "half": jnp.bfloat16([step, 1])},
        rng=jnp.full(2, step, jnp.uint32),
        flags={"first_nonfinite": jnp.int32(-1)},
    )


def like(tree):
    where = NamedSharding(make_mesh(MeshConfig(), jax.devices()[:1]), PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
    )


def save_all(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, state(step), {"data": {"train": "abc"}})
    checkpoints.wait()


@contextlib.contextmanager
def opened(folder, **options):
    checkpoints = Checkpoints(folder, **{"keep": 2, **options})
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def assert_is_state(restored, step):
    assert jax.tree.structure(restored) == jax.tree.structure(state(step))
    jax.tree.map(np.testing.assert_array_equal, restored, state(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with opened(folder) as checkpoints:
        save_all(checkpoints, 1, 2)
    return folder


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def damage(path, kind, rng):
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)


def outcome(saved, folder, file, kind, rng):
    """Damages one file of step 2 in a copy: "exact" or "fell back"; a failure for all else."""
    shutil.copytree(saved, folder)
    damage(folder / "2" / file, kind, rng)
    with warnings.catch_warnings(record=True) as caught, opened(folder) as checkpoints:
        warnings.simplefilter("always", CheckpointWarning)
        restored, manifest, step = checkpoints.newest_good(like(state(0)))
        told = [str(w.message) for w in caught if issubclass(w.category, CheckpointWarning)]
        assert_is_state(restored, step)
        assert manifest["data"] == {"train": "abc"}
        if step == 2:
            assert not told and damaged(folder) == []
            return "exact"
        assert (step, damaged(folder), checkpoints.steps()) == (1, ["2.damaged"], [1])
        assert len(told) == 1 and told[0].startswith("checkpoint 2: ")
        assert "is damaged" in told[0]
        assert told[0].endswith("moved to 2.damaged; step 1 is used instead")
        # What was damaged is kept, and its place is free.
        save_all(checkpoints, 2)
        assert checkpoints.steps() == [1, 2]
        assert len(files_of(folder / "2.damaged")) >= len(files_of(saved / "2")) - 1
    return "fell back"


def test_a_sample_of_damages_is_found(saved, tmp_path):
    rng = np.random.default_rng(0)
    files = files_of(saved / "2")
    of_item = {
        item: [f for f in files if (f.parts[0] if len(f.parts) > 1 else "") == item]
        for item in ITEMS
    }
    # Arrays in their data files, one item after another for the rest.
    data = [file for file in of_item["params"] if "ocdbt.process_0" in str(file)]
    picked = [(data[i % len(data)], kind) for i, kind in enumerate(("flip", "flip", *KINDS[1:]))]
    for item, kind in zip(("manifest", "rest", "", "params"), KINDS, strict=True):
        picked.append((of_item[item][rng.integers(len(of_item[item]))], kind))
    picked += [("manifest/metadata", "flip"), ("rest/_METADATA", "empty")]
    picked += [("_CHECKPOINT_METADATA", "truncate")]
    assert len(picked) == 12
    outcomes = [
        outcome(saved, tmp_path / str(i) / "checkpoints", file, kind, rng)
        for i, (file, kind) in enumerate(picked)
    ]
    assert outcomes.count("fell back") >= 2  # much that Orbax writes is not read again


@pytest.mark.slow
def test_every_file_damaged_in_every_way(saved, tmp_path):
    rng = np.random.default_rng(1)
    cases = list(itertools.product(files_of(saved / "2"), KINDS))
    assert len(cases) >= 60
    # A flip may hit what nobody reads; so a few more of them.
    cases += [(file, "flip") for file in files_of(saved / "2") for _ in range(2)]
    counts = {"exact": 0, "fell back": 0}
    for i, (file, kind) in enumerate(cases):
        folder = tmp_path / "copy" / "checkpoints"
        try:
            counts[outcome(saved, folder, file, kind, rng)] += 1
        except BaseException as error:
            raise AssertionError(f"{i}: {kind} of {file}") from error
        shutil.rmtree(folder.parent)
    print(counts)


def test_a_reader_falls_back_and_touches_nothing(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    (folder / "2" / "params" / "manifest.ocdbt").unlink()
    before = files_of(folder)
    reader = CheckpointReader(folder)
    with pytest.warns(CheckpointWarning, match=r"checkpoint 2: .*; step 1 is used instead"):
        params, _, step = reader.good_params(lambda steps: steps[-1], like(state(0).params))
    assert step == 1 and files_of(folder) == before
    jax.tree.map(np.testing.assert_array_equal, params, state(1).params)
    with pytest.raises(ValueError, match=r"checkpoint 2: .* is damaged: .*params"):
        reader.restore_params(2, like(state(0).params))
    reader.close()


def test_when_all_are_damaged_all_stay_and_all_are_named(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for step in "12":
        (folder / step / "manifest" / "metadata").write_text("{")
    with opened(folder) as checkpoints:
        with pytest.raises(ValueError, match=r"checkpoints: none in .* checkpoint 2: .* 1: "):
            checkpoints.newest_good(like(state(0)))
        assert checkpoints.steps() == [1, 2] and damaged(folder) == []


def test_another_model_is_no_damage(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    other = state(0)
    other.params["head"] = jnp.zeros(8)
    with opened(folder) as checkpoints:
        with pytest.raises(ValueError, match=r"params/head is float32\[7\], but .* float32\[8\]"):
            checkpoints.newest_good(like(other))
        assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_digests_on_the_host_are_those_of_the_device(dtype, monkeypatch):
    monkeypatch.setattr("gpt_jax.ops.digests._BLOCK", 10)
    rng = np.random.default_rng(0)
    for shape in ((), (1,), (37,), (4, 5, 3)):
        array = rng.integers(0, 200, shape).astype(jnp.dtype(dtype))
        np.testing.assert_array_equal(digest_on_host(array), digest(jnp.asarray(array)))


# Saves that fail.


WHERE = {
    "at once": (ocp.JsonCheckpointHandler, "_save_fn"),
    "in the background": (atomicity.AtomicRenameTemporaryPath, "finalize"),
}


@pytest.fixture(params=WHERE)
def failing(monkeypatch, request):
    """Makes a save fail, at once or in the background, while `failing["on"]`."""
    wanted = {"on": False}
    owner, name = WHERE[request.param]
    whole = getattr(owner, name)

    def broken(self, *args, **kwargs):
        if wanted["on"]:
            raise OSError(28, "No space left on device")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, broken)
    return wanted


def test_a_failed_save_is_no_step_and_the_next_is_accepted(tmp_path, failing):
    folder = tmp_path / "checkpoints"
    with opened(folder) as checkpoints:
        save_all(checkpoints, 1)
        failing["on"] = True
        told = (
            r"checkpoint 2: was not saved: .*No space left.* needs up to [\d,]+ bytes, [\d,]+ are "
        )
        with pytest.warns(CheckpointWarning, match=told + "free; the last good step is 1"):
            checkpoints.save(2, state(2), {})
            assert not checkpoints.settle()
        assert checkpoints.steps() == [1]
        failing["on"] = False
        save_all(checkpoints, 2)
        assert checkpoints.steps() == [1, 2]
        restored, _, step = checkpoints.newest_good(like(state(0)))
        assert step == 2
        assert_is_state(restored, 2)
        assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_lines_wait_for_room_and_a_save_for_the_lines(tmp_path, monkeypatch):
    path, log = tmp_path / "lines", LineFile(tmp_path / "lines")
    log.write("one")
    with open("/dev/full", "wb", buffering=0) as full:  # which takes nothing
        monkeypatch.setattr(log, "_file", full)
        log.write("two")
        log.write("three")
        with opened(tmp_path / "checkpoints") as checkpoints:
            save_all(checkpoints, 1)
            with pytest.warns(CheckpointWarning, match="checkpoint 2: was not saved: .*No space"):
                checkpoints.save(2, state(2), {}, before=log.sync)
            assert checkpoints.steps() == [1]
            monkeypatch.undo()
            checkpoints.save(2, state(2), {}, before=log.sync)
            checkpoints.wait()
            assert checkpoints.steps() == [1, 2]
    assert path.read_text() == "one\ntwo\nthree\n"
    log.close()


def test_three_failures_in_a_row_end_the_run(tmp_path, failing):
    with opened(tmp_path / "checkpoints") as checkpoints:
        save_all(checkpoints, 1)
        for ok, step in ((False, 2), (False, 3), (True, 4), (False, 5), (False, 6)):
            failing["on"] = not ok
            with contextlib.nullcontext() if ok else pytest.warns(CheckpointWarning):
                checkpoints.save(step, state(step), {})
                assert checkpoints.settle() == ok
        with pytest.raises(SaveError, match=r"No space left.*; the last good step is 4"):
            checkpoints.wait()
        with pytest.raises(SaveError, match=r"step is 4; 3 saves in a row failed"):
            save_all(checkpoints, 7)


FULL = """
import resource, signal, sys, warnings
sys.path.insert(0, "tests")
import conftest  # eight devices, as there
import jax.numpy as jnp
from test_checkpoint_trust import Checkpoints, state

def wide(step):  # far beyond what a file may hold
    return state(step).replace(params={"w": jnp.sin(jnp.arange(400_000.0) + step)})

warnings.simplefilter("always")
checkpoints = Checkpoints(sys.argv[1], keep=2)
checkpoints.save(1, wide(1), {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
checkpoints.save(2, wide(2), {})
assert not checkpoints.settle() and checkpoints.steps() == [1]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.save(2, wide(2), {})
checkpoints.wait()
print(checkpoints.steps())
"""


def test_a_full_disk_costs_a_save_and_no_more(tmp_path):
    folder = tmp_path / "checkpoints"
    done = subprocess.run(
        [sys.executable, "-c", FULL, folder], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.strip() == "[1, 2]", done.stderr
    assert "CheckpointWarning: checkpoint 2: was not saved" in done.stderr
    assert "it needs up to 1,6" in done.stderr and "the last good step is 1" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


# What is kept.


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_a_verified_step_stays(seed):
    """150 saves in a rule's hands: the last k, the best and every n; verified by chance."""
    rng = np.random.default_rng(seed)
    keep, every = int(rng.integers(1, 5)), int(rng.choice([0, 20, 100]))
    steps, verified, step = set(), set(), 0
    for _ in range(150):
        step += int(rng.integers(1, 12))
        best = set(rng.choice(sorted(steps), min(2, len(steps)), replace=False)) if steps else set()
        before = {*steps, step}
        kept = preserved(before, keep, best, every, verified)
        assert kept <= before and set(sorted(before)[-keep:]) <= kept and best <= kept
        assert kept & verified or not before & verified
        # No more than asked for, and one.
        assert len(kept) <= keep + len(best) + (step // every if every else 0) + 1
        if every:
            for multiple in {s // every for s in before} - {0}:
                assert min(s for s in before if s // every == multiple) in kept
        steps = kept
        if rng.random() < 0.3:
            verified.add(int(rng.choice(sorted(steps))))
        if rng.random() < 0.05:  # one is found damaged
            gone = int(rng.choice(sorted(steps)))
            steps.discard(gone)
            verified.discard(gone)


def test_what_goes_only_goes_for_a_step_that_was_read_back(tmp_path):
    folder = tmp_path / "checkpoints"
    with opened(folder, keep=2, keep_every=3) as checkpoints:
        save_all(checkpoints, 1, 2)
        # Both that would stay were damaged on the way to the disk: the next save finds out.
        (folder / "2" / "rest" / "manifest.ocdbt").write_bytes(b"")
        with pytest.warns(CheckpointWarning, match=r"checkpoint 2: is not as .* to 2.damaged"):
            save_all(checkpoints, 3)
        assert checkpoints.steps() == [1, 3]
        save_all(checkpoints, 4, 5, 6, 7, 8)
        assert checkpoints.steps() == [3, 6, 7, 8]
    with opened(tmp_path / "one", keep=1) as checkpoints:
        save_all(checkpoints, 1, 2)
        assert checkpoints.steps() == [2]
        (tmp_path / "one" / "2" / "params" / "manifest.ocdbt").unlink()
        checkpoints.save(3, state(3), {})
        checkpoints.settle()
        # 2 had been read back before; who continues finds the damage.
        assert checkpoints.steps() == [2, 3]


# Folders.


@contextlib.contextmanager
def as_nobody():
    """Rights of files do not hold for root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_that_is_not_ours_to_write_is_refused_at_the_start(saved, tmp_path):
    for path in (tmp_path, *tmp_path.parents):  # one more of them under xdist
        if "pytest-" in str(path):
            path.chmod(0o755)
    shutil.copytree(saved, tmp_path / "checkpoints")
    (tmp_path / "checkpoints").chmod(0o555)
    with as_nobody():
        with pytest.raises(ValueError, match=r"--workdir: '.*checkpoints' is not ours to write"):
            Checkpoints(tmp_path / "checkpoints", keep=2)
        with pytest.raises(ValueError, match=r"--workdir: '.*new' cannot be made: Permission"):
            Checkpoints(tmp_path / "new", keep=2)
        # It can be read.
        reader = CheckpointReader(tmp_path / "checkpoints")
        assert_is_state(reader.restore(2, like(state(0)))[0], 2)
        reader.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--workdir: '.*file' cannot be made: File exists"):
        Checkpoints(tmp_path / "file", keep=2)


def test_a_manifest_has_a_digest_of_itself_but_for_old_ones(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    path = folder / "2" / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    with opened(folder) as checkpoints:
        manifest["data"]["train"] = "abd"
        path.write_text(json.dumps(manifest))
        with pytest.raises(DamagedError, match="checkpoint 2: manifest is damaged"):
            checkpoints.manifest(2)
        del manifest["manifest_digest"]
        path.write_text(json.dumps(manifest))
        assert checkpoints.newest_good(like(state(0)))[2] == 2


@pytest.mark.parametrize("name", ["format_1"])
def test_a_run_of_an_older_format_goes_on(tmp_path, cache_dir, name, monkeypatch):
    """And saves its last step at the second try."""
    workdir = tmp_path / "run"
    shutil.copytree(ROOT / "tests" / "data" / f"run_{name}", workdir)
    values = json.loads((workdir / "config.json").read_text())
    values["data"]["path"] = str(workdir / "corpus")
    values["train"]["duration"] = 5
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        run = open_run(workdir)
        training = set_up(run_config(values), workdir, cache_dir, jax.devices()[:1])
    assert run.step == training.start == 4 and int(training.state.index) == 4
    jax.tree.map(np.testing.assert_array_equal, run.params, training.state.params)
    whole, failed = atomicity.AtomicRenameTemporaryPath.finalize, []

    def fails_once(self, *args, **kwargs):
        if not failed:
            failed.append(self)
            raise OSError(28, "No space left on device")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(atomicity.AtomicRenameTemporaryPath, "finalize", fails_once)
    with pytest.warns(CheckpointWarning, match="checkpoint 5: was not saved.* good step is 4"):
        assert fit(training) == FINISHED
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        assert open_run(workdir).step == 5
