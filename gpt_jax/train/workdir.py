"""The run directory as training finds it and begins it."""

import fcntl
import json
import os
import time
from typing import IO, Any

import jax
from etils import epath

from gpt_jax import trees
from gpt_jax.data.chat_template import TEMPLATE_FILES
from gpt_jax.data.pipeline import PreparedData
from gpt_jax.parallel.distributed import peers
from gpt_jax.runs import run as layout
from gpt_jax.runs.checkpoints import Checkpoints, restore_params, save_params
from gpt_jax.runs.config import RunConfig, flatten, run_config
from gpt_jax.runs.identity import NOT_OF_THE_NUMBERS
from gpt_jax.runs.quarantine import damaged, is_writable
from gpt_jax.runs.receipt import write_json, write_receipt
from gpt_jax.runs.state import TrainState
from gpt_jax.scaling import prediction
from gpt_jax.types import Tree

# What a run may change when it is continued: how it is computed, watched and stored, and how long
# it goes on; everything else decides its numbers.
_MAY_CHANGE = (
    *NOT_OF_THE_NUMBERS,
    "train.duration", "train.patience", "train.on_nonfinite", "train.spike_sigma",
    # Where the corpus lies may change; what it holds is checked by its fingerprint.
    "data.path", "data.validation_path",
    # Read once, when the run begins.
    "init.source", "init.step", "data.tokenizer",
)  # fmt: skip


_SEEN_WITHIN = 60.0  # seconds: a shared file system may show a file late


def find_run(workdir: epath.Path, config: RunConfig) -> bool:
    """`check_workdir` by all processes, before any of them writes.

    Raises:
      ValueError: They do not see the same; as `check_workdir`.
    """
    found = peers().exchange("after looking at the run directory", check_workdir(workdir, config))
    if len(set(found)) > 1:
        raise ValueError(
            f"--workdir: {str(workdir)!r} holds the run on {peers().name(found.index(True))} and "
            f"not on {peers().name(found.index(False))}; give a folder that all hosts share"
        )
    return found[0]


def check_workdir(workdir: epath.Path, config: RunConfig) -> bool:
    """Whether the directory holds this run already.

    Raises:
      ValueError: It holds another run or something else; the first field that differs is named
        with both values. Or it is not ours to write.
    """
    _refuse_read_only(workdir)
    if not workdir.exists():
        return False
    if not workdir.is_dir():
        raise ValueError(f"--workdir: {str(workdir)!r} is a file")
    path = workdir / layout.CONFIG
    if not path.exists():
        # A run that was killed as it began has its tokenizer, but no config yet; a run that was
        # predicted has its prediction.
        ours = {layout.LOCK, layout.TOKENIZER, layout.BASE, f"{layout.CONFIG}.partial"}
        ours |= {prediction.FILE}
        ours |= set(TEMPLATE_FILES)
        if {entry.name for entry in workdir.iterdir()} - ours:
            raise ValueError(
                f"--workdir: {str(workdir)!r} holds other files and no run; give a new folder"
            )
        return False
    if not _saved_steps(workdir):
        return False  # nothing was trained: the config may be mended and the run begun again
    check_same_run(json.loads(path.read_text()), config, f"the run in {str(workdir)!r}")
    return True


def check_same_run(old: dict[str, Any] | None, config: RunConfig, where: str) -> None:
    """Whether a config is that of a run, but for what may change; None: not known.

    Raises:
      ValueError: It is not; the first field that differs is named with both values.
    """
    before = flatten(run_config(old).to_dict()) if old else {}
    for name, value in flatten(config.to_dict()).items():
        if before and name not in _MAY_CHANGE and before[name] != value:
            raise ValueError(
                f"{name}: {value!r} in the config, but {where} has "
                f"{before[name]!r}; give another --workdir to train anew"
            )


def _refuse_read_only(workdir: epath.Path) -> None:
    for folder in (workdir / layout.CHECKPOINTS, workdir, *workdir.parents):
        if folder.exists():
            if folder.is_dir() and not is_writable(folder):
                raise ValueError(f"--workdir: {str(folder)!r} is not ours to write")
            if folder == workdir or not folder.is_relative_to(workdir):
                return


