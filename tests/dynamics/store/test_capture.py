"""Records of the first format come from strangers: a damaged one costs only itself, and nothing of it is executed."""

import json
import os
import re
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamics.store.capture import capture_attributes, capture_steps, is_capture
from tests.records import records_of

BAD = "step-000000000002"


@pytest.fixture
def path(first_edition, tmp_path):
    """A copy of the records of the steps 1, 2 and 4; that of step 2 will be damaged."""
    return shutil.copytree(first_edition / "dynamics" / "capture.zarr", tmp_path / "run" / "dynamics" / "capture.zarr")


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def make_link(path):
    """The same content elsewhere, behind a link."""
    target = path.parents[len(path.parts) - path.parts.index("run") - 1] / "outside"
    shutil.move(path, target)
    path.symlink_to(target)


DAMAGES = {
    "no group": ("", lambda path: shutil.rmtree(path) or path.mkdir(), f"'{BAD}/.zgroup' is missing"),
    "a file": ("", lambda path: shutil.rmtree(path) or path.touch(), "Not a directory"),
    "a link": ("", lambda path: make_link(path / ""), "it is a link"),
    "a linked group": ("update", lambda path: make_link(path), "'update' is a link"),
    "a linked array": ("update/from_step", make_link, "'from_step' is a link"),
    "a linked file": ("update/from_step/0", make_link, "'0' is a link, which is not followed"),
    "no numbers": ("update/from_step/0", lambda path: path.unlink(), "'from_step/0' is missing"),
    "too few": ("update/from_step/0", lambda path: path.write_bytes(b"1234"), "'from_step' has 4 bytes of 8"),
    "too many": (
        "update/from_step/0",
        lambda path: path.write_bytes(b"1" * 17),
        "is not a regular file of at most 8 bytes",
    ),
    "a named pipe": ("update/from_step/0", lambda path: path.unlink() or os.mkfifo(path), "is not a regular file"),
    "a folder": ("update/from_step/0", lambda path: path.unlink() or path.mkdir(), "is not a regular file"),
    "objects": ("update/from_step/.zarray", lambda path: change(path, dtype="|O"), "'from_step' has the type '|O'"),
    "structures": (
        "update/from_step/.zarray",
        lambda path: change(path, dtype=[["a", "<f8"]]),
        "not numbers, booleans or text",
    ),
    "half a type": (
        "update/from_step/.zarray",
        lambda path: change(path, dtype="<f3"),
        "not numbers, booleans or text",
    ),
    "no letters": ("update/from_step/.zarray", lambda path: change(path, dtype="<U0"), "not numbers, booleans or text"),
    "a pickle": (
        "update/from_step/.zarray",
        lambda path: change(path, filters=[{"id": "pickle"}]),
        "is compressed or in",
    ),
    "compressed": (
        "update/from_step/.zarray",
        lambda path: change(path, compressor={"id": "zlib"}),
        "is compressed or in",
    ),
    "two chunks": ("update/from_step/.zarray", lambda path: change(path, chunks=[2]), "is compressed or in several"),
    "a huge shape": (
        "update/from_step/.zarray",
        lambda path: change(path, shape=[2**47], chunks=[2**47]),
        "'from_step' has 8 bytes of",
    ),
    "a huge empty shape": (
        "update/from_step/.zarray",
        lambda path: change(path, shape=[10**30]),
        "'from_step' has no shape",
    ),
    "a negative shape": ("update/from_step/.zarray", lambda path: change(path, shape=[-1]), "'from_step' has no shape"),
    "no JSON": ("update/from_step/.zarray", lambda path: path.write_text("{"), "'from_step/.zarray' is not valid JSON"),
    "a list": (
        "update/from_step/.zarray",
        lambda path: path.write_text("[]"),
        "'from_step/.zarray' is not a JSON object",
    ),
    "deep JSON": ("update/.zattrs", lambda path: path.write_text('{"a":' * 9**5), "'update/.zattrs' is not valid JSON"),
    "long JSON": (
        "update/.zattrs",
        lambda path: path.write_bytes(b" " * 2**25),
        "is not a regular file of at most 16777216",
    ),
    "no UTF-8": ("update/.zattrs", lambda path: path.write_bytes(b'{"\xff": 1}'), "'update/.zattrs' is not valid JSON"),
    "no names": (
        "update/from_step/.zattrs",
        lambda path: path.write_text("{}"),
        "has 1 dimensions, and not as many names",
    ),
    "one name twice": (
        "update/from_step/.zattrs",
        lambda path: change(path, _ARRAY_DIMENSIONS=["step", "step"]),
        "has 1 dimensions, and not as many names",
    ),
    "other lengths": (
        "update/from_step/.zattrs",
        lambda path: change(path, _ARRAY_DIMENSIONS=["matrix"]),
        "conflicting sizes",
    ),
    "no character": (
        "update/matrix/0",
        lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
        "'matrix' holds numbers that are no characters",
    ),
    "another step": (
        "update/step/0",
        lambda path: path.write_bytes((99).to_bytes(8, "little")),
        "'update' is of the steps [99], expected step 2 alone",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_record_costs_only_itself(path, damage):
    where, make, reason = DAMAGES[damage]
    make(path / BAD / where)
    found = records_of(path)
    assert (list(found.records), list(found.broken)) == ([1, 4], [2])
    assert reason in found.broken[2]
    assert "\n" not in found.broken[2]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_byte_can_stop_the_reading(data, path):
    file = data.draw(st.sampled_from(sorted(file for file in (path / BAD).rglob("*") if file.is_file())))
    content = file.read_bytes()
    place, byte = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 255))
    file.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
    try:
        found = records_of(path)
    finally:
        file.write_bytes(content)
    assert 1 in found.records
    assert (2 in found.records) != (2 in found.broken)


def test_any_json_may_be_an_attribute(path):
    content = '{"kind": "optimization-dynamics capture", "format": 1, "a": NaN, "b": [{"c": "\\ud800"}], "d": 1e999}'
    (path / ".zattrs").write_text(content)
    attributes = capture_attributes(path)
    assert attributes["a"] is None
    assert attributes["b"] == [{"c": "\\ud800"}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        ("{}", "the kind in its .zattrs is 'None', not 'optimization-dynamics capture'"),
        ('{"kind": 7}', "the kind in its .zattrs is '7', not"),
        ('{"kind": "optimization-dynamics capture", "format": 3}', "its format is 3, not 1"),
        ("[]", "'capture.zarr/.zattrs' is not a JSON object"),
        ("{", "'capture.zarr/.zattrs' is not valid JSON"),
    ],
)
def test_attributes_that_are_none(path, content, reason):
    (path / ".zattrs").unlink() if content is None else (path / ".zattrs").write_text(content)
    message = f"Expected records of the first format in '{path}', but cannot read them ({reason}"
    with pytest.raises(ValueError, match=re.escape(message) + r".*Restore its \.zattrs from a copy, or move it away"):
        records_of(path)
    assert is_capture(path)  # it has records: they are not passed over in silence


def test_what_is_not_a_record_is_passed_over(path):
    for name in ("step-50", "step-0000000000500", "notes", ".partial-host-1-ab", "step-00000000005x"):
        shutil.copytree(path / "step-000000000001", path / name)
    assert capture_steps(path) == [1, 2, 4]
    assert list(records_of(path).records) == [1, 2, 4]
