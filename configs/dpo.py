"""Direct preference optimization (arXiv:2305.18290): of two answers, the better one.

Question: does a model learn which answers are preferred, and does it hold on new prompts?
Hardware: 2 CPU cores, five minutes from runs/gpt.
Expected: experiments/tasks/README.md.

  gpt-jax data fetch llamafactory_dpo_en
  gpt-jax train --config=configs/dpo.py:from=runs/gpt --workdir=runs/dpo

Arguments: from (a run, hf:DIR, gguf:FILE; also the reference model), task (preference_en,
preference_zh, preference:FILE.jsonl), debug.
"""

from ml_collections import ConfigDict

from configs.common import finetuned, parse_argument, shrink


def get_config(argument=None):
    arg = parse_argument(argument, **{"from": "runs/gpt"}, task="preference_en", debug=False)
    config = finetuned(arg["from"], (arg["task"],), 512, "dpo")  # two answers of 256 tokens each
    config.objective.beta = 0.1

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 3e-4
    config.optimizer.schedule = "linear"
    config.optimizer.weight_decay = 0.0

    config.train.batch_size = 8
    config.train.duration = "5 epochs"
    config.train.eval_every = config.train.checkpoint_every = "20%"

    if arg["debug"]:
        shrink(config)
    return config
