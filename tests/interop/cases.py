"""The published shapes of ALBERT, BERT and GPT-2, scaled down, and the options that their configs can have."""

from typing import Any, NamedTuple

VOCAB = 37
POSITIONS = 24


class Case(NamedTuple):
    """A class of transformers, the class of its config, and the options that differ from the defaults."""

    name: str
    model: str
    config: str
    options: dict[str, Any]

    def make(self):
        import transformers

        return getattr(transformers, self.model)(getattr(transformers, self.config)(**self.options))


def albert(name: str, model: str = "AlbertForMaskedLM", **options) -> Case:
    base = dict(
        vocab_size=VOCAB, max_position_embeddings=POSITIONS, embedding_size=16, hidden_size=48, num_attention_heads=4,
        intermediate_size=96, num_hidden_layers=4,
    )  # fmt: skip
    return Case(name, model, "AlbertConfig", base | options)


def bert(name: str, model: str = "BertForMaskedLM", **options) -> Case:
    base = dict(
        vocab_size=VOCAB, max_position_embeddings=POSITIONS, hidden_size=48, num_attention_heads=4,
        intermediate_size=96, num_hidden_layers=4,
    )  # fmt: skip
    return Case(name, model, "BertConfig", base | options)


def gpt2(name: str, model: str = "GPT2LMHeadModel", **options) -> Case:
    base = dict(vocab_size=VOCAB, n_positions=POSITIONS, n_embd=48, n_head=4, n_layer=4, bos_token_id=0, eos_token_id=0)
    return Case(name, model, "GPT2Config", base | options)


# Depths, heads and the ratio of the feed-forward layer are the published ones, widths are a twelfth or less.
CASES = [
    albert("albert-base-v2", hidden_size=48, num_attention_heads=12, intermediate_size=192, num_hidden_layers=12),
    albert("albert-base-v1", num_attention_heads=12, num_hidden_layers=12, hidden_act="gelu", hidden_dropout_prob=0.1),
    albert("albert-large", hidden_size=64, num_attention_heads=16, intermediate_size=256, num_hidden_layers=24),
    albert("albert-xlarge", hidden_size=96, num_attention_heads=16, intermediate_size=384, num_hidden_layers=24),
    albert("albert-xxlarge", hidden_size=128, num_attention_heads=64, intermediate_size=512, num_hidden_layers=12),
    albert("albert-groups", num_hidden_layers=6, num_hidden_groups=3),
    albert("albert-inner", num_hidden_groups=2, inner_group_num=3),
    albert("albert-square", embedding_size=48),
    albert("albert-eps", layer_norm_eps=1e-2),
    albert("albert-relu", hidden_act="relu"),
    albert("albert-untied", tie_word_embeddings=False),
    albert("albert-order", "AlbertForPreTraining"),
    albert("albert-classes", "AlbertForSequenceClassification", num_labels=3),
    albert("albert-regression", "AlbertForSequenceClassification", num_labels=1),
    albert("albert-bare", "AlbertModel"),
    bert("bert-base", num_attention_heads=12, intermediate_size=192, num_hidden_layers=12),
    bert("bert-order", "BertForPreTraining", hidden_act="gelu_new"),
    bert("bert-silu", hidden_act="silu", type_vocab_size=3),
    bert("bert-eps", layer_norm_eps=1e-2),
    bert("bert-untied", tie_word_embeddings=False),
    bert("bert-classes", "BertForSequenceClassification"),
    bert("bert-bare", "BertModel"),
    gpt2("gpt2-small", n_head=12, n_layer=12),
    gpt2("gpt2-untied", tie_word_embeddings=False, n_inner=50),
    gpt2("gpt2-relu", activation_function="relu"),
    gpt2("gpt2-by-layer", scale_attn_by_inverse_layer_idx=True),
    gpt2("gpt2-unscaled", scale_attn_weights=False, reorder_and_upcast_attn=True),
    gpt2("gpt2-eps", layer_norm_epsilon=1e-2),
    gpt2("gpt2-bare", "GPT2Model"),
]
