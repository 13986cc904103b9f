"""The build backend: setuptools', which installs torch into an isolated build if the user names a release of it.

    pip install . -C torch=2.13.0

Without that, torch is no build requirement: the compiled kernels fit one release of torch, and only the user knows
which one will be there when they are loaded.
"""

import re

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the other hooks


def _named(settings):
    if not settings or "torch" not in settings:
        return []
    release = settings["torch"]
    if not isinstance(release, str) or not re.fullmatch(r"\d+(\.\d+)*(\.\*)?(\+\w+)?", release):
        raise SystemExit(f"rgd_ext: torch is {release!r} in the settings of the build: pass a release, -C torch=2.13.0")
    return [f"torch=={release}", "ninja"]


def get_requires_for_build_wheel(config_settings=None):
    """What the build needs besides `build-system.requires` in pyproject.toml."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _named(config_settings)


def get_requires_for_build_editable(config_settings=None):
    """The same for `pip install --editable`."""
    return build_meta.get_requires_for_build_editable(config_settings) + _named(config_settings)
