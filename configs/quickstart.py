"""Two minutes on a laptop: a GPT that writes something that looks like Python.

Question: does it all work here, and what does a small model reach in two minutes?
Hardware: 2 CPU cores.
Expected: 1.71 bits a byte on held-out modules; the loss starts at ln 2048 = 7.62.

  gpt-jax train --config=configs/quickstart.py --workdir=runs/quickstart

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
    config.data.vocab_size = 2048
    config.data.seq_len = 256

    config.model = ConfigDict()
    config.model.vocab_size = 2048
    config.model.seq_len = 256
    config.model.num_layers = 4
    config.model.embed_dim = 192
    config.model.num_heads = 6
    config.model.dtype = "bfloat16"

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.muon_learning_rate = 0.03
    config.optimizer.schedule = "linear"
    config.optimizer.warmup = "5%"
    config.optimizer.final = 0.0
    config.optimizer.weight_decay = 0.0

    config.train = ConfigDict()
    config.train.batch_size = 8
    config.train.duration = "320 steps"
    config.train.eval_every = config.train.checkpoint_every = "25%"

    config.mesh = ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1

    if arg["debug"]:
        shrink(config)
    return config
