"""One decoder, several tasks at once, as text: sentiment, translation, code.

Question: does one model of a mixture do each task as well as a model of its own?
Hardware: 2 CPU cores, five minutes.
Expected: experiments/tasks/README.md.

  gpt-jax data fetch vader_movie libreoffice_en_de sympy_code
  gpt-jax train --config=configs/finetune_multitask.py:from=runs/gpt --workdir=runs/multitask

Arguments: from (a run of pretrain_gpt, hf:DIR), tasks (names with + between them), scratch, debug.
A single name gives the run to compare with.
"""

from configs.common import finetuned, parse_argument, shrink, small_optimizer

TASKS = "sentiment_en+translate_en_de+complete_line"


def get_config(argument=None):
    arg = parse_argument(argument, **{"from": "runs/gpt"}, tasks=TASKS, scratch=False, debug=False)
    names = tuple(arg["tasks"].split("+"))
    config = finetuned(arg["from"], names, 256, "causal_lm", arg["scratch"])
    if arg["tasks"] == TASKS:
        # By examples. A review has one word to be learned, a translation fifty: by sizes or their
        # root the classes get too little of the loss to be learned at all.
        config.tasks.weights = (6.0, 0.9, 0.5)

    small_optimizer(config, 1e-2, muon=0.02)
    config.train.batch_size = 8
    config.train.duration = "600 steps"

    if arg["debug"]:
        shrink(config)
    return config
