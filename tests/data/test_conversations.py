"""Conversations are read as they stand; whatever a file holds, the worst that comes is one clear error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ercsvd_deploy.data.conversations import (
    Conversation,
    Turn,
    open_images,
    read_conversations,
    read_hub_conversations,
    read_image_folder,
)
from ercsvd_deploy.data.images import DamagedImageError
from ercsvd_deploy.data.texts import CalibrationError

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
ASKED = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWERED = {"from": "gpt", "value": "a star"}


def encoded(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def plain(color: str = "red", size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.new("RGB", size, color)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the pictures a.png (red), b.png (blue) and sub/c.png (green)."""
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for name, color in (("a.png", "red"), ("b.png", "blue"), ("sub/c.png", "green")):
        plain(color).save(tmp_path / "data" / name)
    return tmp_path / "data"


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_one(folder: Path, record: object, **options: Any) -> Conversation:
    (conversation,) = read_conversations(write_lines(folder / "records.jsonl", record), **options)
    return conversation


def colors(conversation: Conversation) -> list[object]:
    return [image.getpixel((0, 0)) for image in open_images(conversation)]


# ---- records


def test_the_embedded_pictures_are_read_word_for_word() -> None:
    found = read_conversations(PICTURES / "calibration.jsonl")
    records = [json.loads(line) for line in (PICTURES / "calibration.jsonl").read_text().splitlines()]
    assert (len(found), found.without_image) == (len(records), 0)
    for number, (conversation, record) in enumerate(zip(found, records, strict=True), start=1):
        assert conversation.where == f"{PICTURES / 'calibration.jsonl'}:{number}"
        assert [turn.role for turn in conversation.turns] == ["user", "assistant"] * 6
        said = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
        assert [turn.text for turn in conversation.turns] == said
        assert [turn.num_images for turn in conversation.turns] == [1] + [0] * 11
    (image,) = open_images(found[0])
    with Image.open(PICTURES / records[0]["image"]) as expected:
        assert image.tobytes() == expected.convert("RGB").tobytes()


@pytest.mark.parametrize("value", ["<image>\nWhat?", "What?\n<image>", "<image>What?", "What? <image>\n"])
def test_the_placeholder_and_the_space_around_it_are_taken_out(folder: Path, value: str) -> None:
    record = {"image": "a.png", "conversations": [{"from": "human", "value": value}, ANSWERED]}
    conversation = read_one(folder, record)
    assert conversation.turns == (Turn("user", "What?", 1), Turn("assistant", "a star"))
    assert colors(conversation) == [(255, 0, 0)]


def openai(content: object) -> list[object]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "a star"}]


WHAT = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    "record",
    [
        {"image": "a.png", "messages": openai("<image>\nWhat?")},
        {"image": ["a.png"], "messages": openai("<image>\nWhat?")},
        {"image": "a.png", "messages": openai([{"type": "image"}, WHAT])},
        {"messages": openai([{"type": "image", "image": "a.png"}, WHAT])},
        {"messages": openai([{"type": "image", "path": "a.png"}, WHAT])},
        {"messages": openai([WHAT, {"type": "image_url", "image_url": {"url": "a.png"}}])},
        {"image": None, "messages": openai([{"type": "image_url", "image_url": "a.png"}, WHAT])},
        {"image": "a.png", "question": "What?", "answer": "a star"},
        {"image": "a.png", "question": "What? <image>", "answer": "a star"},
    ],
    ids=str,
)
def test_every_way_to_say_the_same(folder: Path, record: object) -> None:
    conversation = read_one(folder, record)
    assert conversation.turns == (Turn("user", "What?", 1), Turn("assistant", "a star"))
    assert colors(conversation) == [(255, 0, 0)]


def test_several_images_keep_their_order_and_turns(folder: Path) -> None:
    record = {
        "image": ["a.png", "sub/c.png"],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "image", "image": "b.png"}, WHAT, WHAT]},
            {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
            {"role": "user", "content": "<image>\nAnd this?"},
        ],
    }
    conversation = read_one(folder, record)
    assert conversation.turns == (
        Turn("system", "Be brief."),
        Turn("user", "What?\nWhat?", 2),
        Turn("assistant", "Two."),
        Turn("user", "And this?", 1),
    )
    assert colors(conversation) == [(255, 0, 0), (0, 0, 255), (0, 128, 0)]


