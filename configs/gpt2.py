"""GPT-2, exactly: the architecture of Radford et al. 2019, trained by next-token prediction.

Question: does a GPT-2 trained here reach the loss of one trained elsewhere on the same text?
Hardware: 124m to 774m one GPU or TPU host; 1.5b a mesh with fsdp; debug a laptop's CPU.
Expected: a vocabulary of 50257, so the loss starts at ln 50257 = 10.82.

  gpt-jax train --config=configs/gpt2.py:size=124m --config.data.name=lm1b:1.1.0 \\
      --config.data.validation_split=test --config.data.tokenizer=GPT2_TOKENIZER_JSON

Arguments: size (124m, 350m, 774m, 1.5b), debug.  Without a tokenizer.json of GPT-2 a vocabulary
of the same size is trained on the corpus.
"""

from ml_collections import ConfigDict

from configs.common import choose, parse_argument, shrink

# name: layers, width, heads (the four sizes of the report; heads of 64)
SIZES = {
    "124m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "774m": (36, 1280, 20),
    "1.5b": (48, 1600, 25),
}


def get_config(argument=None):
    arg = parse_argument(argument, size="124m", debug=False)
    layers, width, heads = choose("size", arg["size"], SIZES)
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict()
    config.data.name = "python_stdlib"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 50_257
    config.data.seq_len = 1024

    config.model = ConfigDict()
    config.model.vocab_size = 50_257
    config.model.seq_len = 1024
    config.model.num_layers = layers
    config.model.embed_dim = width
    config.model.num_heads = heads
    config.model.positions = "learned"
    config.model.norm = "layernorm"
    config.model.norm_eps = 1e-5
    config.model.activation = "gelu"
    config.model.bias = True
    config.model.tied = True
    config.model.qk_norm = False
    config.model.dropout = 0.0  # 0.1 in the report; 0 when no text is seen twice
    config.model.init = "gpt2"
    config.model.dtype = "bfloat16"
    config.model.scan = True
    config.model.remat = "dots"

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 6e-4 if arg["size"] == "124m" else 3e-4
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = "2%"
    config.optimizer.weight_decay = 0.1

    config.train = ConfigDict()
    config.train.batch_size = 512  # half a million tokens, as in the report
    config.train.num_microbatches = 8
    config.train.duration = "10B tokens"

    config.mesh = ConfigDict()
    config.mesh.data = 1 if arg["size"] == "1.5b" else -1
    config.mesh.fsdp = -1 if arg["size"] == "1.5b" else 1

    if arg["debug"]:
        shrink(config)
    return config
