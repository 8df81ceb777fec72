"""Small GPTs on Python, by bytes: what a ladder of them says of one ten times as expensive.

Question: can the loss of a model be told, within 1 %, before it is trained?
Hardware: 2 CPU cores.
Expected: README.md beside this file.

  gpt-jax data fetch sympy_code django_code
  gpt-jax sweep --config=experiments/predictable_scaling/config.py --sweep=ladder --workdir=runs/predictable_scaling

Arguments: size (a key of SIZES), debug.
"""

from ml_collections import ConfigDict

from configs.common import choose, parse_argument, shrink

# name, about the number of parameters of the layers: layers, width.  Heads of 16 or 32.
SIZES = {
    "14k": (2, 24),
    "25k": (2, 32),
    "55k": (2, 48),
    "83k": (3, 48),
    "147k": (3, 64),
    "230k": (3, 80),
    "307k": (4, 80),
    "442k": (4, 96),
    "602k": (4, 112),
    "786k": (4, 128),
    "1.2m": (6, 128),
}
# Adam's rate at 55k; it falls with the cube root of the size (arXiv:2406.19146).
LEARNING_RATE = 8e-3


def get_config(argument=None):
    arg = parse_argument(argument, size="55k", debug=False)
    layers, width = choose("size", arg["size"], SIZES)
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict()
    config.data.name = "python_stdlib+sympy_code+django_code"
    config.data.tokenizer = "bytes"
    config.data.vocab_size = 257
    config.data.seq_len = 256

    config.model = ConfigDict()
    config.model.vocab_size = 257
    config.model.seq_len = 256
    config.model.num_layers = layers
    config.model.embed_dim = width
    config.model.num_heads = width // 16
    config.model.dtype = "bfloat16"

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = LEARNING_RATE
    config.optimizer.schedule = "linear"
    config.optimizer.warmup = "5%"
    config.optimizer.final = 0.0
    config.optimizer.weight_decay = 0.0
    config.optimizer.b2 = 0.99

    config.train = ConfigDict()
    config.train.batch_size = 8
    config.train.duration = "100 steps"
    config.train.eval_every = config.train.checkpoint_every = "50%"
    config.train.sample_prompts = ()

    if arg["debug"]:
        shrink(config)
    return config