def test_places_without_a_name_take_the_records_images_in_order(folder: Path) -> None:
    named = {"type": "image", "image": "b.png"}
    for content, expected in (
        ([named, WHAT, {"type": "text", "text": "<image>"}], "ba"),
        ([WHAT, named], "b"),
    ):
        record = {"image": "a.png" if "a" in expected else [], "messages": openai(content)}
        known = {"a": (255, 0, 0), "b": (0, 0, 255)}
        assert colors(read_one(folder, record)) == [known[name] for name in expected]


def test_fields_and_folder_can_be_named(folder: Path, tmp_path: Path) -> None:
    record = {"file": "c.png", "turns": [ASKED, ANSWERED], "conversations": "something else"}
    path = write_lines(tmp_path / "elsewhere.jsonl", record)
    (conversation,) = read_conversations(
        path, image_root=folder / "sub", image_field="file", conversation_field="turns"
    )
    assert colors(conversation) == [(0, 128, 0)]


def test_an_array_reads_as_lines_do(folder: Path) -> None:
    records = [{"image": name, "conversations": [ASKED, ANSWERED]} for name in ("a.png", "b.png")]
    lines = read_conversations(write_lines(folder / "lines.jsonl", *records))
    array = folder / "array.json"
    for text in (json.dumps(records), "\ufeff \n" + json.dumps(records, indent=2) + "\n"):
        array.write_text(text, encoding="utf-8")
        found = read_conversations(array)
        assert [each.turns for each in found] == [each.turns for each in lines]
        assert [each.where for each in found] == [f"{array}[0]", f"{array}[1]"]
        assert [colors(each) for each in found] == [[(255, 0, 0)], [(0, 0, 255)]]


def test_records_without_an_image_are_counted(folder: Path) -> None:
    path = folder / "mixed.jsonl"
    # LLaVA's own mixture has such records; some begin with the assistant, and some talk about HTML.
    text_only = {"id": 1, "conversations": [ANSWERED, {"from": "human", "value": "an <image> tag"}]}
    shown = {"image": "a.png", "conversations": [ASKED, ANSWERED]}
    path.write_text("\n".join(["", json.dumps(text_only), "  ", json.dumps(shown), json.dumps(text_only)]))
    found = read_conversations(path)
    assert (len(found), found.without_image) == (1, 2)
    assert found[0].where == f"{path}:4"
    with pytest.raises(CalibrationError, match=r"text\.jsonl: no record with an image in 'image'.*id, conv"):
        read_conversations(write_lines(folder / "text.jsonl", text_only))


