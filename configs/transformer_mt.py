"""The original Transformer, translating: arXiv:1706.03762, base and big, and one for a CPU.

Question: what does the model of the paper reach on a parallel corpus?
Hardware: size=small a laptop's CPU; base and big a GPU or TPU.
Expected: size=small: experiments/tasks/README.md.

  gpt-jax data fetch libreoffice_en_de
  gpt-jax train --config=configs/transformer_mt.py --workdir=runs/mt

Arguments: size (small, base, big), task (translate_en_de, translate_en_zh, ...), debug.
The tokenizer is trained on both sides of the training pairs and shared.
"""

from ml_collections import ConfigDict

from configs.architectures import original_transformer, small
from configs.common import choose, parse_argument, shrink, small_optimizer

SIZES = ("small", "base", "big")


def get_config(argument=None):
    arg = parse_argument(argument, size="small", task="translate_en_de", debug=False)
    size = choose("size", arg["size"], dict(zip(SIZES, SIZES, strict=True)))
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict()
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 4096 if size == "small" else 37_000
    config.data.seq_len = 96 if size == "small" else 256

    if size == "small":
        config.model = small("encoder_decoder", layers=3)
    else:
        config.model = original_transformer(size == "big")

    config.tasks = ConfigDict()
    config.tasks.names = (arg["task"],)
    config.tasks.max_new_tokens = 96
    config.tasks.eval_examples = 100

    config.objective = ConfigDict()
    config.objective.name = "seq2seq"
    config.objective.label_smoothing = 0.1

    config.train = ConfigDict()
    if size == "small":
        small_optimizer(config, 1e-2, muon=0.03)
        config.train.batch_size = 16
        config.train.duration = "600 steps"
    else:
        config.optimizer = ConfigDict()
        config.optimizer.name = "adam"
        config.optimizer.learning_rate = 7e-4
        config.optimizer.b2 = 0.98
        config.optimizer.eps = 1e-9
        config.optimizer.schedule = "cosine"
        config.optimizer.warmup = "4000 steps"
        config.train.batch_size = 128
        config.train.duration = "100000 steps" if size == "base" else "300000 steps"
    config.train.eval_every = config.train.checkpoint_every = "50%"

    if arg["debug"]:
        shrink(config)
    return config
