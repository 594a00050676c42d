"""Files that are whole or not there."""

import json
import os
import re

import numpy as np
import pytest

from dynamics.store import disk
from dynamics.store.disk import encoded_json, parsed_json, read_file, read_json_file, write_file
from dynamics.text import encodable


def test_a_file_is_written_with_one_sync_and_nothing_is_left_beside_it(tmp_path, monkeypatch):
    syncs, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (syncs.append(descriptor), sync(descriptor)))
    write_file(tmp_path / "a", b"old")
    write_file(tmp_path / "a", b"new")
    assert len(syncs) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert read_file(tmp_path / "a") == b"new"


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "a").symlink_to("target")
    write_file(tmp_path / "a", b"new")
    assert (tmp_path / "target").read_bytes() == b"precious"
    assert not (tmp_path / "a").is_symlink()


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_file(tmp_path / "a", b"old")
    with pytest.raises(TypeError):
        write_file(tmp_path / "a", None)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert read_file(tmp_path / "a") == b"old"


def test_a_link_is_not_read(tmp_path):
    (tmp_path / "target").write_bytes(b"{}")
    (tmp_path / "a").symlink_to("target")
    with pytest.raises(ValueError, match="'a' is a link, which is not followed"):
        read_file(tmp_path / "a")


@pytest.mark.parametrize(("content", "reason"), [("[]", "is not a JSON object"), ("{", "is not valid JSON")])
def test_what_is_no_object(tmp_path, content, reason):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path.name}/a.json' {reason}")):
        read_json_file(tmp_path / "a.json")


@pytest.mark.parametrize(
    "content",
    [
        {"plain": [1, 2.5, None, True, (1, "two")], "ä": {"nested": "∑"}},
        {1: "a key that is no text", None: 0},
        {"half of a pair": "caf\udce9", "whole": "\U0001f600"},
        {"arrays": np.arange(3.0), "of numpy": np.float64(0.1), "NaN within": [np.array([np.nan, 1.0])]},
    ],
)
def test_json_is_the_same_whether_or_not_it_is_looked_through(content):
    looked_through = json.dumps(disk._finite(encodable(content)), allow_nan=False)
    assert encoded_json(content) == looked_through


def test_numbers_that_are_not_finite_are_unknown():
    assert parsed_json('{"a": NaN, "b": [1e999, 2.5], "c": "\\ud800"}', "x") == {
        "a": None,
        "b": [None, 2.5],
        "c": "\\ud800",
    }
    assert encoded_json({"a": float("inf"), "b": (1, 2)}) == '{"a": null, "b": [1, 2]}'
