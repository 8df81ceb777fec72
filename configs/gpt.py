"""Our own recipe, from 100k to 30B parameters: rotary positions, RMSNorm, qk-norm, ReLU^2, Muon.

Question: what does a GPT of a given size reach on a text?
Hardware: up to 10m a laptop's CPU; up to 300m one GPU; above that, set the mesh.
Expected: size=1m on a laptop's CPU gives its first loss in under a minute.

  gpt-jax train --config=configs/gpt.py:size=1m --config.data.path=FOLDER_OF_TEXTS

Arguments: size (100k, 300k, 1m, 3m, 10m, 30m, 100m, 300m, 1b, 3b, 7b, 30b), debug.
"""

from ml_collections import ConfigDict

from configs.common import choose, parse_argument, shrink

# name: layers, width, heads.  Heads of 32 to 128; the MLP is four times as wide.  The number of
# parameters that gives the name counts all but the embeddings.
SIZES = {
    "100k": (2, 64, 2),
    "300k": (3, 96, 3),
    "1m": (5, 128, 4),
    "3m": (7, 192, 6),
    "10m": (8, 320, 5),
    "30m": (10, 512, 8),
    "100m": (14, 768, 12),
    "300m": (24, 1024, 16),
    "1b": (24, 1920, 15),
    "3b": (32, 2816, 22),
    "7b": (32, 4096, 32),
    "30b": (48, 7168, 56),
}


def get_config(argument=None):
    arg = parse_argument(argument, size="1m", debug=False)
    layers, width, heads = choose("size", arg["size"], SIZES)
    small = width < 512  # what a CPU trains: a short context and a small vocabulary
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict()
    config.data.name = "python_stdlib"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 2048 if small else 32_768
    config.data.seq_len = 256 if small else 2048

    config.model = ConfigDict()
    config.model.vocab_size = config.data.vocab_size
    config.model.seq_len = config.data.seq_len
    config.model.num_layers = layers
    config.model.embed_dim = width
    config.model.num_heads = heads
    config.model.dtype = "bfloat16"
    config.model.scan = not small
    config.model.remat = "none" if small else "full"

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 3e-3 if small else 1e-3
    config.optimizer.muon_learning_rate = 0.02
    config.optimizer.schedule = "wsd"
    config.optimizer.warmup = "2%"
    config.optimizer.decay = "40%"
    config.optimizer.final = 0.0
    config.optimizer.weight_decay = 0.0

    config.train = ConfigDict()
    config.train.batch_size = 16 if small else 256
    config.train.duration = "1000 steps"
    config.train.num_microbatches = 1 if small else 16

    config.mesh = ConfigDict()
    config.mesh.data = 1 if width >= 1920 else -1
    config.mesh.fsdp = -1 if width >= 1920 else 1

    if arg["debug"]:
        shrink(config)
    return config
