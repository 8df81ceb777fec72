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

from configs.common import choose, classifier, is_large, parse_argument, shrink, small_optimizer

# task, row length
TASKS = {"en": ("sentiment_en", 64), "zh": ("sentiment_zh", 96)}


def get_config(argument=None):
    arg = parse_argument(
        argument, **{"lang": "en", "from": "hf:minilm"}, scratch=False, debug=False
    )
    task, seq_len = choose("lang", arg["lang"], TASKS)
    large, scratch = is_large(arg["from"]), arg["scratch"]

    config = classifier(arg["from"], task, seq_len, "sequence", 2, "accuracy", scratch)
    config.model.pool = "mean"
    config.tasks.eval_examples = 0

    # From scratch a BERT of six layers learns nothing at 1e-3.
    rate = (3e-4 if scratch else 1e-4) if large else 1e-3
    small_optimizer(config, rate)
    config.train.batch_size = 32
    config.train.duration = "2 epochs" if large else "3 epochs"

    if arg["debug"]:
        shrink(config)
    return config
