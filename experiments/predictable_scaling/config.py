r"""Small GPTs on Python, by bytes: what a ladder of them says of one ten times as expensive.

Question: can the loss of a model be told, within 1 %, before it is trained?
Hardware: 2 CPU cores, about 90 minutes for all of it.
Expected: README.md beside this file; study.py runs the steps one after the other.

  gpt-jax data fetch sympy_code django_code
  gpt-jax sweep --config=experiments/predictable_scaling/config.py --sweep=ladder \
    --workdir=runs/predictable_scaling/ladder

Arguments: size (a key of SIZES), flops (of the run, by scaling.counts), debug.
"""

from ml_collections import ConfigDict

from configs.common import choose, parse_argument, shrink
from gpt_jax.models.config import TransformerConfig
from gpt_jax.scaling import counts

# Parameters of the layers: layers, width, heads.
SIZES = {
    "3k": (1, 16, 1),  # this one and the next two are of study.py --debug
    "7k": (1, 24, 1),
    "12k": (1, 32, 2),
    "6k": (2, 16, 1),
    "14k": (2, 24, 1),
    "25k": (2, 32, 2),
    "38k": (2, 40, 2),
    "55k": (2, 48, 3),
    "98k": (2, 64, 4),
    "147k": (3, 64, 4),
    "230k": (3, 80, 5),
    "307k": (4, 80, 5),
    "442k": (4, 96, 6),
    "602k": (4, 112, 7),
    "786k": (4, 128, 8),
    "1.2m": (6, 128, 8),
}
# Six sizes a budget (FLOPs), around the one that was best at the budget below.
LADDER = {
    1e11: ("6k", "14k", "25k", "38k", "55k", "98k"),
    3e11: ("14k", "25k", "38k", "55k", "98k", "147k"),
    5.5e11: ("25k", "38k", "55k", "98k", "147k", "230k"),
    1e12: ("25k", "38k", "55k", "98k", "147k", "230k"),
    1.7e12: ("38k", "55k", "98k", "147k", "230k", "307k"),
    3e12: ("38k", "55k", "98k", "147k", "230k", "442k"),
}
# The same in seconds; nothing can be learnt from it.
LADDER_DEBUG = {5e8: ("3k", "7k", "12k"), 1.5e9: ("3k", "7k", "12k")}
# Rates of Adam (embeddings and head) and of Muon (matrices), from the sweep `learning_rate`.
LEARNING_RATE, MUON_LEARNING_RATE = 0.05, 0.04
BATCH_SIZE, SEQ_LEN = 8, 256


def get_config(argument=None):
    arg = parse_argument(argument, size="55k", flops="3e11", debug=False)
    layers, width, heads = choose("size", arg["size"], SIZES)
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict()
    config.data.name = "python_stdlib+sympy_code+django_code"
    config.data.tokenizer = "bytes"
    config.data.vocab_size = 257
    config.data.seq_len = SEQ_LEN

    config.model = ConfigDict()
    config.model.vocab_size = 257
    config.model.seq_len = SEQ_LEN
    config.model.num_layers = layers
    config.model.embed_dim = width
    config.model.num_heads = heads
    config.model.dtype = "bfloat16"

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = LEARNING_RATE
    config.optimizer.muon_learning_rate = MUON_LEARNING_RATE
    config.optimizer.schedule = "linear"
    config.optimizer.warmup = "5%"
    config.optimizer.final = 0.0
    config.optimizer.weight_decay = 0.0

    config.train = ConfigDict()
    config.train.batch_size = BATCH_SIZE
    config.train.duration = steps_for(config, float(arg["flops"]))
    config.train.eval_every = config.train.checkpoint_every = "50%"
    config.train.sample_prompts = ()
    config.train.tensorboard = False

    if arg["debug"]:
        shrink(config)
    return config


def steps_for(config, flops):
    """Steps of BATCH_SIZE x SEQ_LEN tokens that cost so many FLOPs, by counts.FLOPS_RULE."""
    model = TransformerConfig(**config.model.to_dict())
    a_step = counts.flops_per_token(model, SEQ_LEN) * BATCH_SIZE * SEQ_LEN
    return max(1, round(flops / a_step))


def run_of(size, flops, **more):
    """What a run of this size and cost changes in the config."""
    config = get_config(f"size={size},flops={flops}")
    names = ("model.num_layers", "model.embed_dim", "model.num_heads", "train.duration")
    flat = config.to_dict()
    changed = {name: flat[name.split(".")[0]][name.split(".")[1]] for name in names}
    return {**changed, "group": f"{flops:g}".replace("e+", "e"), **more}


def sweep_learning_rate():
    """Both rates by one factor, at two sizes."""
    for size, flops in (("55k", 3e11), ("230k", 1e12)):
        for factor in (0.25, 0.5, 1.0, 2.0):
            rates = (LEARNING_RATE * factor, MUON_LEARNING_RATE * factor)
            names = ("optimizer.learning_rate", "optimizer.muon_learning_rate")
            yield run_of(size, flops, **dict(zip(names, rates, strict=True)))


def sweep_noise():
    """How far seeds alone move the loss, at two sizes."""
    for size, flops in (("25k", 1e11), ("98k", 1e12)):
        for seed in (1, 2, 3):
            yield run_of(size, flops, seed=seed)


def sweep_ladder(ladder=LADDER):
    """Six sizes at each of six budgets."""
    for flops, sizes in ladder.items():
        for size in sizes:
            yield run_of(size, flops)


def sweep_afterwards():
    """The held-out run at half of its rates: is its error that of its rates?"""
    names = ("optimizer.learning_rate", "optimizer.muon_learning_rate")
    halved = dict(zip(names, (LEARNING_RATE / 2, MUON_LEARNING_RATE / 2), strict=True))
    yield run_of("442k", 3e13, name="half_rates", **halved)


def sweep_debug():
    """The ladder of study.py --debug."""
    yield from sweep_ladder(LADDER_DEBUG)
