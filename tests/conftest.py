"""Eight simulated devices for every test, and one small corpus for those that train."""

import importlib.metadata
import os
import pathlib

# Before JAX starts, here and in the processes that tests start: they never look for an accelerator,
# and as most of their programs run a few times, to optimize them would take longer than they run.
# XLA's older way to make the code of a fusion takes less than half the time of the usual one; later
# versions do not have it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_cpu_use_fusion_emitters=false"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else ""
)

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)  # for every test

# For processes that are to compile as a user's.
AS_FOR_USERS = {k: v for k, v in os.environ.items() if k != "JAX_DISABLE_MOST_OPTIMIZATIONS"}
AS_FOR_USERS["XLA_FLAGS"] = os.environ["XLA_FLAGS"].removesuffix(
    " --xla_cpu_use_fusion_emitters=false"
)

ROOT = pathlib.Path(__file__).parent.parent


def pytest_collection_modifyitems(items):
    """The file that takes longest comes first: at the end a process would be alone with it."""
    items.sort(key=lambda item: item.path.name != "test_studies.py")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> pathlib.Path:
    """A folder of 40 short texts over a few words."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then"]
    rng = np.random.default_rng(0)
    for i in range(40):
        sentences = [" ".join(rng.choice(words, rng.integers(4, 12))) + "." for _ in range(20)]
        (folder / f"{i:02}.txt").write_text("\n".join(sentences))
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> pathlib.Path:
    """The cache folder of all tests that train."""
    return tmp_path_factory.mktemp("cache")
