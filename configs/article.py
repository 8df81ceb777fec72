"""The small GPT that articles on GPT-4 give as an example: 6 layers of 512, dropout, Adam.

Question: what does the textbook model reach on real text?
Hardware: one GPU, or a CPU with patience (about 29M parameters).
Expected: the loss starts at ln 10000 = 9.21.

  gpt-jax train --config=configs/article.py --config.data.path=FOLDER_OF_TEXTS

Arguments: debug.
"""

from ml_collections import ConfigDict

from configs.common import parse_argument, shrink


def get_config(argument=None):
    arg = parse_argument(argument, debug=False)
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict()
    config.data.name = "python_stdlib"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 10_000
    config.data.seq_len = 256

    config.model = ConfigDict()
    config.model.vocab_size = 10_000
    config.model.seq_len = 256
    config.model.num_layers = 6
    config.model.embed_dim = 512
    config.model.num_heads = 8
    config.model.mlp_dim = 2048
    config.model.positions = "learned"
    config.model.norm = "layernorm"
    config.model.norm_eps = 1e-5
    config.model.activation = "gelu"
    config.model.bias = True
    config.model.tied = False
    config.model.qk_norm = False
    config.model.dropout = 0.1
    config.model.init = "gpt2"

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.b2 = 0.999
    config.optimizer.schedule = "constant"
    config.optimizer.warmup = 0

    config.train = ConfigDict()
    config.train.batch_size = 32
    config.train.duration = "2 epochs"

    config.mesh = ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1

    if arg["debug"]:
        shrink(config)
    return config
