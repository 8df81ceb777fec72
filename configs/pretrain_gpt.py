"""A small GPT on English books and speeches and on Python: what the finetune configs begin from.

Question: what does a decoder bring to translation, code and classification from text alone?
Hardware: 2 CPU cores, five minutes.
Expected: experiments/tasks/README.md. The loss starts at ln 4096 = 8.32.

  gpt-jax data fetch gutenberg sotu sympy_code django_code
  gpt-jax train --config=configs/pretrain_gpt.py --workdir=runs/gpt

Arguments: objective (causal_lm, fill_in_the_middle, permutation_lm, prefix_lm), debug.
"""

from ml_collections import ConfigDict

from configs.architectures import small
from configs.common import parse_argument, shrink, small_optimizer


def get_config(argument=None):
    arg = parse_argument(argument, objective="causal_lm", debug=False)
    config = ConfigDict()
    config.seed = 0

    config.data = ConfigDict()
    config.data.name = "gutenberg+sotu+sympy_code+django_code"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 4096
    config.data.special_tokens = ("<mask>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    config.data.seq_len = 256

    config.model = small("decoder", seq_len=256)
    config.model.read_prompts_whole = arg["objective"] == "prefix_lm"

    config.objective = ConfigDict()
    config.objective.name = arg["objective"]

    small_optimizer(config, 1e-2, muon=0.03)

    config.train = ConfigDict()
    config.train.batch_size = 8
    config.train.duration = "700 steps"
    config.train.eval_every = config.train.checkpoint_every = "25%"

    if arg["debug"]:
        shrink(config)
    return config
