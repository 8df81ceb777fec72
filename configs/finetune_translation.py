"""Translation, from a pretrained encoder-decoder or decoder.

Question: what is pretraining on text worth for translation, and does an encoder help?
Hardware: 2 CPU cores, five minutes.
Expected: experiments/tasks/README.md.

  gpt-jax data fetch libreoffice_en_de
  gpt-jax train --config=configs/finetune_translation.py:from=runs/t5 --workdir=runs/translation

Arguments: from (a run of pretrain_t5 or pretrain_gpt, hf:DIR), task (translate_en_de,
translate_en_zh), scratch (the same model, drawn anew), debug.
"""

from configs.common import finetuned, parse_argument, shrink, small_optimizer


def get_config(argument=None):
    arg = parse_argument(
        argument, **{"from": "runs/t5"}, task="translate_en_de", scratch=False, debug=False
    )
    config = finetuned(arg["from"], (arg["task"],), 128, "seq2seq", arg["scratch"])
    config.tasks.max_new_tokens = 96
    config.objective.label_smoothing = 0.1

    small_optimizer(config, 1e-2, muon=0.02)
    config.train.batch_size = 16
    config.train.duration = "600 steps"

    if arg["debug"]:
        shrink(config)
    return config
