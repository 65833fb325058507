"""The kernels against their competitors on this machine: what `hybridengine bench` runs.

`ops/` holds one file an operation: its cases, and for each competitor one function of the case's tensors. A new
operation is a new file there and nothing else; `case.py` says what it must hold. Nothing is imported here, so that
names can be checked before torch is loaded.
"""
