"""The linear maps into attention, and the heads that each of them computes.

With as many key-value heads as query heads one map `qkv` computes all three. With fewer (`model.kv_heads`; Ainslie et
al. 2023, arXiv 2305.13245) there are two maps, `query` and `key_value`: each is sharded evenly along its own heads, and
each is a whole number of matrices, which is what Muon trains.
"""

import math

from odelm.config import ModelConfig


def input_maps(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each input map's output for a token, by the map's name in `Attention`."""
    H, J, K = config.heads, config.key_value_heads, config.head_size
    return {"qkv": (3, H, K)} if J == H else {"query": (H, K), "key_value": (2, J, K)}


def input_sizes(config: ModelConfig) -> dict[str, int]:
    """Returns how many numbers each input map outputs for a token."""
    return {name: math.prod(shape) for name, shape in input_maps(config).items()}
