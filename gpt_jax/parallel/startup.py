"""What a process does before its first computation."""

import os

import jax
from etils import epath

from gpt_jax.parallel.host_memory import keep_freed_memory


def cache_dir() -> epath.Path:
    """The one folder outside of a run that is written to: $GPT_JAX_CACHE or ~/.cache/gpt_jax.

    It holds prepared corpora, trained tokenizers, tokens and compiled programs; it may be deleted.
    """
    return epath.Path(os.environ.get("GPT_JAX_CACHE") or "~/.cache/gpt_jax").expanduser()


def start() -> None:
    """Before the first computation: memory is kept, compiled programs are cached.

    A second start compiles nothing. What libraries would write elsewhere (matplotlib's list of
    fonts) goes to the cache folder too.
    """
    # Before JAX makes its first thread: threads bring arenas of their own, which stay. So it cannot
    # wait until the platform is known; on an accelerator's host it only keeps what is loaded.
    keep_freed_memory()
    os.environ.setdefault("MPLCONFIGDIR", os.fspath(cache_dir() / "matplotlib"))
    jax.config.update("jax_compilation_cache_dir", os.fspath(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
