"""A text in another language.

Row:        {"source": "Save the file.", "target": "Speichern Sie die Datei."}
Formatted:  prompt "English: Save the file.\\nGerman:", target " Speichern Sie die Datei.",
            text "Save the file."
Prediction: " Speichern Sie die Datei."
Score:      {"bleu": 100.0, "chrf": 100.0, "bleu_signature": "nrefs:1|case:mixed|...",
            "chrf_signature": ...}
"""

import functools
from collections.abc import Sequence

from gpt_jax.tasks import metrics
from gpt_jax.tasks.contract import Formatted, Scores, Task, text_field
from gpt_jax.tasks.data_spec import DataSpec

_TFDS = "wmt14_translate/de-en:1.0.0"


def format_row(row: dict, *, source: str, target: str) -> Formatted:
    """See the top of the file; `source` and `target` are names of languages."""
    text, answer = (" ".join(text_field(row, field).split()) for field in ("source", "target"))
    return Formatted(f"{source}: {text}\n{target}:", f" {answer}", text=text)


def score(predictions: Sequence[str], formatted: Sequence[Formatted], target: str) -> Scores:
    """BLEU and chrF of sacreBLEU, with its signatures (arXiv:1804.08771)."""
    references = [[r.strip() for r in f.references or (f.target,)] for f in formatted]
    tokenize = "zh" if target == "Chinese" else "13a"
    return metrics.bleu_and_chrf([p.strip() for p in predictions], references, tokenize)


def _task(name: str, data: DataSpec, source: str, target: str) -> Task:
    return Task(
        name=name,
        data=data,
        format=functools.partial(format_row, source=source, target=target),
        score=functools.partial(score, target=target),
        metric="bleu",
        max_tokens=128,
    )


def from_file(name: str, path: str) -> Task:
    """A task of one's own rows, in whatever languages."""
    return _task(name, DataSpec(path), "Text", "Translation")


TASKS = (
    _task("translate_en_de", DataSpec("libreoffice_en_de"), "English", "German"),
    _task("translate_en_zh", DataSpec("libreoffice_en_zh"), "English", "Chinese"),
    _task(
        "wmt14_en_de", DataSpec(_TFDS, fields={"source": "en", "target": "de"}), "English", "German"
    ),
    _task(
        "wmt14_de_en", DataSpec(_TFDS, fields={"source": "de", "target": "en"}), "German", "English"
    ),
)
