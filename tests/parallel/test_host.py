"""Memory that was freed is not fetched from the kernel again."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from w2sjax.parallel import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        np.ones(2**23)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = new_pages()
if not keep_freed_memory():
    sys.exit(3)
new_pages()
print(first, new_pages())
"""


def test_freed_memory_is_used_again():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    if run.returncode == 3:
        pytest.skip("the C library is not glibc")
    assert run.returncode == 0, run.stderr
    before, after = map(int, run.stdout.split())
    assert after < before / 20
