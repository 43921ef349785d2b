"""Conversations: the template, what is learned of them, how they share rows, what is refused."""

import gzip
import importlib.util
import json
import os
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dataset.chat_datasets import SFTDataset
from dataset.conversations import Marks, chat_content, conversation_of, written_out
from dataset.lm_dataset import IGNORE, PretrainDataset
from dataset.packing import pack
from dataset.records import DataError
from dataset.system_lines import LINES
from model.documents import document_bounds
from tests.helpers import ROOT, shipped_tokenizer, tiny_model

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALLS = [{"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]
ALL_ROLES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 加 2？"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "三", "reasoning_content": "1 + 2"},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Bye."},
]
WRITTEN = """<|im_start|>system
Be brief.

# Tools

These functions may be called:
<tools>
{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
</tools>

A call is written as
<tool_call>
{"name": ..., "arguments": {...}}
</tool_call><|im_end|>
<|im_start|>user
1 加 2？<|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "add", "arguments": {"a": 1, "b": 2}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
3
</tool_response><|im_end|>
<|im_start|>assistant
<think>
1 + 2
</think>

三<|im_end|>
<|im_start|>user
Thanks.<|im_end|>
<|im_start|>assistant
Bye.<|im_end|>
"""


def conversation(*turns: str) -> dict:
    """Turns of user and assistant, in turn."""
    roles = ("user", "assistant")
    found = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"conversations": found}


def some_conversations(num: int = 60, seed: int = 0) -> list[dict]:
    """Of various lengths, some of which are longer than a row of 128 tokens."""
    rng = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(f"word{rng.randint(0, 99)}" for _ in range(rng.randint(1, most)))

    return [
        conversation(*(words(40 if i % 9 == 0 else 4) for _ in range(2 * rng.randint(1, 3))))
        for i in range(num)
    ]


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return path


def dataset(folder: Path, records: list[dict], length: int = 128, **choice: object) -> SFTDataset:
    path = write(folder / "chats.jsonl", records)
    return SFTDataset(
        str(path), shipped_tokenizer(), length, cache_dir=str(folder / "cache"), **choice
    )


def learned(tokenizer: PreTrainedTokenizerBase, record: dict) -> list[int]:
    """What transformers itself says is the assistant's, by the template's generation marks."""
    found = tokenizer.apply_chat_template(
        record["conversations"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
    return [token for token, mask in pairs if mask]


# ---------------------------------------------------------------------------------- the template


def test_the_template_writes_every_kind_of_turn() -> None:
    tokenizer = shipped_tokenizer()
    assert written_out(tokenizer, ALL_ROLES, TOOLS) == WRITTEN
    asked = written_out(tokenizer, ALL_ROLES[:2], None, for_answer=True)
    assert asked == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 加 2？<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer(WRITTEN, add_special_tokens=False)["input_ids"]
    found = tokenizer.apply_chat_template(
        ALL_ROLES, tools=TOOLS, return_dict=True, return_assistant_tokens_mask=True
    )
    assert found["input_ids"] == ids
    spans = Marks(tokenizer).spans(ids)
    assert [i for i, m in enumerate(found["assistant_masks"]) if m] == [
        i for first, end in spans for i in range(first, end)
    ]
    said = [tokenizer.decode(ids[first:end]) for first, end in spans]
    assert said == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>\n',
        "<think>\n1 + 2\n</think>\n\n三<|im_end|>\n",
        "Bye.<|im_end|>\n",
    ]
    num_bytes = sum(len(text.removesuffix("<|im_end|>\n").encode()) for text in said)
    assert Marks(tokenizer).num_bytes(WRITTEN) == num_bytes


def test_ids_and_labels_are_those_that_minimind_s_class_makes() -> None:
    """Recorded with SFTDataset of jingyaogong/minimind d65ef2c and the bundled tokenizer; the
    label at each place is 1 if it is the token there."""
    record = conversation("Hi! 你好", "Hello.", "What is 1+1?", "2")
    ids = shipped_tokenizer()(
        written_out(shipped_tokenizer(), record["conversations"], None), add_special_tokens=False
    )["input_ids"]
    expected = json.loads((ROOT / "tests/golden/minimind_sft.json").read_text())
    assert ids == expected["input_ids"]
    mask = [0] * len(ids)
    for first, end in Marks(shipped_tokenizer()).spans(ids):
        mask[first:end] = [1] * (end - first)
    assert mask == expected["learned"]


def test_a_tokenizer_without_such_a_template_is_refused() -> None:
    tokenizer = shipped_tokenizer().__class__.from_pretrained(str(ROOT / "model"))
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="--tokenizer_path: the tokenizer has no chat template"):
        chat_content(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="begins and ends an assistant's turn otherwise than with"):
        chat_content(tokenizer)


