r"""What English is worth to a model of Python: from scratch against finetuned, by size and data.

Question: how many characters of Python does pretraining on English stand for
(arXiv:2102.01293)?
Hardware: 2 CPU cores, about 75 minutes for all of it.
Expected: README.md beside this file; study.py runs the steps one after the other.

  gpt-jax data fetch gutenberg sotu shakespeare
  gpt-jax sweep --config=experiments/pretraining_vs_finetuning/config.py --sweep=transfer \
    --workdir=runs/transfer

Arguments: size (a key of SIZES), text (english, python), task (sentiment_en; its own sweep is
`labelled`), debug.
"""

from ml_collections import ConfigDict

from configs.common import choose, finetuned, parse_argument, shrink, small_optimizer

# Parameters of the layers: layers, width, heads; tokens of the pretraining, 40 a parameter.
SIZES = {
    "25k": (2, 32, 2, 1_600_000),
    "55k": (2, 48, 3, 3_200_000),
    "147k": (3, 64, 4, 7_200_000),
}
TEXTS = {"english": "gutenberg+sotu+shakespeare", "python": "python_stdlib"}
# Characters of Python, and how often they are read: as often as it may help, the evaluations
# choose the best moment.
EPOCHS = {
    10_000: 16,
    32_000: 12,
    100_000: 8,
    320_000: 6,
    1_000_000: 3,
    3_200_000: 2,
}
# More seeds where the data are few: there chance is largest.
SECOND_SEED_UP_TO = 100_000
# Rates of Adam (embeddings and head) and of Muon (matrices): of the ladder in
# experiments/predictable_scaling; finetuning takes a share of them, see finetuning_share.
LEARNING_RATE, MUON_LEARNING_RATE = 0.05, 0.04


def get_config(argument=None):
    arg = parse_argument(argument, size="55k", text="python", task="", debug=False)
    if arg["task"]:
        return _labelled_config(arg["task"])
    layers, width, heads, _ = choose("size", arg["size"], SIZES)
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict()
    config.data.name = choose("text", arg["text"], TEXTS)
    config.data.tokenizer = "bytes"
    config.data.vocab_size = 257
    config.data.seq_len = 256

    config.model = ConfigDict()
    config.model.vocab_size = 257
    config.model.seq_len = 256
    config.model.num_layers = layers
    config.model.embed_dim = width
    config.model.num_heads = heads
    config.model.dtype = "bfloat16"

    config.init = ConfigDict()
    config.init.source = ""

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = LEARNING_RATE
    config.optimizer.muon_learning_rate = MUON_LEARNING_RATE
    config.optimizer.schedule = "linear"
    config.optimizer.warmup = "5%"
    config.optimizer.final = 0.0
    config.optimizer.weight_decay = 0.0

    config.train = ConfigDict()
    config.train.batch_size = 8
    config.train.duration = "1M tokens"
    # The best of ten evaluations counts, all on the same rows; two worse ones in a row end a run.
    config.train.eval_every = config.train.checkpoint_every = "10%"
    config.train.eval_batches = 40
    config.train.keep = config.train.keep_best = 1
    config.train.patience = 2
    config.train.sample_prompts = ()
    config.train.tensorboard = False

    if arg["debug"]:
        shrink(config)
    return config


def _labelled_config(task):
    """A task with labels, as text: the answer's characters are the targets."""
    config = finetuned("runs/transfer/english-147k", (task,), 256, "causal_lm")
    small_optimizer(config, LEARNING_RATE / 2, muon=MUON_LEARNING_RATE / 2)
    config.train.batch_size = 8
    config.train.duration = "4 epochs"
    # The best of eight evaluations of the whole validation split.
    config.tasks.eval_examples = 0
    config.train.eval_every = config.train.checkpoint_every = "12.5%"
    config.train.metric = f"{task}/accuracy"
    config.train.keep = config.train.keep_best = 1
    config.train.tensorboard = False
    return config


