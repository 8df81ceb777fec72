"""Finetuned, from scratch, and plain baselines: the runs behind README.md.

  python experiments/tasks/study.py run [NAME ...]    trains and scores what is missing
  python experiments/tasks/study.py table             results.json and the tables, from the runs

Runs lie under runs/tasks; what broke is continued, what is done is left alone.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics

from gpt_jax.launch.study import gpt_jax

HERE = pathlib.Path(__file__).parent
ROOT = pathlib.Path("runs/tasks")
SEEDS = (0, 1)


@dataclasses.dataclass(frozen=True)
class Run:
    """One training and what it is scored on.

    Attributes:
      name: Its folder under ROOT.
      config: FILE:args.
      tasks: Scored on the test split.
      seed: Of everything.
      overrides: "a.b=value".
      limit: Test examples that are scored; 0: all.
      needs: Runs that it begins from.
    """

    name: str
    config: str
    tasks: tuple[str, ...] = ()
    seed: int = 0
    overrides: tuple[str, ...] = ()
    limit: int = 0
    needs: tuple[str, ...] = ()


PRETRAINED = (
    Run("gpt", "pretrain_gpt.py"),
    Run("bert", "pretrain_bert.py"),
    Run("chinese", "pretrain_chinese.py"),
    Run("t5", "pretrain_t5.py"),
)


def _pairs(
    name: str, config: str, task: str, limit: int = 0, needs: tuple[str, ...] = (), steps: int = 0
):
    """Finetuned and from scratch, each with all seeds."""
    for seed in SEEDS:
        for kind, argument in (("finetuned", ""), ("scratch", ",scratch")):
            run = f"{name}-{kind}-{seed}"
            more = (f"train.duration={steps}",) if steps else ()
            yield Run(run, config + argument, (task,), seed, more, limit, needs)


def _students(teacher: pathlib.Path):
    """A model a sixth as large, with and without the larger one's outputs to learn from."""
    shape = ("model.num_layers=2", "model.embed_dim=96", "model.num_heads=3", "model.head_dim=32",
             "model.mlp_dim=384", f"data.tokenizer={teacher}", "train.duration=150",
             "train.eval_every=50%")  # fmt: skip
    taught = ("objective.name=distillation", f"objective.teacher={teacher}",
              "objective.temperature=2.0", "objective.teacher_weight=0.7")  # fmt: skip
    for seed in (0, 1, 2):
        for kind, more in (("alone", ()), ("taught", taught)):
            name = f"student-{kind}-{seed}"
            yield Run(name, "pretrain_gpt.py", (), seed, (*shape, *more), needs=("gpt",))


def runs() -> list[Run]:
    """All of them, those that others begin from first."""
    gpt, t5, chinese, bert = (f"from={ROOT / name}" for name in ("gpt", "t5", "chinese", "bert"))
    sentiment, ner = "finetune_sentiment.py", "finetune_ner.py"
    return [
        *PRETRAINED,
        *_pairs("sentiment_zh", f"{sentiment}:lang=zh,{chinese}", "sentiment_zh", 0, ("chinese",)),
        *_pairs("sentiment_en", f"{sentiment}:from=hf:minilm", "sentiment_en"),
        *_pairs("ner_en", f"{ner}:from=hf:minilm", "ner_en"),
        *_pairs(
            "translation-t5", f"finetune_translation.py:{t5}", "translate_en_de", 300, ("t5",)
        ),
        *_pairs("translation-gpt", f"finetune_multitask.py:{gpt},tasks=translate_en_de",
                "translate_en_de", 300, ("gpt",), 300),
        *_pairs("code", f"finetune_code.py:{gpt}", "complete_line", 500, ("gpt",), 300),
        Run("translation-mt-0", "transformer_mt.py", ("translate_en_de",), limit=300),
        Run("sentiment_en-bert-0", f"{sentiment}:{bert}", ("sentiment_en",), needs=("bert",)),
        Run("ner_zh-finetuned-0", f"{ner}:lang=zh,{chinese}", ("ner_zh",), needs=("chinese",)),
        Run("ner_zh-scratch-0", f"{ner}:lang=zh,{chinese},scratch", ("ner_zh",),
            needs=("chinese",)),
        Run("single-sentiment_en-0", f"finetune_multitask.py:{gpt},tasks=sentiment_en",
            ("sentiment_en",), overrides=("train.duration=300",), needs=("gpt",)),
        Run("multitask-0", f"finetune_multitask.py:{gpt}",
            ("sentiment_en", "translate_en_de", "complete_line"), limit=500, needs=("gpt",)),
        # Most answers are longer than the 256 tokens that the model has seen at once.
        Run("dpo-0", f"dpo.py:{gpt}", needs=("gpt",),
            overrides=("data.seq_len=1024", "model.seq_len=512")),
        *_students(ROOT / "gpt"),
        *(Run(name, f"pretrain_gpt.py:objective={name}", overrides=("train.duration=200",))
          for name in ("permutation_lm", "fill_in_the_middle", "prefix_lm")),
        Run("chat-lora-0", "sft_chat.py", overrides=("train.duration=10", "train.eval_every=10",
                                                     "tasks.limit=100")),
    ]  # fmt: skip


