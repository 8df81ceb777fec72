"""Stands in for an sdist's build backend while pip downloads it; see packages.py.

pip runs this file as `setuptools.build_meta` or `hatchling.build` in the unpacked sdist.  It tells
pip the name and version that PKG-INFO holds and builds nothing.
"""

import email
import os
import shutil
import sys


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return []


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None) -> str:
    with open("PKG-INFO", encoding="utf-8", errors="replace") as file:
        metadata = email.message_from_file(file)
    name = f"{metadata['Name'].replace('-', '_')}-{metadata['Version']}.dist-info"
    os.makedirs(os.path.join(metadata_directory, name))
    shutil.copyfile("PKG-INFO", os.path.join(metadata_directory, name, "METADATA"))
    return name


# An sdist without a pyproject.toml asks for this object of setuptools.
__legacy__ = sys.modules[__name__]
