"""The Flax modules: each can be used separately, and `create` assembles them into a model."""

from odelm.models.attention import Attention
from odelm.models.block import Condition, SharedBlock
from odelm.models.chain import BlockChain
from odelm.models.embed import Embed, Readout
from odelm.models.feedforward import FeedForward
from odelm.models.field import BlockField
from odelm.models.inputs import Inputs
from odelm.models.lanes import LaneBlock
from odelm.models.lm import CausalLM, Classifier, Encoder, MaskedLM, create
from odelm.models.memory import Memory
from odelm.models.modulation import Modulation
from odelm.models.norm import Norm
from odelm.models.residual import LayerDelta
from odelm.models.transformer import SharedTransformer
from odelm.models.view import View

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
    "Inputs",
    "LaneBlock",
    "LayerDelta",
    "Memory",
    "MaskedLM",
    "Modulation",
    "Norm",
    "Readout",
    "SharedBlock",
    "SharedTransformer",
    "View",
    "create",
]
