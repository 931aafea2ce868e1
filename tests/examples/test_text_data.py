"""The text: which files, which windows, when it is tokenised again, and what is said when there is none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from text_data import TextDataModule

from lit_zero.core.errors import ConfigError


def prepared(tmp_path: Path, **options: object) -> TextDataModule:
    data = TextDataModule(cache_dir=tmp_path / "cache", **options)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A file of 1,000 bytes in which no 8 bytes occur twice."""
    file = tmp_path / "book.txt"
    file.write_text("".join(f"{number:07d} " for number in range(125)))
    return file


def test_windows_cover_the_text_exactly(tmp_path: Path, book: Path) -> None:
    data = prepared(tmp_path, path=book, block_size=32, val_fraction=0.2)
    text = list(book.read_bytes())
    for windows, part in ((data.train_set, text[:800]), (data.val_set, text[800:])):
        count = (len(part) - 1) // 32
        assert len(windows) == count
        tokens = torch.cat([windows[i][0] for i in range(count)])
        targets = torch.cat([windows[i][1] for i in range(count)])
        assert tokens.tolist() == part[: 32 * count]
        assert targets.tolist() == part[1 : 32 * count + 1]
        assert [int(windows[i][2]) for i in range(count)] == [32] * count
        with pytest.raises(IndexError):
            windows[count]


def test_text_bytes_with_byte_pairs(tmp_path: Path, book: Path) -> None:
    data = prepared(tmp_path, path=book, vocab_size=300, block_size=16, val_fraction=0.2)
    for windows in (data.train_set, data.val_set):
        for index in range(len(windows)):
            _, targets, text_bytes = windows[index]
            assert int(text_bytes) == len(data.decode(targets))
    assert len(data.train_set.text) + len(data.val_set.text) < 600  # tokens, of 1,000 bytes
    assert data.decode(data.encode("0000012 größer")) == "0000012 größer"


@pytest.mark.parametrize("vocab_size", [256, 400])
def test_held_out_text_is_not_trained_on(tmp_path: Path, book: Path, vocab_size: int) -> None:
    data = prepared(tmp_path, path=book, vocab_size=vocab_size, block_size=16, val_fraction=0.25)
    train = data.decode(torch.from_numpy(data.train_set.text.astype("int64")))
    held_out = data.decode(torch.from_numpy(data.val_set.text.astype("int64")))
    assert train + held_out == book.read_text()
    assert len(held_out) == pytest.approx(250, abs=20)