# ------------------------------------------------------------------------------------------ rows


def test_no_conversation_is_cut_that_fits_and_every_label_stands_once(tmp_path: Path) -> None:
    tokenizer, records = shipped_tokenizer(), some_conversations()
    data = dataset(tmp_path, records)
    texts = {written_out(tokenizer, r["conversations"], None): r for r in records}
    rows = data.__getitems__([*range(len(data) + 2)])  # two are padding
    assert rows.num_labels == int((rows.labels[:, 1:] != IGNORE).sum())
    found: list[int] = []
    whole = 0
    for ids, labels, starts in zip(rows.input_ids, rows.labels, rows.document_starts, strict=True):
        for start in sorted(set(starts[starts >= 0].tolist())):
            inside = starts == start
            text = tokenizer.decode(ids[inside])
            said = [label for label in labels[inside].tolist() if label != IGNORE]
            found += said
            if text in texts:
                assert said == learned(tokenizer, texts.pop(text))
                whole += 1
        used = (starts >= 0).sum()
        assert (ids[used:] == data.pad).all() and (labels[used:] == IGNORE).all()
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert whole > 40 and lengths and min(lengths) > 128  # those that are left are too long
    expected = [token for record in records for token in learned(tokenizer, record)]
    assert sorted(found) == sorted(expected) and len(found) == rows.num_labels
    assert (rows.document_starts[: len(data)] >= 0).float().mean() > 0.9


def test_rows_are_shuffled_by_epoch_and_keep_what_they_hold(tmp_path: Path) -> None:
    data = dataset(tmp_path, some_conversations())
    everything = [*range(len(data))]
    first = data.__getitems__(everything).input_ids
    data.set_epoch(1)
    second = data.__getitems__(everything).input_ids
    assert not torch.equal(first, second)
    assert sorted(map(tuple, first.tolist())) == sorted(map(tuple, second.tolist()))
    documents = [data.documents_of([row]) for row in everything]
    for row, inside in zip(everything, documents, strict=True):
        assert len(inside) == len(set(data[row][2][data[row][2] >= 0].tolist()))
    data.set_epoch(0)
    assert torch.equal(data.__getitems__(everything).input_ids, first)


def test_sharing_rows_changes_no_loss(tmp_path: Path) -> None:
    records = some_conversations()
    model = tiny_model(vocab_size=6400, max_position_embeddings=256)
    sums, rows = [], []
    for packing in (True, False):
        data = dataset(tmp_path, records, packing=packing)
        batch = data.__getitems__([*range(len(data))])
        with torch.no_grad():
            sums.append(model(**batch.model_inputs).loss.double() * batch.num_labels)
        rows.append(len(data))
    assert sums[0].item() == pytest.approx(sums[1].item(), rel=1e-6)
    assert rows[0] < 0.7 * rows[1]


def test_held_out_conversations_are_scored_on_answers_alone(tmp_path: Path) -> None:
    data = dataset(tmp_path, some_conversations(200), heldout_fraction=0.2)
    held_out = data.held_out(10**6)
    assert held_out is not None and len(held_out.documents) > 20
    parts = held_out.by_language(shipped_tokenizer())
    assert [*parts] == ["en"]
    part = parts["en"]
    batch = part.__getitems__([*range(len(part))])
    assert batch.num_labels == int(data.cache.labels[part.documents].sum())
    texts = [data.cache.text(d, shipped_tokenizer()) for d in part.documents.tolist()]
    marks = Marks(shipped_tokenizer())
    assert part.num_text_bytes == sum(map(marks.num_bytes, texts))
    assert not set(part.documents.tolist()) & set(data.documents.tolist())


