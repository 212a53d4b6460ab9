"""Compiled kernels for the CPU: C++ behind a plain C interface, and the Python that loads and calls it.

`native` loads the library and says which instructions it may use; `linear` multiplies by weights, `attention` answers
queries over the paged pools, `elementwise` normalises, turns and activates. Where the library is missing or does not
fit, whoever wanted it computes the same with PyTorch's operations.
"""
