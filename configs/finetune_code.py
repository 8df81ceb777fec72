"""Python: the next line of a fragment, or a function's body from its docstring.

Question: what is pretraining on code worth when the next line is asked for?
Hardware: 2 CPU cores, five minutes.
Expected: experiments/tasks/README.md.

  gpt-jax data fetch sympy_code python_functions
  gpt-jax train --config=configs/finetune_code.py:from=runs/gpt --workdir=runs/code

Arguments: from (a run of pretrain_gpt or quickstart, hf:DIR), task (complete_line,
body_from_docstring), scratch (the same model, drawn anew), debug.
"""

from configs.common import finetuned, parse_argument, shrink, small_optimizer


def get_config(argument=None):
    arg = parse_argument(
        argument, **{"from": "runs/gpt"}, task="complete_line", scratch=False, debug=False
    )
    config = finetuned(arg["from"], (arg["task"],), 256, "causal_lm", arg["scratch"])
    config.tasks.max_new_tokens = 48

    small_optimizer(config, 1e-2, muon=0.02)
    config.train.batch_size = 8
    config.train.duration = "500 steps"
    config.train.sample_prompts = ("def ",)

    if arg["debug"]:
        shrink(config)
    return config