def test_a_folder_is_read_in_an_order_of_its_names_and_only_where_it_is_text(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for number in range(20):
        (folder / "deep" / f"{number}.txt").write_text(f"<{number:02d}>" * 10)
    (folder / "latin").write_bytes(b"gr\xf6\xdfer" * 100)
    (folder / "binary").write_bytes(b"\0\1\2" * 100)
    data = prepared(tmp_path, path=folder, block_size=8, val_fraction=0.1)
    text = data.decode(torch.from_numpy(data.train_set.text.astype("int64")))
    text += data.decode(torch.from_numpy(data.val_set.text.astype("int64")))
    found = [text[start : start + 4] for start in range(0, 800, 40)]
    assert sorted(found) == [f"<{number:02d}>" for number in range(20)]
    assert found != sorted(found)  # neighbours come from everywhere
    assert len(text) == 800
    moved = tmp_path / "moved"
    folder.rename(moved)
    again = prepared(tmp_path, path=moved, block_size=8, val_fraction=0.1)
    assert again.decode(torch.from_numpy(again.train_set.text.astype("int64"))) == text[:720]


def test_tokenised_once_and_again_when_a_source_changes(tmp_path: Path, book: Path) -> None:
    cache = prepared(tmp_path, path=book, block_size=8).cache_file
    os.utime(cache, (1, 1))
    prepared(tmp_path, path=book, block_size=16, val_fraction=0.5)
    assert cache.stat().st_mtime == 1  # neither the length of a sequence nor the split changes the tokens
    book.write_text(book.read_text().replace("0000003", "3000000"))
    os.utime(book, (2, 2))  # the same size: the time of the change must count
    data = prepared(tmp_path, path=book, block_size=8)
    assert data.decode(data.train_set[3][0]) == "3000000 "
    assert data.cache_file != cache
    assert len(list(cache.parent.iterdir())) == 2, "what has become old is removed"


@pytest.mark.parametrize("damage", ["truncated", "no description", "description is garbage"])
def test_a_damaged_cache_is_written_again(tmp_path: Path, book: Path, damage: str) -> None:
    cache = prepared(tmp_path, path=book, block_size=8).cache_file
    [description] = cache.parent.glob("*.json")
    if damage == "truncated":
        cache.write_bytes(cache.read_bytes()[:100])
    elif damage == "no description":
        description.unlink()
    else:
        description.write_text("{")
    prepared(tmp_path, path=book, block_size=8)
    assert cache.read_bytes() == book.read_bytes()
    assert json.loads(description.read_text())["tokens"] == 1000


def test_another_job_that_tokenises_anew_disturbs_nobody(
    tmp_path: Path, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(tmp_path, path=book, block_size=8)
    book.write_text(book.read_text().replace("0000003", "3000000"))
    os.utime(book, (2, 2))
    replace, opened = os.replace, []

    def open_and_replace(source: str, target: str) -> None:
        data = TextDataModule(path=book, block_size=8, cache_dir=tmp_path / "cache")
        data.setup("fit")
        opened.append(data.decode(data.train_set[3][0]))
        replace(source, target)

    monkeypatch.setattr(os, "replace", open_and_replace)
    data = prepared(tmp_path, path=book, block_size=8)
    assert opened == ["0000003 ", "0000003 "], "before the new text, and before its description"
    assert data.decode(data.train_set[3][0]) == "3000000 "


def test_nothing_is_left_when_writing_fails(tmp_path: Path, book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: str, target: str) -> None:
        raise OSError("disk full")

    data = TextDataModule(path=book, cache_dir=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            data.prepare_data()
    assert list((tmp_path / "cache").iterdir()) == []
    data.prepare_data()
    assert data.cache_file.exists()


def test_vocabularies_do_not_share_a_cache(tmp_path: Path, book: Path) -> None:
    files = {
        prepared(tmp_path, path=book, block_size=8, val_fraction=0.1, vocab_size=size).cache_file for size in (256, 300)
    }
    assert len(files) == 2


def test_the_standard_library_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "lib"
    for name in ("os.py", "site-packages/other.py", "json/decoder.py", "notes.txt"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"# {name}\n" * 20)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    data = prepared(tmp_path, block_size=4)
    text = data.cache_file.read_text()
    assert set(text.split()) == {"#", "os.py", "json/decoder.py"}


def test_the_real_standard_library_has_files_of_python_source() -> None:
    files = list(TextDataModule()._files())
    assert len(files) > 200
    assert {"argparse.py", "random.py"} <= {file.name for file in files}
    assert not any("site-packages" in file.parts for file in files)


def test_a_new_order_each_epoch(tmp_path: Path, book: Path) -> None:
    data = prepared(tmp_path, path=book, block_size=8, batch_size=3)
    torch.manual_seed(0)
    loader = data.train_dataloader()
    first, second = ([tuple(row) for batch in loader for row in batch[0].tolist()] for _ in range(2))
    assert sorted(first) == sorted(second)
    assert first != second
    assert len(first) == len(data.train_set) == 123
    data.batch_size = 4
    assert [len(batch[0]) for batch in data.train_dataloader()] == [4] * 30  # the incomplete batch is left out
    assert torch.cat([batch[0] for batch in data.val_dataloader()]).tolist() == [data.val_set[0][0].tolist()]


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        TextDataModule(path=tmp_path / "nothing", cache_dir=tmp_path / "cache")
    assert str(caught.value) == (
        f"data.path={tmp_path / 'nothing'} does not exist. Give a text file or a folder of text files, or leave "
        "data.path empty (null) for the source of the Python standard library."
    )


def test_path_that_has_gone_since(tmp_path: Path, book: Path) -> None:
    data = TextDataModule(path=book, cache_dir=tmp_path / "cache")
    book.unlink()
    with pytest.raises(ConfigError, match=r"data.path=.*book.txt does not exist. Give a text file"):
        data.prepare_data()


@pytest.mark.parametrize(("content", "files"), [(None, 0), (b"", 1), (b"\xff\xfe", 1)])
def test_empty_corpus(tmp_path: Path, content: bytes | None, files: int) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    if content is not None:
        (folder / "file").write_bytes(content)
    data = TextDataModule(path=folder, cache_dir=tmp_path / "cache")
    with pytest.raises(ConfigError) as caught:
        data.prepare_data()
    assert str(caught.value) == (
        f"No text was found in data.path={folder}: {files} files were read and none is UTF-8 text of at least one "
        "byte. Give a text file or a folder of text files with data.path."
    )


def test_setup_before_prepare_data(tmp_path: Path, book: Path) -> None:
    data = TextDataModule(path=book, cache_dir=tmp_path / "cache")
    with pytest.raises(ConfigError) as caught:
        data.setup("fit")
    assert str(caught.value) == (
        f"The tokenised text of {data.cache_file} is missing or damaged. prepare_data() writes it; on several "
        "machines, data.cache_dir must be a folder that each of them can write to."
    )


def test_corpus_shorter_than_one_sequence(tmp_path: Path, book: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        prepared(tmp_path, path=book, block_size=2048, val_fraction=0.01)
    assert str(caught.value) == (
        f"The training part of data.path={book} has 990 tokens, but one sequence needs data.block_size + 1 = 2,049. "
        "Give a longer text with data.path, lower data.block_size=2048, or change data.val_fraction=0.01."
    )
    with pytest.raises(ConfigError, match="The validation part of .* has 10 tokens, .* data.block_size \\+ 1 = 65"):
        prepared(tmp_path, path=book, block_size=64, val_fraction=0.01)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"block_size": 0}, "data.block_size=0 is not possible: expected a whole number of at least 1."),
        ({"batch_size": -1}, "data.batch_size=-1 is not possible: expected a whole number of at least 1."),
        ({"val_fraction": 1.0}, "data.val_fraction=1.0 is not possible: expected a number between 0 and 1."),
        ({"vocab_size": 255}, "data.vocab_size=255 is not possible: expected 256 (one token per byte) to 65,536."),
    ],
)
def test_impossible_options_are_refused(option: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TextDataModule(**option)  # type: ignore[arg-type]
    assert str(caught.value) == words
