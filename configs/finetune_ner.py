"""Named entities in English (CoNLL-2003) or Chinese (People's Daily), with a pretrained encoder.

Question: what entity F1 does a pretrained encoder reach, and the same model from scratch?
Hardware: 2 CPU cores, five minutes.
Expected: experiments/tasks/README.md.

  gpt-jax data fetch conll2003 minilm
  gpt-jax train --config=configs/finetune_ner.py:from=hf:minilm --workdir=runs/ner

Arguments: lang (en, zh), from (a run of pretrain_bert or pretrain_chinese, hf:DIR, hf:minilm),
scratch (the same model, drawn anew), debug.
"""

from configs.common import choose, classifier, is_large, parse_argument, shrink, small_optimizer

# task, row length, classes: O, and B- and I- of each kind
TASKS = {"en": ("ner_en", 64, 9), "zh": ("ner_zh", 128, 7)}


def get_config(argument=None):
    arg = parse_argument(
        argument, **{"lang": "en", "from": "hf:minilm"}, scratch=False, debug=False
    )
    task, seq_len, num_classes = choose("lang", arg["lang"], TASKS)
    large, scratch = is_large(arg["from"]), arg["scratch"]

    config = classifier(arg["from"], task, seq_len, "tokens", num_classes, "entity_f1", scratch)
    config.tasks.eval_examples = 1000

    # From scratch a BERT of six layers learns nothing at 1e-3.
    rate = (3e-4 if scratch else 2e-4) if large else 1e-3
    small_optimizer(config, rate)
    config.train.batch_size = 16
    config.train.duration = "400 steps" if large else "600 steps"

    if arg["debug"]:
        shrink(config)
    return config
