"""Named entities in English (CoNLL-2003) or Chinese (People's Daily), with a pretrained encoder.

Question: what entity F1 does a pretrained encoder reach, and the same model from scratch?
Hardware: 2 CPU cores, five minutes.
Expected: experiments/tasks/README.md.

  gpt-jax data fetch conll2003 minilm
  gpt-jax train --config=configs/finetune_ner.py:from=hf:minilm --workdir=runs/ner

Arguments: lang (en, zh), from (a run of pretrain_bert or pretrain_chinese, hf:DIR, hf:minilm),
scratch (the same model, drawn anew), debug.
"""

from ml_collections import ConfigDict

from configs.common import choose, finetuned, parse_argument, shrink, small_optimizer

# task, classes (O, and B- and I- of each kind)
TASKS = {"en": ("ner_en", 9), "zh": ("ner_zh", 7)}


def get_config(argument=None):
    arg = parse_argument(
        argument, **{"lang": "en", "from": "hf:minilm"}, scratch=False, debug=False
    )
    task, classes = choose("lang", arg["lang"], TASKS)
    large = arg["from"].startswith("hf:")
    config = ConfigDict()
    config.seed = 0

    config.init, config.data = finetuned(arg["from"], arg["scratch"])
    if not arg["scratch"]:
        config.init.skip = ("^pooler/" if large else "^mlm/", "^classifier/")
    config.data.seq_len = 64 if arg["lang"] == "en" else 128

    config.model = ConfigDict()
    config.model.head = "tokens"
    config.model.num_classes = classes
    config.model.dropout = 0.1
    config.model.dtype = "bfloat16"

    config.tasks = ConfigDict()
    config.tasks.names = (task,)
    config.tasks.eval_examples = 1000

    config.objective = ConfigDict()
    config.objective.name = "labels"

    small_optimizer(config, 2e-4 if large and not arg["scratch"] else 1e-3)

    config.train = ConfigDict()
    config.train.batch_size = 16
    config.train.duration = "400 steps" if large else "600 steps"
    config.train.eval_every = config.train.checkpoint_every = "25%"
    config.train.keep_best = 1
    config.train.metric = f"{task}/entity_f1"

    if arg["debug"]:
        shrink(config)
    return config
