"""How fast the blocks are: the same work, in the same process, taken in turns, and only where the results are equal."""

import os
import time

# What a command's budget counts from: torch is not imported yet.
STARTED = time.monotonic()

# The profiler announces every start and stop on stderr otherwise, across the progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
