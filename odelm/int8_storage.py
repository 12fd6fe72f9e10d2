"""Arrays of numbers stored in a quarter of the bytes: int8, in blocks of 64 that have a scale each.

A block's scale is its largest absolute value over 127, so that a number is off by at most half of it. Arrays that
were read back are stored as the same bytes again. (`odelm.infer.quantize` is for computing in 8 bits, this module only
for files.)
"""

import numpy as np

BLOCK = 64
SMALLEST = 4096
"""Arrays of fewer numbers are stored as they are."""
SCALES = ":scales"
"""The suffix of the name of an array's scales."""
Arrays = dict[str, np.ndarray]


def pack(arrays: Arrays) -> Arrays:
    """Returns the arrays with each large one of float32 as int8 of its shape, and its scales, float32 (blocks,), under
    its name with `SCALES`."""
    packed = {}
    for name, array in arrays.items():
        if array.dtype != np.float32 or array.size < SMALLEST:
            packed[name] = array
            continue
        blocks = _blocks(array)
        scales = np.abs(blocks).max(axis=1) / 127
        values = np.rint(blocks / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
        packed[name] = values.ravel()[: array.size].reshape(array.shape)
        packed[name + SCALES] = scales.astype(np.float32)
    return packed


def unpacked(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the float32 numbers of int8 values and their scales."""
    blocks = _blocks(values).astype(np.float32) * scales[:, None]
    return blocks.ravel()[: values.size].reshape(values.shape)


def scale_count(size: int) -> int:
    """Returns how many scales `size` values have."""
    return -(-size // BLOCK)


def _blocks(array: np.ndarray) -> np.ndarray:
    """Returns the numbers as (blocks, BLOCK), the last one padded with zeros."""
    flat = np.ascontiguousarray(array).ravel()
    return np.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
