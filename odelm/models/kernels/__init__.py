"""Kernels for decoding on one Hopper GPU, written in Pallas for Mosaic GPU (jax 0.11 and later).

`decode` computes many tokens in one launch: its programs, one on each multiprocessor, divide the rows of every matrix
among them, and continue with each other's results as soon as these are written. docs/kernels.md has the design and the
figures.
"""