def _model(size):
    layers, width, heads, _ = SIZES[size]
    return {
        "model.num_layers": layers,
        "model.embed_dim": width,
        "model.num_heads": heads,
        "group": size,
    }


def _python(size, num_tokens, seed):
    return {
        **_model(size),
        "data.train_tokens": num_tokens,
        "train.duration": f"{EPOCHS[num_tokens]} epochs",
        "seed": seed,
    }


def finetuning_share(num_tokens):
    """Of the rates: 0.3 with 32k characters and 1 with 1M were best in the sweep of both."""
    return min(1.0, (num_tokens / 1e6) ** 0.35)


def _rates(share):
    return {
        "optimizer.learning_rate": LEARNING_RATE * share,
        "optimizer.muon_learning_rate": MUON_LEARNING_RATE * share,
    }


def _seeds(num_tokens):
    return (0, 1) if num_tokens <= SECOND_SEED_UP_TO else (0,)


def sweep_pretraining():
    """English, once for each size."""
    for size, (*_, num_tokens) in SIZES.items():
        yield {
            **_model(size),
            "name": f"english-{size}",
            "data.name": TEXTS["english"],
            "train.duration": f"{num_tokens} tokens",
        }


def sweep_scratch():
    """Python alone."""
    for size in SIZES:
        for num_tokens in EPOCHS:
            for seed in _seeds(num_tokens):
                name = f"scratch-{size}-{num_tokens // 1000}k-s{seed}"
                yield {**_python(size, num_tokens, seed), "name": name}


def sweep_finetuned():
    """Python after English."""
    for size in SIZES:
        for num_tokens in EPOCHS:
            for seed in _seeds(num_tokens):
                yield {
                    **_python(size, num_tokens, seed),
                    "name": f"finetuned-{size}-{num_tokens // 1000}k-s{seed}",
                    "init.source": f"{{sweep}}/english-{size}",
                    **_rates(finetuning_share(num_tokens)),
                }


def sweep_finetuning_rates():
    """What share of the pretraining's rates finetuning takes, with few data and with many."""
    yield from (run for run in sweep_pretraining() if run["group"] == "55k")
    for num_tokens in (32_000, 1_000_000):
        for share in (0.1, 0.3, 1.0):
            yield {
                **_python("55k", num_tokens, 0),
                "name": f"rates-55k-{num_tokens // 1000}k-{share}",
                "init.source": "{sweep}/english-55k",
                **_rates(share),
            }


def sweep_labelled():
    """Sentiment of film reviews with 250 to 4,000 labels, after English and from scratch."""
    for num_examples, epochs in ((250, 8), (1000, 6), (4000, 3)):
        for seed in (0, 1):
            run = {
                "tasks.limit": num_examples,
                "train.duration": f"{epochs} epochs",
                "seed": seed,
                "init.source": "{sweep}/english-147k",
            }
            where = f"sentiment-{num_examples}-s{seed}"
            yield {**run, "name": f"finetuned-{where}", "group": "finetuned"}
            yield {**run, "name": f"scratch-{where}", "group": "scratch", "init.skip": (".",)}


def sweep_transfer():
    """All of it, what others begin from first."""
    yield from sweep_pretraining()
    yield from sweep_scratch()
    yield from sweep_finetuned()


def sweep_debug():
    """Two amounts of a few steps at the smallest size: what study.py --debug runs."""
    english = next(run for run in sweep_pretraining() if run["group"] == "25k")
    few = {"train.eval_every": "50%", "train.checkpoint_every": "50%", "train.eval_batches": 5}
    yield {**english, "train.duration": "20 steps", **few}
    for begin in ("scratch", "finetuned"):
        for num_tokens in (5_000, 20_000):
            run = {
                **_model("25k"),
                "name": f"{begin}-25k-{num_tokens // 1000}k-s0",
                "data.train_tokens": num_tokens,
                "train.duration": "2 epochs",
                **few,
            }
            yield run if begin == "scratch" else {**run, "init.source": "{sweep}/english-25k"}
