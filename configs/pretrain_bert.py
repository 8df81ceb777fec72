"""BERT: masked language modelling on English books, speeches and plays (or one's own text).

Question: what does a bidirectional encoder learn from text alone?
Hardware: size=small a laptop's CPU in five minutes; size=base (BERT-base, exactly) a GPU or TPU.
Expected: size=small: experiments/tasks/README.md. The loss starts at ln 4096 = 8.32.

  gpt-jax data fetch gutenberg sotu shakespeare
  gpt-jax train --config=configs/pretrain_bert.py --workdir=runs/bert

Arguments: size (small, base, large), debug.
"""

from ml_collections import ConfigDict

from configs.architectures import bert, small
from configs.common import choose, parse_argument, shrink, small_optimizer

SIZES = {"small": None, "base": (12, 768, 12), "large": (24, 1024, 16)}


def get_config(argument=None):
    arg = parse_argument(argument, size="small", debug=False)
    shape = choose("size", arg["size"], SIZES)
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict()
    config.data.name = "gutenberg+sotu+shakespeare"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 30_522 if shape else 4096
    config.data.special_tokens = ("<mask>",)
    config.data.seq_len = 512 if shape else 128

    config.model = bert(*shape) if shape else small("encoder", head="mlm")

    config.objective = ConfigDict()
    config.objective.name = "masked_lm"
    if not shape:
        config.objective.mask_rate = 0.2  # more is learnt from each of few steps

    config.train = ConfigDict()
    if shape:
        config.optimizer = ConfigDict()
        config.optimizer.learning_rate = 1e-4
        config.optimizer.b2 = 0.999
        config.optimizer.schedule = "linear"
        config.optimizer.warmup = "1%"
        config.optimizer.final = 0.0
        config.optimizer.weight_decay = 0.01
        config.train.batch_size = 256
        config.train.num_microbatches = 8
        config.train.duration = "1000000 steps"
    else:
        small_optimizer(config, 1e-2, muon=0.03)
        config.train.batch_size = 32
        config.train.duration = "500 steps"
    config.train.eval_every = config.train.checkpoint_every = "25%"

    if arg["debug"]:
        shrink(config)
    return config
