"""The run directory as training finds it and begins it."""

import fcntl
import json
from typing import IO

from etils import epath

from gpt_jax.data.chat_template import TEMPLATE_FILES
from gpt_jax.data.pipeline import PreparedData
from gpt_jax.runs import run as layout
from gpt_jax.runs.checkpoints import save_params
from gpt_jax.runs.config import RunConfig, flatten, run_config
from gpt_jax.runs.receipt import write_json
from gpt_jax.types import Tree

# What a run may change when it is continued: how it is computed, watched and stored, and how long
# it goes on; everything else decides its numbers.
_MAY_CHANGE = (
    "model.scan", "model.remat", "model.attention", "mesh.data", "mesh.fsdp", "mesh.tensor",
    "train.duration", "train.log_every", "train.eval_every", "train.eval_batches",
    "train.checkpoint_every", "train.keep", "train.sample_prompts", "train.sample_tokens",
    "train.tensorboard", "train.wandb", "train.profile", "train.patience", "tasks.eval_examples",
    "tasks.max_new_tokens",
    # Where the corpus lies may change; what it holds is checked by its fingerprint.
    "data.path", "data.validation_path",
    # Read once, when the run begins.
    "init.source", "init.step", "data.tokenizer",
)  # fmt: skip


def check_workdir(workdir: epath.Path, config: RunConfig) -> bool:
    """Whether the directory holds this run already.

    Raises:
      ValueError: It holds another run or something else; the first field that differs is named
        with both values.
    """
    if not workdir.exists():
        return False
    if not workdir.is_dir():
        raise ValueError(f"--workdir: {str(workdir)!r} is a file")
    path = workdir / layout.CONFIG
    if not path.exists():
        # A run that was killed as it began has its tokenizer, but no config yet.
        ours = {layout.LOCK, layout.TOKENIZER, layout.BASE, f"{layout.CONFIG}.partial"}
        ours |= set(TEMPLATE_FILES)
        if {entry.name for entry in workdir.iterdir()} - ours:
            raise ValueError(
                f"--workdir: {str(workdir)!r} holds other files and no run; give a new folder"
            )
        return False
    if not _saved_steps(workdir):
        return False  # nothing was trained: the config may be mended and the run begun again
    old = flatten(run_config(json.loads(path.read_text())).to_dict())
    for name, value in flatten(config.to_dict()).items():
        if name not in _MAY_CHANGE and old[name] != value:
            raise ValueError(
                f"{name}: {value!r} in the config, but the run in {str(workdir)!r} has "
                f"{old[name]!r}; give another --workdir to train anew"
            )
    return True


def _saved_steps(workdir: epath.Path) -> bool:
    folder = workdir / layout.CHECKPOINTS
    return folder.exists() and any(entry.name.isdigit() for entry in folder.iterdir())


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