def test_texts_among_conversations_are_learned_whole_and_never_held_out(tmp_path: Path) -> None:
    texts = [{"text": f"Text {i}: <|im_start|>assistant\nword"} for i in range(20)]
    chats = [record | {"text": None} for record in some_conversations(20)]
    data = dataset(tmp_path, [*chats, *texts, {"text": "  "}], heldout_fraction=0.5)
    assert data.cache.meta["num_texts"] == 20 and data.cache.meta["num_empty"] == 1
    assert data.is_held_out[:20].any() and not data.is_held_out[20:].any()
    plain = write(tmp_path / "plain.jsonl", texts)
    cache = str(tmp_path / "cache")
    alone = PretrainDataset(str(plain), shipped_tokenizer(), 64, packing=False, cache_dir=cache)
    rows = {row: alone.__getitems__([row]) for row in range(20)}
    expected = {tuple(batch.input_ids[batch.labels != IGNORE].tolist()) for batch in rows.values()}
    batch = data.__getitems__([*range(len(data))])
    found = set()
    for row, labels, starts in zip(*batch[:3], strict=True):
        for start in starts[starts >= 0].unique():
            inside = starts == start
            if row[inside][-1] == 2:  # EOS, without a newline
                assert labels[start] == IGNORE and (labels[inside][1:] == row[inside][1:]).all()
                found.add(tuple(row[inside][1:].tolist()))
    assert found == expected
    assert batch.num_labels == (batch.labels != IGNORE).sum()
    with pytest.raises(DataError, match="no conversation in --data_path, only texts"):
        SFTDataset(str(plain), shipped_tokenizer(), 64, cache_dir=cache)


def test_packing_wastes_little_and_never_overlaps() -> None:
    rng = random.Random(3)
    lengths = [rng.randint(5, 300) for _ in range(2000)]
    pieces = pack(lengths, 256)
    assert sum(lengths) / (pieces.num_rows * 256) > 0.97
    ends = pieces.begins + pieces.length
    assert (ends[:-1] <= pieces.begins[1:]).all()
    assert (pieces.begins // 256 == (ends - 1) // 256).all()  # none crosses into another row
    for document, length in enumerate(lengths):
        mine = pieces.document == document
        if length <= 256:
            assert pieces.length[mine].tolist() == [length]
        else:
            parts = sorted(
                zip(pieces.first[mine].tolist(), pieces.length[mine].tolist(), strict=True)
            )
            assert parts == [(0, 256), (255, length - 255)]


def test_files_of_every_kind_give_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = some_conversations(20)
    expected = dataset(tmp_path, records)
    messages = [{"messages": record["conversations"]} for record in records]
    lines = "".join(json.dumps(record) + "\n" for record in messages)
    paths = [tmp_path / "m.jsonl", tmp_path / "m.jsonl.gz", tmp_path / "c.parquet"]
    paths[0].write_text(lines)
    paths[1].write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(pyarrow.Table.from_pylist(records), paths[2])
    for path in paths:
        data = SFTDataset(str(path), shipped_tokenizer(), 128, cache_dir=str(tmp_path / "cache"))
        rows = [*range(len(data))]
        for found, wanted in zip(data.__getitems__(rows), expected.__getitems__(rows), strict=True):
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(wanted))


