"""From text to batches: corpora, a tokenizer, token files, and windows of them in a reproducible order.

`odelm.data.prepare.prepare(config)` gives the tokens; `odelm.data.loader.train_batches` and `eval_batches`
read them. The modules are imported where they are used: they need TFDS, Grain and tokenizers, and a model
does not.
"""