def execute(run: Run) -> None:
    """Trains, unless that is done, and scores, unless that is done."""
    workdir = ROOT / run.name
    overrides = (f"seed={run.seed}", "train.tensorboard=false", *run.overrides)
    gpt_jax(
        "train", f"--config=configs/{run.config}", f"--workdir={workdir}",
        *(f"--config.{override}" for override in overrides),
    )  # fmt: skip
    scored = {row["task"] for row in _rows(workdir / "evaluations.jsonl")}
    for task in run.tasks:
        if task not in scored:
            gpt_jax("evaluate", f"--run={workdir}", f"--tasks={task}", f"--limit={run.limit}")


def _rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def collect() -> list[dict]:
    """A row for each run that is there: scores, parameters, tokens, seconds of training."""
    results = []
    for run in runs():
        workdir = ROOT / run.name
        if not (workdir / "receipt.json").exists():
            continue
        receipt = json.loads((workdir / "receipt.json").read_text())
        metrics = _rows(workdir / "metrics.jsonl")
        times = [row["time"] for row in metrics]
        losses = [row["train/loss"] for row in metrics if "train/loss" in row]
        accuracies = [row["train/accuracy"] for row in metrics if "train/accuracy" in row]
        held_out = next((row for row in reversed(metrics) if "eval/tokens" in row), {})
        results.append(
            {
                "run": run.name,
                "config": run.config,
                "seed": run.seed,
                "parameters": receipt["num_parameters"],
                "steps": metrics[-1]["step"],
                "minutes": round((times[-1] - times[0]) / 60, 1),
                "train": {
                    "first_loss": losses[0],
                    "last_loss": losses[-1],
                    "last_accuracy": statistics.mean(accuracies[-3:]),
                },
                "validation": {
                    name.removeprefix("eval/"): value
                    for name, value in held_out.items()
                    if name.startswith("eval/") and isinstance(value, float)
                },
                "test": {
                    row["task"]: {k: v for k, v in row.items() if k not in ("task", "split")}
                    for row in _rows(workdir / "evaluations.jsonl")
                },
            }
        )
    return results


METRICS = {
    "sentiment_en": "accuracy",
    "sentiment_zh": "accuracy",
    "ner_en": "entity_f1",
    "ner_zh": "entity_f1",
    "translate_en_de": "bleu",
    "complete_line": "exact_match",
}


def table(results: list[dict]) -> str:
    """Markdown: for each task the plain methods, then the runs; runs of several seeds
    as their mean, with the widest of their intervals."""
    lines = [
        "| task | what | score | 95 % | by seed | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for task, metric in METRICS.items():
        rows = [
            (f"plain: {row['method']}, {row['num_examples']} rows", [row], None)
            for row in _baselines(task)
        ]
        groups: dict[str, list[dict]] = {}
        for result in results:
            if task in result["test"]:
                groups.setdefault(result["run"].rsplit("-", 1)[0], []).append(result)
        rows += [
            (name, [member["test"][task] for member in members], members)
            for name, members in groups.items()
        ]
        for name, scores, members in rows:
            values = [score[metric] for score in scores]
            digits = 1 if metric == "bleu" else 3
            low = min(score[f"{metric}_low"] for score in scores)
            high = max(score[f"{metric}_high"] for score in scores)
            interval = f"{low:.{digits}f}-{high:.{digits}f}"
            by_seed = ", ".join(f"{v:.{digits}f}" for v in values) if len(values) > 1 else ""
            # The least disturbed of the runs says most about what one costs.
            minutes = min(m["minutes"] for m in members) if members else None
            shown = "" if minutes is None else f"{minutes:.1f}"
            mean = f"{statistics.mean(values):.{digits}f}"
            lines.append(
                f"| {task}, {metric} | {name} | {mean} | {interval} | {by_seed} | {shown} |"
            )
    return "\n".join(lines)


def _baselines(task: str) -> list[dict]:
    path = HERE / "baselines.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    return [row for row in rows if row["task"] == task and row["split"] == "test"]


def objectives(results: list[dict]) -> str:
    """Markdown: training and held-out figures of the runs without a task's score."""
    lines = [
        "| run | steps | first loss | last loss | held out | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        if not result["test"]:
            train = result["train"]
            held_out = ", ".join(f"{k} {v:.3f}" for k, v in result["validation"].items())
            lines.append(
                f"| {result['run']} | {result['steps']} | {train['first_loss']:.3f} | "
                f"{train['last_loss']:.3f} (accuracy {train['last_accuracy']:.3f}) | {held_out} | "
                f"{result['minutes']} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    if arguments.command == "run":
        known = {run.name: run for run in runs()}
        for name in arguments.names or known:
            execute(known[name])
        return
    results = collect()
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    print()
    print(objectives(results))


if __name__ == "__main__":
    main()