# ------------------------------------------------------------------------------- what is refused

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
BAD = [
    ({"txt": "a"}, 'none of "conversations" and "messages"; its keys: \'txt\''),
    ({"conversations": [USER, ANSWER], "messages": [USER, ANSWER]}, "both of"),
    ({"conversations": "a"}, '"conversations" is a JSON string'),
    ({"conversations": []}, 'no turn of an assistant in "conversations"'),
    ({"messages": [USER]}, 'no turn of an assistant in "messages"'),
    ({"messages": [USER, USER]}, 'turn 2 of "messages": role user after user, expected assist'),
    ({"messages": [ANSWER]}, "role assistant at the beginning, expected system or user"),
    ({"messages": [USER, ANSWER, {"role": "system", "content": "a"}]}, "role system after assi"),
    ({"messages": [USER, ANSWER, {"role": "tool", "content": "a"}]}, "without tool_calls"),
    ({"messages": [{"role": "bot", "content": "a"}]}, "turn 1 of \"messages\": role 'bot', exp"),
    ({"messages": [USER, {"role": "assistant"}]}, "no content in the turn of the assistant"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "no content in the turn"),
    ({"messages": [{"role": "user", "content": 3}, ANSWER]}, '"content" is a JSON number'),
    ({"messages": [{"from": "human", "value": "a"}, ANSWER]}, 'expected "role" and "content"'),
    ({"messages": [USER, ANSWER | {"weight": 0}]}, "key 'weight', expected role, content"),
    ({"messages": [USER, ANSWER | {"tool_calls": "{"}]}, '"tool_calls" is no JSON'),
    ({"messages": [USER, ANSWER | {"tool_calls": "{}"}]}, '"tool_calls" is a JSON object, not'),
    (
        {"messages": [{"role": "system", "content": "", "tools": "a"}, USER, ANSWER]},
        '"tools" is no',
    ),
    ({"messages": [USER | {"content": "x<|im_start|>assistant\ny"}, ANSWER]}, "begins a turn of"),
    ({"messages": [USER | {"content": "\ud800"}, ANSWER]}, "unpaired surrogate"),
    (
        {"messages": [USER, ANSWER | {"tool_calls": [{"name": "\ud800", "arguments": {}}]}]},
        "the chat template cannot write it ('utf-8' codec can't encode",
    ),
    (
        {"messages": [USER, ANSWER], "tools": [{"name": "f", "description": "\ud800"}]},
        "the chat template cannot write it ('utf-8' codec can't encode",
    ),
    ({"messages": ["a", ANSWER]}, "found a JSON string"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_what_is_wrong_with_a_conversation_is_said(
    tmp_path: Path, record: dict, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(conversation('a', 'b'))}\n{json.dumps(record)}\n")
    with pytest.raises(DataError) as caught:
        SFTDataset(str(path), shipped_tokenizer(), 64, cache_dir=str(tmp_path / "cache"))
    found = str(caught.value)
    assert message in found and f"{path} line 2 (byte " in found and "\n" not in found
    assert "Expected one JSON object per line" in found and "--bad_records skip" in found
    skipped = SFTDataset(
        str(path), shipped_tokenizer(), 64, cache_dir=str(tmp_path / "cache"), bad_records="skip"
    )
    assert len(skipped) == 1 and skipped.cache.meta["num_bad"] == 1


def test_plain_text_holds_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello\n")
    with pytest.raises(DataError, match=r"a\.txt is plain text\. Expected one JSON object per li"):
        SFTDataset(str(tmp_path / "a.txt"), shipped_tokenizer(), 64, cache_dir=str(tmp_path))


def test_keys_that_hold_nothing_do_not_count() -> None:
    """As parquet fills them in, and MiniMind's files do."""
    empty = {"reasoning_content": None, "tools": None, "tool_calls": ""}
    turns, tools = conversation_of({"conversations": [USER | empty, ANSWER | empty]})
    assert turns == [USER, ANSWER] and tools is None
    system = {"role": "system", "content": "", "tools": json.dumps(TOOLS)}
    turns, tools = conversation_of({"conversations": [system, USER, ANSWER]})
    assert tools == TOOLS and turns[0] == {"role": "system", "content": ""}


# ------------------------------------------------------------------------------- system lines


def conversations_in(data: SFTDataset) -> list[tuple[str, str]]:
    """Each conversation as it stands in a row, and what of it is learned."""
    tokenizer, found = shipped_tokenizer(), []
    batch = data.__getitems__([*range(len(data)), len(data)])
    for row, labels, starts in zip(*batch[:3], strict=True):
        for start in starts[starts >= 0].unique():
            inside = starts == start
            learned = labels[inside]
            texts = (row[inside], learned[learned != IGNORE])
            found.append(tuple(tokenizer.decode(ids) for ids in texts))
    assert batch.num_labels == (batch.labels != IGNORE).sum()
    bounds = document_bounds(batch.document_starts, batch.document_starts.numel())
    assert int((bounds < batch.document_starts.numel()).sum()) <= batch.max_documents
    return found


def test_system_lines_are_drawn_anew_in_each_epoch_and_are_not_learned(tmp_path: Path) -> None:
    tokenizer = shipped_tokenizer()
    with_system = [{"role": "system", "content": "Be good."}, USER, ANSWER]
    records = [*some_conversations(200), {"conversations": with_system}, {"text": "Word."}]
    plain = dataset(tmp_path, records)
    data = dataset(tmp_path, records, system_share=0.2)
    system = {
        written_out(
            tokenizer, [{"role": "system", "content": line}, USER, ANSWER], None
        ).removesuffix(written_out(tokenizer, [USER, ANSWER], None)): line
        for line in LINES
    }
    drawn = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        found, without = conversations_in(data), []
        lines = {}
        for text, learned in found:
            begin = next((b for b in system if text.startswith(b)), "")
            without.append((text.removeprefix(begin), learned))
            if begin:
                lines[text.removeprefix(begin)] = begin
        assert sorted(without) == sorted(conversations_in(plain))
        drawn.append(lines)
    assert drawn[0] == drawn[2] != drawn[1]
    assert 25 <= len(drawn[0]) <= 55 and len(set(drawn[0].values())) > 5
    other = dataset(tmp_path, records, system_share=0.2, seed=7)
    assert {t for t, _ in conversations_in(other)} != {t for t, _ in conversations_in(data)}
    fewer = dataset(tmp_path, records[:100], system_share=0.2)  # of each by itself
    texts = {text for text, _ in conversations_in(fewer)}
    data.set_epoch(0)
    assert len(texts - {text for text, _ in conversations_in(data)}) == 0
    all_of_them = dataset(tmp_path, records, system_share=1.0)
    room = 128 - all_of_them.lines.ids.shape[1]
    texts = (written_out(tokenizer, r["conversations"], None) for r in records[:200])
    fitting = sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) <= room for t in texts)
    got = sum(text.startswith(tuple(system)) for text, _ in conversations_in(all_of_them))
    assert got == fitting > 150


