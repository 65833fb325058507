"""Methods for hybridengine by somebody else."""

import os
from pathlib import Path

# Lets the tests see that listing plugins imports nothing: whoever imports this package leaves a trace.
if trace := os.environ.get("ACME_IMPORTED"):
    Path(trace).touch()
