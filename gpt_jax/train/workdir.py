"""The run directory as training finds it and begins it."""

import fcntl
import json
from typing import IO, Any

from etils import epath

from gpt_jax.data.chat_template import TEMPLATE_FILES
from gpt_jax.data.pipeline import PreparedData
from gpt_jax.runs import run as layout
from gpt_jax.runs.checkpoints import save_params
from gpt_jax.runs.config import RunConfig, flatten, run_config
from gpt_jax.runs.identity import NOT_OF_THE_NUMBERS
from gpt_jax.runs.quarantine import damaged, is_writable
from gpt_jax.runs.receipt import write_json
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
    """Keeps others out of the run as long as the file is open."""
    workdir.mkdir(parents=True, exist_ok=True)
    file = open(workdir / layout.LOCK, "a")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--workdir: {str(workdir)!r} is in use by another process") from None
    return file


def write_run(workdir: epath.Path, config: RunConfig, data: PreparedData, frozen: Tree) -> None:
    """Begins the run: what training from its first state needs, config.json last."""
    # The tokenizer first: config.json is what makes the folder a run.
    data.tokenizer.save(workdir / layout.TOKENIZER)
    if data.template:
        data.template.save(workdir)
    if frozen is not None:
        save_params(workdir / layout.BASE, frozen, {})
    elif (workdir / layout.BASE).exists():  # of a run that was never trained
        (workdir / layout.BASE).rmtree()
    write_json(workdir / layout.CONFIG, config.to_dict())