def test_held_out_conversations_get_no_system_lines(tmp_path: Path) -> None:
    choice = {"heldout_fraction": 0.3}
    plain = dataset(tmp_path, some_conversations(60), **choice).held_out(10**6)
    data = dataset(tmp_path, some_conversations(60), system_share=1.0, **choice).held_out(10**6)
    assert plain and data and conversations_in(plain) == conversations_in(data)


def test_a_template_with_a_system_turn_of_its_own_refuses_drawn_lines(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / "model"))
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nHi.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    path = write(tmp_path / "chats.jsonl", some_conversations(5))
    with pytest.raises(DataError, match="--system_share: the tokenizer's chat template writes"):
        SFTDataset(str(path), tokenizer, 64, cache_dir=str(tmp_path / "c"), system_share=0.5)


THINKING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
)


def test_empty_thinking_is_kept_in_the_same_conversations_in_every_epoch(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / "model"))
    tokenizer.chat_template = THINKING_TEMPLATE
    records = some_conversations(400)
    thinking = {**ANSWER, "reasoning_content": "Hm."}
    path = write(tmp_path / "chats.jsonl", [*records, {"conversations": [USER, thinking]}])

    def texts(share: float, epoch: int = 0, seed: int = 1) -> set[str]:
        choice = {"cache_dir": str(tmp_path / "cache"), "seed": seed, "empty_thinking": share}
        data = SFTDataset(str(path), tokenizer, 4096, **choice)
        data.set_epoch(epoch)
        rows = (data[i][0] for i in range(len(data)))
        found = "".join(tokenizer.decode(ids[ids != tokenizer.pad_token_id]) for ids in rows)
        return set(found.split("<|im_start|>user")[1:])

    empty = "<think>\n\n</think>\n\n"
    all_of_them, some, none = (texts(share) for share in (1.0, 0.2, 0.0))
    assert all("<think>" in text for text in all_of_them)
    assert sum("<think>" in text for text in none) == 1, "thinking that was given stays"
    assert {text.replace(empty, "") for text in all_of_them} == none
    assert some <= all_of_them | none
    assert 0.15 <= sum(empty in text for text in some) / len(some) <= 0.25
    assert some == texts(0.2, epoch=1) == texts(0.2, seed=2)


# ------------------------------------------------------------------------------------ MiniMind's


def minimind_s_classes() -> tuple[Path, ModuleType]:
    """The checkout that MINIMIND names, and its lm_dataset.py."""
    root = Path(os.environ["MINIMIND"])
    spec = importlib.util.spec_from_file_location("theirs", root / "dataset" / "lm_dataset.py")
    assert spec and spec.loader
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    return root, theirs


@pytest.mark.skipif("MINIMIND" not in os.environ, reason="MINIMIND names no checkout of MiniMind")
def test_minimind_s_tokenizer_gives_what_its_own_class_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its random parts left out: MINIMIND=/path/to/minimind pytest tests/test_conversations.py"""
    pytest.importorskip("datasets")
    root, theirs = minimind_s_classes()
    monkeypatch.setattr(theirs, "pre_processing_chat", lambda turns: turns)
    monkeypatch.setattr(theirs, "post_processing_chat", lambda text: text)
    system = {"role": "system", "content": "", "tools": json.dumps(TOOLS)}
    calls = [dict(t) for t in ALL_ROLES[1:]]
    for turn in calls:
        if "tool_calls" in turn:
            turn["tool_calls"] = json.dumps(turn["tool_calls"])
    records = [{"conversations": [system, *calls]}, *some_conversations(30)]
    path = write(tmp_path / "chats.jsonl", records)
    tokenizer = AutoTokenizer.from_pretrained(str(root / "model"))
    expected = theirs.SFTDataset(str(path), tokenizer, 1024)
    data = SFTDataset(str(path), tokenizer, 1024, cache_dir=str(tmp_path / "cache"), packing=False)
    rows = {tuple(data[i][0].tolist()): data[i][1] for i in range(len(data))}
    assert len(rows) == len(expected) == 31
    for i in range(len(expected)):
        ids, labels = expected[i]
        assert torch.equal(rows[tuple(ids.tolist())], labels)
