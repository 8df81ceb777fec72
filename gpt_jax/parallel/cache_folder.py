"""Where everything is kept that a run does not own; starts no JAX."""

import os

from etils import epath


def cache_dir() -> epath.Path:
    """The one folder outside of a run that is written to: $GPT_JAX_CACHE or ~/.cache/gpt_jax.

    It holds corpora, archives, trained tokenizers, tokens and compiled programs; it may be deleted.
    """
    return epath.Path(os.environ.get("GPT_JAX_CACHE") or "~/.cache/gpt_jax").expanduser()


def keep_libraries_files() -> None:
    """What libraries would write elsewhere (matplotlib's list of fonts) goes to that folder too.

    To be called before they are imported.
    """
    os.environ.setdefault("MPLCONFIGDIR", os.fspath(cache_dir() / "matplotlib"))