def turned(*turns: Mapping[str, object]) -> dict[str, object]:
    return {"image": "a.png", "conversations": list(turns)}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (turned(ASKED | {"value": "What?"}, ANSWERED), r"0 places for images .* but 1 images"),
        (turned(ASKED | {"value": "<image><image>?"}, ANSWERED), r"2 places .* but 1 images"),
        (turned(ASKED, ANSWERED, ASKED, ANSWERED), r"2 places .* but 1 images"),
        (turned(ASKED, ANSWERED | {"value": "<image>"}), "turn 2: an image in a turn of the assistant"),
        (turned({"from": "system", "value": "<image>"}, ASKED), "turn 1: an image in a turn of the system"),
        (turned(ANSWERED, ASKED), "turn 1 is the assistant's; user and assistant have to take turns"),
        (turned(ASKED, ASKED, ANSWERED), "turn 2 is the user's"),
        (turned(ASKED, ANSWERED, ANSWERED), "turn 3 is the assistant's"),
        (turned(ASKED, {"from": "system", "value": "x"}), "turn 2 is the system's"),
        (turned({"from": "system", "value": "x"}, ANSWERED), "turn 2 is the assistant's"),
        (turned({"from": "system", "value": "x"}), "no turn of the user"),
        (turned(), "no turn of the user"),
        (turned({"from": "narrator", "value": "x"}), "turn 1: speaker 'narrator'; known are system, human"),
        (turned({"from": ["human"], "value": "x"}), r"turn 1: speaker \['human'\]"),
        (turned({"from": "human", "value": 3}), "turn 1: has to be text, is 3"),
        (turned({"from": "human", "value": [WHAT]}), "turn 1: has to be text, is a list"),
        (turned({"role": "user", "content": None}), "turn 1: has to be text or parts, is nothing"),
        (turned({"role": "user", "content": [{"type": "audio"}]}), "a part has to be .* an object with type"),
        (turned({"role": "user", "content": [{"type": "text"}]}), "a part has to be a text"),
        (turned(ASKED | {"value": "\ud800 <image>"}), "half a character"),
        ({"image": "a.png", "conversations": ["x"]}, "turn 1: not an object"),
        (
            {"image": "a.png", "conversations": "x"},
            "no list of turns in 'conversations' or 'messages'; it has",
        ),
        ({"image": "a.png", "question": "x"}, "no list of turns .* it has: image, question"),
        ({"image": 7, "conversations": [ASKED]}, "'image' has to be the path of an image, it is 7"),
        ({"image": {"a": 1}, "conversations": [ASKED]}, "the path of an image, it is an object with a"),
        ({"image": "data:image/png;base64,AAAA", "conversations": [ASKED]}, "addresses are not fetched"),
        ({"image": "http://x/a.png", "conversations": [ASKED]}, "addresses are not fetched"),
        ({"image": "a\0.png", "conversations": [ASKED]}, r"image 'a\\x00\.png' is not the path"),
        ({"image": "\udfff.png", "conversations": [ASKED]}, "half a character"),
        ([], "not a record .* but a list"),
        ("a.png", "not a record .* but 'a.png'"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(folder: Path, record: object, message: str) -> None:
    path = write_lines(folder / "r.jsonl", turned(ASKED, ANSWERED), record)
    with pytest.raises(CalibrationError, match=message) as raised:
        read_conversations(path)
    assert str(raised.value).startswith(f"{path}:2: ")
    (folder / "r.json").write_text(json.dumps([turned(ASKED), record]))
    with pytest.raises(CalibrationError, match=message) as raised:
        read_conversations(folder / "r.json")
    assert str(raised.value).startswith(f"{folder / 'r.json'}[1]: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": ', r":1: not JSON"),
        ("{}\n" + "[" * 100_000, r":1: no list of turns"),
        ('{"image": ' + "[" * 100_000, r":1: not JSON"),
        ('{"image": ' + "9" * 5000 + "}", r":1: not JSON"),
        ("[", r"\[0\]: not JSON"),
        ("[{]", r"\[0\]: not JSON"),
        ('[{"conversations": []} 2]', "after element .0. neither a comma"),
        ('[{"conversations": []},', r"\[1\]: not JSON"),
        ('[{"conversations": []}] x', "after element .0. neither a comma"),
        ("[" * 100_000, r"\[0\]: not JSON"),
        ("[]", "no record with an image"),
        (" [ ] ", "no record with an image"),
        ("", "no record with an image"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CalibrationError, match=message):
        read_conversations(tmp_path / "x.json")


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"image": "\xe9"}')
    for path in (tmp_path / "latin.jsonl", tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(CalibrationError, match="cannot be read as UTF-8"):
            read_conversations(path)
    with pytest.raises(CalibrationError, match=r"nowhere: no such folder; it should have the images"):
        read_conversations(tmp_path / "latin.jsonl", image_root=tmp_path / "nowhere")


# ---- paths


@pytest.mark.parametrize("name", ["../secret.png", "sub/../../secret.png", "/etc/passwd", ".."])
def test_paths_may_not_leave_the_folder(folder: Path, name: str) -> None:
    plain().save(folder.parent / "secret.png")
    with pytest.raises(CalibrationError, match=r"records\.jsonl:1: image .* lies outside"):
        read_one(folder, {"image": name, "conversations": [ASKED]})


def test_links_may_not_leave_the_folder(folder: Path) -> None:
    plain().save(folder.parent / "secret.png")
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "up").symlink_to(folder.parent)
    for name in ("link.png", "up/secret.png"):
        conversation = read_one(folder, {"image": name, "conversations": [ASKED]})
        with pytest.raises(CalibrationError, match=r"records\.jsonl:1: .* is a link to somewhere") as raised:
            open_images(conversation)
        assert not isinstance(raised.value, DamagedImageError)


def test_paths_within_the_folder_may_be_odd(folder: Path) -> None:
    (folder / "link.png").symlink_to("sub/c.png")
    (folder.parent / "alias").symlink_to(folder)
    for name in ("link.png", "sub/../sub/c.png", str(folder / "sub" / "c.png")):
        assert colors(read_one(folder, {"image": name, "conversations": [ASKED]})) == [(0, 128, 0)]
    write_lines(folder / "records.jsonl", {"image": "sub/c.png", "conversations": [ASKED]})
    (conversation,) = read_conversations(folder.parent / "alias" / "records.jsonl")
    assert colors(conversation) == [(0, 128, 0)]


# ---- folders


def test_a_folder_of_images(folder: Path) -> None:
    plain("white").save(folder / "A.JPG")
    for name in (".hidden.png", "notes.txt", "sub.png/x"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    found = read_image_folder(folder, "Describe <image>")
    assert [each.where for each in found] == [
        str(folder / name) for name in ("A.JPG", "a.png", "b.png", "sub.png")
    ]
    assert {each.turns for each in found} == {(Turn("user", "Describe", 1),)}
    assert [colors(each)[0] for each in found[1:3]] == [(255, 0, 0), (0, 0, 255)]
    with pytest.raises(DamagedImageError, match=r"sub\.png: not a file"):
        open_images(found[3])


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no image in this folder \(\.bmp"):
        read_image_folder(tmp_path, "Describe.")
    with pytest.raises(CalibrationError, match=r"missing: cannot be read as a folder"):
        read_image_folder(tmp_path / "missing", "Describe.")


# ---- the hub


def hub_dataset(directory: Path, rows: Mapping[str, Any], *images: str) -> str:
    """Write a dataset as the hub has them, and return what stands for its name."""
    import datasets

    kinds: dict[str, Any] = {name: datasets.Image() for name in images}
    kinds |= {name: [datasets.Image()] for name in images if isinstance(rows[name][0], list)}
    dataset = datasets.Dataset.from_dict({name: rows[name] for name in rows if name not in images})
    features = datasets.Features({**dataset.features, **kinds})
    directory.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(directory / "train.parquet"))
    return str(directory)


def read_hub(name: str, **options: Any) -> Any:
    return read_hub_conversations(name, **{"config": None, "split": "train", "revision": None} | options)


@pytest.fixture(autouse=True, scope="module")
def _no_progress_bars() -> Iterator[None]:
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def stored(content: bytes | None, path: str | None = None) -> dict[str, object]:
    return {"bytes": content, "path": path}


def test_hub_datasets(tmp_path: Path) -> None:
    rows = {
        "image": [stored(encoded(plain())), stored(b"broken", "b.png"), None, stored(encoded(plain("blue")))],
        "conversations": [[ASKED, ANSWERED]] * 4,
    }
    name = hub_dataset(tmp_path / "set", rows, "image")
    found = read_hub(name)
    assert (len(found), found.without_image) == (3, 1)
    assert [each.where for each in found] == [f"{name}[train][{row}]" for row in (0, 1, 3)]
    assert found[0].turns == (Turn("user", "What is it?", 1), Turn("assistant", "a star"))
    assert colors(found[0]) == [(255, 0, 0)]
    assert colors(found[2]) == [(0, 0, 255)]
    with pytest.raises(DamagedImageError, match=r"set\[train\]\[1\]: not a picture"):
        open_images(found[1])
    first = read_hub(name, max_records=3)
    assert (len(first), first.without_image) == (2, 1)


def test_hub_datasets_of_questions_and_of_several_images(tmp_path: Path) -> None:
    red, blue = (stored(encoded(plain(color))) for color in ("red", "blue"))
    name = hub_dataset(
        tmp_path / "questions",
        {"pictures": [[red, blue], [blue]], "question": ["Which?", "What?"], "answer": ["none", "a star"]},
        "pictures",
    )
    found = read_hub(name, image_field="pictures")
    assert [each.turns[0] for each in found] == [Turn("user", "Which?", 2), Turn("user", "What?", 1)]
    assert [colors(each) for each in found] == [[(255, 0, 0), (0, 0, 255)], [(0, 0, 255)]]


def test_hub_datasets_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="hub nobody/nothing: cannot be read"):
        read_hub("nobody/nothing")
    elsewhere = {"image": [stored(None, "/etc/passwd")], "question": ["?"], "answer": ["!"]}
    name = hub_dataset(tmp_path / "elsewhere", elsewhere, "image")
    with pytest.raises(CalibrationError, match=r"\[0\]: column 'image' has no picture in it, but an object"):
        read_hub(name)
    with pytest.raises(CalibrationError, match=r"cannot be read .*Bad split: test"):
        read_hub(name, split="test")
    with pytest.raises(CalibrationError, match=r"no list of turns in 'talk'; it has: answer, image"):
        read_hub(name, conversation_field="talk")
    (tmp_path / "elsewhere" / "train.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(CalibrationError, match="elsewhere: cannot be read"):
        read_hub(name)


def test_the_hub_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"pip install 'ercsvd-deploy\[hub\]'"):
        read_hub("somebody/something")


# ---- hostile input

KEYS = st.sampled_from(
    ["image", "conversations", "messages", "from", "value", "role", "content", "type", "text", "url"]
) | st.sampled_from(["image_url", "path", "question", "answer"])
WORDS = st.sampled_from(
    ["human", "gpt", "system", "user", "assistant", "image", "text", "image_url", "a.png", "<image>"]
) | st.sampled_from(["../x", "/", "\ud800", "\0", ""])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=15,
)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"from": WORDS, "value": WORDS | JSON, "role": WORDS, "content": WORDS | st.lists(JSON)}
)
RECORD = st.fixed_dictionaries(
    {"image": JSON}, optional={"conversations": st.lists(MESSAGE | JSON), "messages": st.lists(MESSAGE)}
)