def prediction_facts(workdir: epath.Path, config: RunConfig, resuming: bool) -> dict[str, str]:
    """What the receipt says of the run's prediction: the sha256 that it begins, or began, with.

    Raises:
      ValueError: The run is to begin, and the prediction is of another; see check_prediction.
    """
    find = prediction.kept_prediction if resuming else prediction.check_prediction
    sha256 = find(workdir, config)
    return {prediction.SHA_KEY: sha256} if sha256 else {}


def _saved_steps(workdir: epath.Path) -> bool:
    folder = workdir / layout.CHECKPOINTS
    if not folder.exists():
        return False
    # Steps that were found damaged are a run too: it must not be begun anew over them.
    return bool(damaged(folder)) or any(entry.name.isdigit() for entry in folder.iterdir())


def lock_workdir(workdir: epath.Path) -> IO[str]:
    """Keeps others out of the run as long as the file is open; process 0 does so for all."""
    if not peers().is_first:
        peers().arrive("after taking the run directory")
        return open(os.devnull)
    workdir.mkdir(parents=True, exist_ok=True)
    file = open(workdir / layout.LOCK, "a")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--workdir: {str(workdir)!r} is in use by another process") from None
    peers().arrive("after taking the run directory")
    return file


def write_run(workdir: epath.Path, config: RunConfig, data: PreparedData, frozen: Tree) -> None:
    """Begins the run: what training from its first state needs, config.json last."""
    if peers().is_first:
        # The tokenizer first: config.json is what makes the folder a run.
        data.tokenizer.save(workdir / layout.TOKENIZER)
        if data.template:
            data.template.save(workdir)
    if frozen is not None:
        save_params(workdir / layout.BASE, frozen, {})
    elif peers().is_first and (workdir / layout.BASE).exists():  # of a run that was never trained
        (workdir / layout.BASE).rmtree()
    if peers().is_first:
        write_json(workdir / layout.CONFIG, config.to_dict())


def write_files(
    workdir: epath.Path,
    config: RunConfig,
    facts: dict[str, Any],
    new_session: dict[str, Any],
    anew: bool,
) -> str:
    """Writes config.json and the receipt; see write_receipt.  Returns the run's id.

    Raises:
      ValueError: Another process does not see them.
    """

    def write() -> str:
        write_json(workdir / layout.CONFIG, config.to_dict())
        return write_receipt(workdir / layout.RECEIPT, facts, new_session, anew=anew)["id"]

    run_id = peers().from_first("after writing the receipt", write)
    deadline = time.monotonic() + _SEEN_WITHIN
    while not (workdir / layout.RECEIPT).exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"--workdir: {str(workdir)!r} is another folder on {peers().name(peers().index)} "
                f"than on {peers().name(0)}; give one that all hosts share"
            )
        time.sleep(0.1)
    return run_id


def restored(
    checkpoints: Checkpoints,
    like: TrainState,
    config: RunConfig,
    data: PreparedData,
    teacher: str,
) -> tuple[TrainState, int]:
    """The newest good state and its step.

    Raises:
      ValueError: It is of another config, other data or another teacher, whose fingerprint
        `teacher` is; see CheckpointReader.newest_good.
    """
    state, manifest, step = checkpoints.newest_good(like)
    check_same_run(manifest.get("config"), config, f"checkpoint {step} of {checkpoints.directory}")
    data.check_fingerprints(manifest["data"])
    if manifest.get("teacher", teacher) != teacher:
        raise ValueError(
            "objective.teacher: (or init.source, where it is the reference) holds other parameters "
            "than those that the run began with"
        )
    return state, step


def restored_base(workdir: epath.Path, like: Tree, mask: Tree) -> Tree | None:
    """The frozen parameters; None: all are trained."""
    if all(jax.tree.leaves(mask)):
        return None
    frozen = trees.select(like, jax.tree.map(lambda trained: not trained, mask))
    return restore_params(workdir / layout.BASE, frozen)[0]
