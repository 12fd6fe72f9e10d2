"""The Flax modules: reusable one by one, put together by `create`."""

from odelm.models.attention import Attention
from odelm.models.block import BlockChain, Condition, SharedBlock
from odelm.models.embed import Embed, Readout
from odelm.models.feedforward import FeedForward
from odelm.models.field import BlockField
from odelm.models.lm import CausalLM, Classifier, Encoder, MaskedLM, create
from odelm.models.modulation import Modulation
from odelm.models.norm import Norm
from odelm.models.packing import Packing
from odelm.models.residual import LayerResidual
from odelm.models.transformer import SharedTransformer

__all__ = [
    "Attention",
    "BlockChain",
    "BlockField",
    "CausalLM",
    "Classifier",
    "Condition",
    "Embed",
    "Encoder",
    "FeedForward",
    "LayerResidual",
    "MaskedLM",
    "Modulation",
    "Norm",
    "Packing",
    "Readout",
    "SharedBlock",
    "SharedTransformer",
    "create",
]
