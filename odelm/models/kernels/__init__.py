"""Kernels for decoding on one GPU, written in Pallas for Mosaic GPU (Hopper and later; jax 0.11 and later).

`persistent` is one kernel that decodes many tokens in a launch: the programs, one on each multiprocessor, share out the
rows of every matrix and meet at a barrier after every phase of a step. docs/kernels.md has its design and its floors.
"""
