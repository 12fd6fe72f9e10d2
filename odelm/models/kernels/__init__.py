"""Kernels for decoding on one Hopper GPU, written in Pallas for Mosaic GPU (jax 0.11 and later).

`decode` computes many tokens in one launch: its programs, one on each multiprocessor, share out the rows of every
matrix, and go on with what the others have left as soon as it is there. docs/kernels.md has the design and the figures.
"""
