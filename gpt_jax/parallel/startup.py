"""What a process does before its first computation."""

import os

import jax

from gpt_jax.parallel.cache_folder import cache_dir, keep_libraries_files
from gpt_jax.parallel.host_memory import keep_freed_memory


def keep_memory(one_arena: bool = False) -> None:
    """Before the first computation: what a step on CPU frees, the next one gets.

    On an accelerator's host it only keeps what is loaded.

    Args:
      one_arena: See host_memory; for what computes little and writes much.
    """
    keep_freed_memory(one_arena)
    # So a program of one device is computed, and its buffers are taken, by the thread that calls
    # it. Training calls from the first one, the only one of which large blocks are kept.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def start(one_arena: bool = False) -> None:
    """Before the first computation: memory is kept, compiled programs are cached.

    A second start compiles nothing.

    Args:
      one_arena: See keep_memory.
    """
    keep_memory(one_arena)
    keep_libraries_files()
    jax.config.update("jax_compilation_cache_dir", os.fspath(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
