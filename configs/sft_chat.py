"""Chat finetuning with LoRA: loss on the assistant's turns alone.

Question: does a pretrained model learn to answer in its template, with a hundredth of its
parameters?
Hardware: from=gguf:smollm2 (135M) 2 CPU cores, a minute for ten steps; a GPU for a real run.
Expected: experiments/tasks/README.md.

  gpt-jax data fetch alpaca_en smollm2
  gpt-jax train --config=configs/sft_chat.py --workdir=runs/chat

Arguments: from (a model whose tokenizer has its chat template's tokens: gguf:FILE, hf:DIR, a
finetuned run), task (chat_en, chat_zh, chat:FILE.jsonl), full (all parameters instead of
adapters), debug.
"""

from ml_collections import ConfigDict

from configs.common import finetuned, is_large, parse_argument, shrink


def get_config(argument=None):
    arg = parse_argument(
        argument, **{"from": "gguf:smollm2"}, task="chat_en", full=False, debug=False
    )
    seq_len = 512 if is_large(arg["from"]) else 256  # what the small runs' models take
    config = finetuned(arg["from"], (arg["task"],), seq_len, "causal_lm")
    if not arg["full"]:
        config.model.lora_rank = 8
        config.model.lora_alpha = 16.0
        config.model.lora_targets = ("attention/(q|k|v|out)$", "mlp/")
    config.model.remat = "dots"

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 2e-5 if arg["full"] else 2e-4
    config.optimizer.weight_decay = 0.0

    config.train.batch_size = 8
    config.train.num_microbatches = 4
    config.train.duration = "2 epochs"
    config.train.eval_every = config.train.checkpoint_every = "25%"
    config.train.eval_batches = 4
    config.train.log_every = 1

    if arg["debug"]:
        shrink(config)
    return config