def check_read(path: Path, root: Path) -> None:
    """Read a file; either that is refused, naming it, or everything about the result is as promised."""
    refusal = ""
    found: Sequence[Conversation] = ()
    try:
        found = read_conversations(path, image_root=root)
    except CalibrationError as error:
        refusal = str(error)
    assert found or refusal.startswith(str(path))
    for conversation in found:
        roles = [turn.role for turn in conversation.turns if turn.role != "system"]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
        assert sum(turn.num_images for turn in conversation.turns) == len(conversation.images) > 0
        assert not any("<image>" in turn.text for turn in conversation.turns)
        with suppress(CalibrationError):
            assert all(image.mode == "RGB" for image in open_images(conversation))


@pytest.fixture(scope="module")
def hostile_folder() -> Iterator[Path]:
    with TemporaryDirectory() as directory:
        plain().save(Path(directory) / "a.png")
        yield Path(directory)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(records=st.lists(RECORD | JSON, min_size=1, max_size=2), as_array=st.booleans())
@example(records=[{"messages": [{"role": "user", "content": [{"type": ["image"]}]}]}], as_array=False)
def test_no_record_does_worse_than_an_error(
    records: list[object], as_array: bool, hostile_folder: Path
) -> None:
    path = hostile_folder / "records"
    path.write_text(json.dumps(records) if as_array else "\n".join(map(json.dumps, records)))
    check_read(path, hostile_folder)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=60) | st.text(alphabet='[]{}",:\\0 \n', max_size=40).map(str.encode))
def test_no_file_does_worse_than_an_error(content: bytes, hostile_folder: Path) -> None:
    (hostile_folder / "bytes").write_bytes(content)
    check_read(hostile_folder / "bytes", hostile_folder)
