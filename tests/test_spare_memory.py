"""Large pieces of memory that the CPU engine keeps from call to call (csrc/cpu/resident/spare.h)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fastode.ops.resident.functions import LESS_MEMORY

# Packed weights of two convolutions forwards, and of their transposes: 36 MB, of which glibc's malloc keeps nothing.
CALLS = """
import resource, torch, fastode
from fastode import reference
torch.set_num_threads(1)
block = reference.IESkip(reference.PreActBranch(512, norm="layer", bias=False))
fastode.fuse(block, engine="resident")
x = torch.randn(1, 512, 4, 4)
with torch.no_grad():
    found = [block(x) for _ in range(3)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    found += [block(x) for _ in range(4)]
assert all(torch.equal(found[0], other) for other in found)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_asked_for(less: bool) -> int:
    """Pages that four calls ask the system for, in a process with glibc's own settings."""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    environment[LESS_MEMORY] = str(int(less))
    done = subprocess.run([sys.executable, "-c", CALLS], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc's malloc")
def test_large_pieces_are_kept_from_call_to_call() -> None:
    """And with FASTODE_LESS_MEMORY=1 they go back to the system."""
    page, each = os.sysconf("SC_PAGE_SIZE"), 36 << 20
    assert pages_asked_for(less=True) > 3 * each // page
    assert pages_asked_for(less=False) < each // page
