"""Sentiment of reviews in English or Chinese, with a pretrained encoder.

Question: how much better is a pretrained encoder than the same model from scratch, and than TF-IDF
with logistic regression?
Hardware: 2 CPU cores, five minutes.
Expected: experiments/tasks/README.md.

  gpt-jax data fetch vader_movie minilm
  gpt-jax train --config=configs/finetune_sentiment.py:from=hf:minilm --workdir=runs/sentiment

Arguments: lang (en, zh), from (a run of pretrain_bert or pretrain_chinese, hf:DIR, hf:minilm),
scratch (the same model, drawn anew), debug.
"""

from ml_collections import ConfigDict

from configs.common import choose, finetuned, parse_argument, shrink, small_optimizer

TASKS = {"en": "sentiment_en", "zh": "sentiment_zh"}


def get_config(argument=None):
    arg = parse_argument(
        argument, **{"lang": "en", "from": "hf:minilm"}, scratch=False, debug=False
    )
    task = choose("lang", arg["lang"], TASKS)
    large = arg["from"].startswith("hf:")
    config = ConfigDict()
    config.seed = 0

    config.init, config.data = finetuned(arg["from"], arg["scratch"])
    if not arg["scratch"]:
        # The source's own heads go, the classifier is new.
        config.init.skip = ("^pooler/" if large else "^mlm/", "^classifier/")
    config.data.seq_len = 64 if arg["lang"] == "en" else 96

    config.model = ConfigDict()
    config.model.head = "sequence"
    config.model.num_classes = 2
    config.model.pool = "mean"
    config.model.dropout = 0.1
    config.model.dtype = "bfloat16"

    config.tasks = ConfigDict()
    config.tasks.names = (task,)
    config.tasks.eval_examples = 0

    config.objective = ConfigDict()
    config.objective.name = "labels"

    small_optimizer(config, 1e-4 if large and not arg["scratch"] else 1e-3)

    config.train = ConfigDict()
    config.train.batch_size = 32
    config.train.duration = "2 epochs" if large else "5 epochs"
    config.train.eval_every = config.train.checkpoint_every = "25%"
    config.train.keep_best = 1
    config.train.metric = f"{task}/accuracy"

    if arg["debug"]:
        shrink(config)
    return config
