"""Rows from files of JSON and parquet, folders of them, and data sets of the hub."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from training_support import rows, write_rows

from reft_kernels.training.data import Example, read_examples
from reft_kernels.training.sources import SkippedRows, find_files, is_hub_name, read_rows


def write(path: Path, made: list[Any]) -> Path:
    """The rows in the kind of file that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(made), path)
        return path
    if ".jsonl" in path.name:
        return write_rows(path, made)
    text = json.dumps(made, indent=1).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows_in_order(tmp_path: Path, name: str) -> None:
    made = rows(2100)
    path = write(tmp_path / name, made)
    assert [row.fields for row in read_rows(path)] == made
    assert read_examples(path, max_examples=5) == [Example(**row) for row in made[:5]]
    where = "line" if "jsonl" in name else "row"
    assert [row.where for row in read_rows(path, max_examples=2)] == [f"{path}, {where} 1", f"{path}, {where} 2"]


def test_a_json_file_of_lines_is_read_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("".join(f"\n{json.dumps(row)}\n" for row in rows(3)), encoding="utf-8")
    assert [row.fields for row in read_rows(path)] == rows(3)
    assert [row.where for row in read_rows(path)][-1] == f"{path}, line 6"


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    made = rows(9)
    write(tmp_path / "part-2.parquet", made[6:])
    write(tmp_path / "part-0.jsonl.gz", made[:3])
    write(tmp_path / "part-1.json", made[3:6])
    (tmp_path / "README.md").write_text("no data", encoding="utf-8")
    assert [row.fields for row in read_rows(tmp_path)] == made


def test_a_folder_with_splits_gives_the_one_asked_for(tmp_path: Path) -> None:
    made = rows(8)
    write(tmp_path / "boolq_train-00000.jsonl", made[:2])
    write(tmp_path / "boolq_train-00001.jsonl", made[2:4])
    write(tmp_path / "dev.json", made[4:5])
    write(tmp_path / "test" / "0000.parquet", made[5:7])
    write(tmp_path / "notes.jsonl", made[7:])
    for split, expected in ((None, made[:4]), ("train", made[:4]), ("validation", made[4:5]), ("test", made[5:7])):
        assert [row.fields for row in read_rows(tmp_path, split=split)] == expected
    (tmp_path / "dev.json").unlink()
    with pytest.raises(FileNotFoundError, match="no files of the split 'validation'; there are test, train"):
        find_files(tmp_path, "validation")


def test_fields_are_renamed_and_a_missing_one_is_named(tmp_path: Path) -> None:
    made = [{"question": "1+1?", "answer": "two", "output": "old"}, {"answer": "two"}]
    path = write(tmp_path / "a.json", made)
    fields = {"question": "instruction", "answer": "output"}
    (first,) = read_rows(path, fields=fields, max_examples=1)
    assert first.fields == {"instruction": "1+1?", "output": "two"}
    with pytest.raises(ValueError, match=r"a.json, row 2: field 'question' is missing \(fields there: 'answer'\)"):
        list(read_rows(path, fields=fields))


def test_broken_arrays_folders_and_parquet_files_are_named(tmp_path: Path) -> None:
    array = tmp_path / "a.json"
    array.write_text('[{"instruction": "a"},\n {"instruction" "b"}]', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.json, line 2: not valid JSON, Expecting ':' delimiter \(column 17\)"):
        list(read_rows(array))
    array.write_text('[{"instruction": "a", "output": "b"}, 3]', encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.json, row 2: expected a JSON object with named fields, got int"):
        list(read_rows(array))
    array.write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a.json holds no rows$"):
        list(read_rows(array))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: the folder holds no data files"):
        list(read_rows(tmp_path / "empty"))
    packed = write(tmp_path / "b.json.gz", rows(200))
    packed.write_bytes(packed.read_bytes()[:150])
    with pytest.raises(ValueError, match=r"b.json.gz: damaged gzip data"):
        list(read_rows(packed))
    columns = write(tmp_path / "c.parquet", rows(200))
    columns.write_bytes(columns.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"c.parquet: damaged parquet data"):
        list(read_rows(columns))
    with pytest.raises(ValueError, match="max_examples must be at least 1, got 0"):
        list(read_rows(array, max_examples=0))


def test_bad_rows_are_skipped_and_counted_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row) for row in rows(4)]
    lines[1:1] = ['{"instruction": ', '{"output": "a"}', "3", *['{"instruction": "a", "output": 1}'] * 4]
    path.write_text("\n".join(lines), encoding="utf-8")
    skipped = SkippedRows()
    assert read_examples(path, skipped=skipped) == [Example(**row) for row in rows(4)]
    assert skipped.count == 7
    assert len(skipped.reasons) == 5
    assert skipped.reasons[0].startswith(f"{path}, line 2: not valid JSON")
    assert skipped.reasons[1].startswith(f"{path}, line 3: field 'instruction' is missing")
    assert str(skipped).startswith("7 rows skipped: ")
    assert str(skipped).endswith("; and 2 more")
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        read_examples(path)
    path.write_text("3\n4\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds no rows that can be used: 2 rows skipped: .*line 1: expected"):
        read_examples(path, skipped=SkippedRows())


@pytest.mark.parametrize("name", ["marked.jsonl", "marked.json"])
def test_files_of_windows_editors_are_read(tmp_path: Path, name: str) -> None:
    lines = b"\r\n".join(json.dumps(row).encode() for row in rows(3))
    text = lines if name.endswith("l") else json.dumps(rows(3), indent=1).replace("\n", "\r\n").encode()
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text)
    assert [example.answer for example in read_examples(tmp_path / name)] == [row["answer"] for row in rows(3)]


def test_rows_that_no_tokenizer_or_parser_takes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a\\ud800", "output": "b"}\n' + "[" * 100_000 + "\n" + json.dumps(rows(1)[0]))
    skipped = SkippedRows()
    assert len(read_examples(path, skipped=skipped)) == 1
    assert skipped.reasons[0].endswith("line 1: field 'instruction' holds half a character ('\\ud800' at 1)")
    assert skipped.reasons[1].endswith("line 2: brackets inside brackets, too deep to be read")
    (tmp_path / "rows.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"rows\.json: brackets inside brackets"):
        read_examples(tmp_path / "rows.json")


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(rows(1)[0]) + "\nbroken\n", encoding="utf-8")
    reading = read_rows(path)
    assert next(reading).fields == rows(1)[0]
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        next(reading)


def test_data_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[Any] = []

    def load(*arguments: Any, **keywords: Any) -> Any:
        calls.append((arguments, keywords))
        return datasets.Dataset.from_list(rows(3))

    monkeypatch.setattr(datasets, "load_dataset", load)
    read = list(read_rows("nobody/nothing:main", split="test", streaming=True))
    assert [row.fields for row in read] == rows(3)
    assert read[2].where == "nobody/nothing:main, test, row 3"
    assert calls == [(("nobody/nothing", "main"), {"split": "test", "streaming": True})]

    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match=r"nobody/nothing: no file here, and not to be had .* \(no network\)"):
        list(read_rows("nobody/nothing"))


def test_what_can_be_a_name_on_the_hub(tmp_path: Path) -> None:
    assert is_hub_name("owner/name")
    assert is_hub_name("owner/name:part")
    for path in ("a/b/c", "./a", "~/a", "a.jsonl", "a.parquet", str(tmp_path)):
        assert not is_hub_name(path)
    with pytest.raises(FileNotFoundError, match=r"no such data file: a.parquet"):
        list(read_rows("a.parquet"))
