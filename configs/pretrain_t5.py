"""T5: span corruption, an encoder-decoder that fills in what was removed.

Question: what does an encoder-decoder bring to translation from text alone?
Hardware: size=small a laptop's CPU in five minutes; t5-small, t5-base, t5-large, exactly as
published (version 1.0 or 1.1), a GPU or TPU.
Expected: size=small: experiments/tasks/README.md.

  gpt-jax data fetch libreoffice_en_de gutenberg
  gpt-jax train --config=configs/pretrain_t5.py --workdir=runs/t5

Arguments: size (small, t5-small, t5-base, t5-large), version (1.0, 1.1), debug. The small one reads
the German side of the help texts' training split and English books.
"""

from ml_collections import ConfigDict

from configs.architectures import small, t5
from configs.common import choose, parse_argument, shrink, small_optimizer

SIZES = {"small": "", "t5-small": "small", "t5-base": "base", "t5-large": "large"}


def get_config(argument=None):
    arg = parse_argument(argument, size="small", version="1.1", debug=False)
    size = choose("size", arg["size"], SIZES)
    choose("version", arg["version"], {"1.0": 0, "1.1": 1})
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict()
    config.data.name = "gutenberg" if size else "libreoffice_en_de"
    config.data.field = "text" if size else "target"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 32_000 if size else 4096
    # A row of 512 tokens has 26 spans, one of 128 has 6.
    config.data.special_tokens = tuple(f"<extra_id_{i}>" for i in range(100 if size else 10))
    config.data.seq_len = 512 if size else 128

    if size:
        config.model = t5(size, arg["version"])
        config.model.start_id = -1  # the tokenizer's own end of text
    else:
        config.model = small("encoder_decoder", layers=3)

    config.objective = ConfigDict()
    config.objective.name = "span_corruption"

    config.train = ConfigDict()
    if size:
        config.optimizer = ConfigDict()
        config.optimizer.learning_rate = 1e-3
        config.optimizer.schedule = "cosine"
        config.train.batch_size = 128
        config.train.duration = "500000 steps"
    else:
        small_optimizer(config, 1e-2, muon=0.03)
        config.train.batch_size = 32
        config.train.duration = "500 steps"
    config.train.eval_every = config.train.checkpoint_every = "25%"

    if arg["debug"]:
        shrink(config)
    return config
