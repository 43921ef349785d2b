"""Rows, their order and the token cache, compared with plain Python that follows their contract."""

import errno
import gzip
import itertools
import os
import random
import re
import signal
import socket
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from unittest import mock

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dataset import token_cache
from dataset.lm_dataset import PretrainDataset, permutation
from dataset.loader import as_is, from_loader, ignore_signals
from dataset.records import TEXT, DataError, read_documents
from dataset.token_cache import (
    BadRecords,
    TokenCache,
    build_token_cache,
    remove_leftovers,
    text_batches,
    unsigned,
)
from scripts import prepare_data
from tests.helpers import shipped_tokenizer, start_python, write_jsonl
from tests.running import files_with_times
from trainer.trainer_utils import SkipBatchSampler

BOS, EOS, PAD, IGNORE = 1, 2, 0, -100
TEXTS = [
    "A short one.",
    "x",
    "One that is longer than any of the rows below, " * 8,
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>",
    "深度学习 🙂 naïve",
    "12345",
    "y",
    "The last of them, of a usual length.",
]


def encode(text: str) -> list[int]:
    """Ids by transformers' own call."""
    return shipped_tokenizer()(text, add_special_tokens=False)["input_ids"]


def build(folder: Path, *paths: Path) -> TokenCache:
    """The cache of these files, in ``folder``."""
    return build_token_cache([*map(str, paths)], shipped_tokenizer(), folder / "cache")


def open_rows(
    folder: Path, texts: list[str] = TEXTS, length: int = 16, **how: object
) -> PretrainDataset:
    """The dataset of these texts, its files in ``folder``."""
    corpus = write_jsonl(folder / "corpus.jsonl", texts)
    cache_dir = str(folder / "cache")
    return PretrainDataset(str(corpus), shipped_tokenizer(), length, cache_dir=cache_dir, **how)


def short_text(number: int) -> str:
    """One of many documents, unlike every other."""
    return f"document {number} " * (number % 3 + 1)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    """The first 2,000 short texts."""
    folder = tmp_path_factory.mktemp("many")
    return build(folder, write_jsonl(folder / "corpus.jsonl", map(short_text, range(2000))))


# ---------------------------------------------------------------------------------------- rows


def expected_rows(documents: list[list[int]], length: int) -> list[tuple[list[int], ...]]:
    """(ids, labels, document_starts) of each packed row, found one token at a time."""
    stream = []  # (id, label, number of its document)
    for number, ids in enumerate(documents):
        stream += [(BOS, IGNORE, number), *((i, i, number) for i in ids), (EOS, EOS, number)]
    stream += [(PAD, IGNORE, None)] * (-len(stream) % length)
    rows = []
    for begin in range(0, len(stream), length):
        ids, labels, owners = zip(*stream[begin : begin + length], strict=True)
        starts = [-1 if owner is None else owners.index(owner) for owner in owners]
        rows.append((list(ids), list(labels), starts))
    return rows


def test_every_token_comes_once_an_epoch_in_rows_that_know_their_documents(tmp_path: Path) -> None:
    num_tokens = sum(len(encode(text)) + 2 for text in TEXTS)
    for length in (2, 3, 7, 16, 50, num_tokens - 1, num_tokens, num_tokens + 5):
        data = open_rows(tmp_path, length=length)
        for epoch in (0, 3):
            data.set_epoch(epoch)
            order = permutation(len(TEXTS), 42, epoch).tolist()
            expected = expected_rows([encode(TEXTS[i]) for i in order], length)
            assert [tuple(part.tolist() for part in row) for row in data] == expected
            batch = data.__getitems__(list(range(len(data))))
            assert list(zip(*(part.tolist() for part in batch[:3]), strict=True)) == expected
            assert batch.num_labels == sum(i != IGNORE for row in expected for i in row[1][1:])


@pytest.mark.parametrize("packing", [True, False])
def test_rows_are_made_on_a_device_without_waiting_for_it(tmp_path: Path, packing: bool) -> None:
    """The meta device knows only shapes: looking at a value there raises an error."""
    data = open_rows(tmp_path, length=16, packing=packing)
    batches = [[0], [1, 0], list(range(len(data) + 2))]
    expected = [data.__getitems__(rows) for rows in batches]
    data.to(torch.device("meta")).set_epoch(0)
    for rows, on_host in zip(batches, expected, strict=True):
        batch = data.__getitems__(rows)
        assert batch.num_labels == int((on_host.labels[:, 1:] != IGNORE).sum())
        for part, same in zip(batch[:3], on_host[:3], strict=True):
            if part is not None:
                assert part.is_meta and part.shape == same.shape and part.dtype == same.dtype


def test_a_control_token_in_a_text_does_not_end_a_document(tmp_path: Path) -> None:
    data = open_rows(tmp_path, [TEXTS[3]], length=64)
    ids, labels, starts = data[0]
    assert (ids == BOS).sum() == 3 and (ids == EOS).sum() == 3
    assert (labels == IGNORE).nonzero().flatten().tolist() == [0, *range(data.num_tokens, 64)]
    assert set(starts.tolist()) == {0, -1}


def test_rows_past_the_last_are_padding(tmp_path: Path) -> None:
    for packing in (True, False):
        data = open_rows(tmp_path, packing=packing)
        batch = data.__getitems__([len(data), len(data) + 7])
        assert (batch.input_ids == PAD).all() and (batch.labels == IGNORE).all()
        assert batch.num_labels == 0


def test_unpacked_rows_hold_one_document_each_truncated_without_a_false_eos(tmp_path: Path) -> None:
    data = open_rows(tmp_path, packing=False)
    assert len(data) == len(TEXTS)
    for row, number in zip(data, permutation(len(TEXTS), 42, 0).tolist(), strict=True):
        whole = [BOS, *encode(TEXTS[number]), EOS][:16]
        ids, labels = (part.tolist() for part in row)
        assert ids == whole + [PAD] * (16 - len(whole))
        assert labels[1:] == whole[1:] + [IGNORE] * (16 - len(whole))


# --------------------------------------------------------------------------------------- order


def test_order_is_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        torch.rand(3)  # the global generator has no influence
        data = open_rows(tmp_path, [f"text {i}" for i in range(50)], seed=seed)
        data.set_epoch(epoch)
        return data.order.tolist()

    orders = {(seed, epoch): order(seed, epoch) for seed in (1, 2) for epoch in (0, 1, 2)}
    assert all(sorted(found) == list(range(50)) for found in orders.values())
    assert len(set(map(tuple, orders.values()))) == 6
    assert order(2, 1) == orders[2, 1]


def test_order_is_frozen_because_a_resumed_run_relies_on_it() -> None:
    """If this fails, every run that was saved before would repeat some rows and miss others."""
    assert permutation(10, 42, 0).tolist() == [4, 2, 3, 5, 7, 6, 0, 1, 8, 9]
    assert permutation(10, 42, 1).tolist() == [1, 0, 5, 4, 8, 6, 7, 3, 2, 9]


def dealt(num_rows: int, batch_size: int, skip: int, world_size: int) -> list[list[int]]:
    """All ranks' batches, in the order in which windows take them."""
    ranks = [
        SkipBatchSampler(range(num_rows), batch_size, skip, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert [len(rank) for rank in ranks] == [len(list(rank)) for rank in ranks]
    rounds = itertools.zip_longest(*ranks)
    return [batch for one_round in rounds for batch in one_round if batch is not None]


def test_ranks_and_interruptions_change_nothing_in_the_order_of_rows() -> None:
    draw = random.Random(0)
    for _ in range(300):
        num_rows, batch_size = draw.randrange(60), draw.randint(1, 7)
        before, after = draw.choices((1, 2, 4), k=2)  # ranks
        stopped_at = draw.randint(0, 70 // batch_size)  # batches
        batches = dealt(num_rows, batch_size, 0, before)[:stopped_at]
        batches += dealt(num_rows, batch_size, stopped_at, after)
        assert [row for batch in batches for row in batch] == list(range(num_rows))
        assert all(len(batch) == batch_size for batch in batches[:-1])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_loader_processes_give_the_same_batches(tmp_path: Path) -> None:
    data = open_rows(tmp_path)

    def batches(num_workers: int) -> list[Tensor]:
        sampler = SkipBatchSampler(range(len(data)), 3, 1)
        loader = DataLoader(data, batch_sampler=sampler, num_workers=num_workers, collate_fn=as_is)
        return [torch.stack(batch[:3]) for batch in loader]

    alone, in_two = batches(0), batches(2)
    assert sum(part.shape[1] for part in alone) == len(data) - 3
    assert all(torch.equal(one, other) for one, other in zip(alone, in_two, strict=True))


# ------------------------------------------------------------------------------------ held out


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_loader_processes_may_be_started_in_any_way(tmp_path: Path, method: str) -> None:
    data = open_rows(tmp_path)
    loader = DataLoader(
        data, batch_size=4, num_workers=1, collate_fn=as_is, multiprocessing_context=method
    )
    assert torch.equal(next(iter(loader)).input_ids, data.__getitems__([0, 1, 2, 3]).input_ids)


def test_held_out_documents_are_the_given_share_and_never_trained_on(many: TokenCache) -> None:
    data = PretrainDataset(many, shipped_tokenizer(), 32, heldout_fraction=0.1)
    numbers = data.is_held_out.nonzero().flatten().tolist()
    kept_aside = {tuple(encode(short_text(i))) for i in numbers}
    assert len(kept_aside) == pytest.approx(200, abs=45)  # 3.4 standard deviations
    ids, _, starts = data.__getitems__(list(range(len(data))))[:3]
    stream = ids.flatten()[starts.flatten() >= 0]
    trained_on = torch.tensor_split(stream, (stream == BOS).nonzero().flatten()[1:])
    assert len(trained_on) == 2000 - len(kept_aside)
    assert not kept_aside & {tuple(document[1:-1].tolist()) for document in trained_on}


def test_a_document_stays_on_its_side_when_the_corpus_grows(tmp_path: Path) -> None:
    texts = [f"document {i % 250}" for i in range(500)]  # each one twice
    before = open_rows(tmp_path, texts[:300], heldout_fraction=0.3).is_held_out
    after = open_rows(tmp_path, texts, heldout_fraction=0.3).is_held_out
    assert torch.equal(after[:300], before) and 0 < before.sum() < 300
    assert torch.equal(after[:250], after[250:])


def test_documents_are_separated_by_language(tmp_path: Path) -> None:
    texts = [
        "Paris is the capital of France",
        "巴黎是法国的首都",
        "for i in range(9): print(i)",
        "用 print 函数可以输出 a、b、c",
        "The word 中 stands for the middle of something here",
    ]
    data = open_rows(tmp_path, texts)
    parts = data.by_language(shipped_tokenizer())
    found = {name: part.documents.tolist() for name, part in parts.items()}
    assert found == {"zh": [1, 3], "en": [0, 2, 4]}
    num_bytes = [len(text.encode()) for text in texts]
    assert parts["zh"].num_text_bytes == num_bytes[1] + num_bytes[3]
    assert sum(part.num_text_bytes for part in parts.values()) == data.num_text_bytes
    (tmp_path / "one").mkdir()
    assert set(open_rows(tmp_path / "one", texts[:1]).by_language(shipped_tokenizer())) == {"en"}


@pytest.mark.parametrize("length", [2, 7, 64])
def test_held_out_rows_predict_every_token_but_each_first_once(
    many: TokenCache, length: int
) -> None:
    data = PretrainDataset(many, shipped_tokenizer(), length, heldout_fraction=0.05)
    held_out = data.held_out(600)
    texts = [short_text(i) for i in held_out.documents.tolist()]
    labels = held_out.__getitems__(list(range(len(held_out)))).labels[:, 1:]
    assert labels[labels != IGNORE].tolist() == [i for text in texts for i in (*encode(text), EOS)]
    assert held_out.num_text_bytes == sum(len(text.encode()) for text in texts)
    following = data.is_held_out.nonzero().flatten()[len(texts)].item()
    one_more = len(encode(short_text(following))) + 2
    assert held_out.num_tokens <= 600 < held_out.num_tokens + one_more


# --------------------------------------------------------------------------------- token cache


def documents_of(cache: TokenCache) -> list[list[int]]:
    """Every document's ids."""
    bounds = itertools.pairwise(cache.offsets.tolist())
    return [unsigned(cache.tokens[begin:end]).tolist() for begin, end in bounds]


def test_cached_ids_are_the_texts(tmp_path: Path) -> None:
    cache = build(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS))
    assert [shipped_tokenizer().decode(ids) for ids in documents_of(cache)] == TEXTS
    assert documents_of(cache) == [encode(text) for text in TEXTS]
    assert cache.num_bytes.tolist() == [len(text.encode()) for text in TEXTS]


def test_a_tokenizer_that_truncates_and_pads_loses_and_adds_nothing(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained("model")
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=6)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    cache = build_token_cache(str(corpus), tokenizer, tmp_path / "cache")
    assert documents_of(cache) == [encode(text) for text in TEXTS]


def test_the_second_opening_builds_nothing(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS)

    def files() -> dict[Path, int]:
        build(tmp_path, corpus)
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}

    assert files() == files()


def test_a_cache_is_known_by_content_not_by_name(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    folder = build(tmp_path, corpus).folder
    corpus = corpus.rename(tmp_path / "b.jsonl")
    assert build(tmp_path, corpus).folder == folder
    corpus.write_bytes(corpus.read_bytes().replace(b"12345", b"12346"))
    changed = build(tmp_path, corpus)
    assert changed.folder != folder and encode("12346") in documents_of(changed)
    other = build_token_cache(str(corpus), word_tokenizer(100), tmp_path / "cache")
    assert other.folder not in (folder, changed.folder)


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: w0, w1, ..., EOS."""
    vocab = {f"w{i}": i for i in range(vocab_size - 1)} | {"</s>": vocab_size - 1}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="w0")


@pytest.mark.parametrize(("vocab_size", "num_bytes"), [(65536, 2), (65537, 4), (70000, 4)])
def test_ids_take_two_bytes_while_they_fit(tmp_path: Path, vocab_size: int, num_bytes: int) -> None:
    ids = [1, 32767, 32768, vocab_size - 2]
    corpus = write_jsonl(tmp_path / "a.jsonl", [" ".join(f"w{i}" for i in ids) + "</s>"])
    cache = build_token_cache(str(corpus), word_tokenizer(vocab_size), tmp_path)
    assert documents_of(cache) == [[*ids, vocab_size - 1]]
    assert (cache.folder / "tokens.bin").stat().st_size == 5 * num_bytes


def test_several_files_and_folders_are_read_in_order(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "z.jsonl", ["first"])
    inside = tmp_path / "folder"
    (inside / "deeper").mkdir(parents=True)
    write_jsonl(inside / "b.jsonl", ["third"])
    write_jsonl(inside / "a.jsonl", ["second"])
    write_jsonl(inside / "deeper" / "c.jsonl", ["fourth"])
    (inside / "notes.md").write_text("no document")
    found = documents_of(build(tmp_path, first, inside))
    assert found == [encode(text) for text in ("first", "second", "third", "fourth")]


def test_control_tokens_and_empty_documents_are_counted(tmp_path: Path) -> None:
    cache = build(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["", TEXTS[3], " \n", "plain"]))
    assert documents_of(cache) == [encode(TEXTS[3]), encode("plain")]
    names = ("num_documents", "num_empty", "num_control_tokens")
    assert [cache.meta[name] for name in names] == [2, 2, 4]


def test_a_damaged_cache_is_named(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    folder = build(tmp_path, corpus).folder
    os.truncate(folder / "tokens.bin", 10)
    with pytest.raises(DataError, match=str(folder)):
        TokenCache.open(folder)


BUILD = """
import sys
from transformers import PreTrainedTokenizerFast
from dataset.token_cache import build_token_cache
tokenizer = PreTrainedTokenizerFast.from_pretrained("model")
input("ready\\n")
print(build_token_cache(sys.argv[1], tokenizer, sys.argv[2]).folder.name)
"""


def begin(*processes: Popen) -> None:
    """Let all of them begin at once."""
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()


def test_a_killed_build_leaves_no_cache_and_the_next_one_succeeds(tmp_path: Path) -> None:
    texts = [f"document {i} " * 20 for i in range(20000)]
    corpus, folder = write_jsonl(tmp_path / "a.jsonl", texts), tmp_path / "cache"
    with start_python("-c", BUILD, corpus, folder) as process:
        begin(process)
        while not list(folder.glob(".building-*/tokens.bin")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert [path.name[:9] for path in folder.iterdir()] == [".building"]
    write_jsonl(corpus, texts[:10])
    assert len(documents_of(build(tmp_path, corpus))) == 10
    assert not list(folder.glob(".building-*"))


WAITING_BUILD = """
import os, sys
from unittest import mock
from dataset import token_cache
from tests.helpers import shipped_tokenizer

if sys.argv[3] != "-":
    os.getpid = lambda: int(sys.argv[3])
if sys.argv[4] == "no locks":
    token_cache.lock = lambda file, shared=False: None

def encode(tokenizer, texts):
    print("building", flush=True)
    sys.stdin.readline()
    return [[1]] * len(texts)

token_cache.encode = encode
print(token_cache.build_token_cache(sys.argv[1], shipped_tokenizer(), sys.argv[2]).folder.name)
"""
DAY = 86_400


@contextmanager
def builder(folder: Path, pid: object = "-", locks: str = "locks") -> Iterator[Popen]:
    """A process that is building a cache in ``folder`` / cache until it reads a line.

    Args: pid: what it takes for its own; locks: "no locks" if its disk has none."""
    corpus = write_jsonl(folder / "a.jsonl", TEXTS)
    with start_python("-c", WAITING_BUILD, corpus, folder / "cache", pid, locks) as process:
        assert process.stdout.readline() == "building\n", process.stderr.read()
        yield process
        process.kill()


def building(folder: Path) -> list[Path]:
    """The private folders of builds."""
    return list((folder / "cache").glob(".building-*"))


def make_old(folder: Path, days: float) -> None:
    """Let nothing in it have changed for so long."""
    for path in (*folder.iterdir(), folder):
        os.utime(path, (time.time() - days * DAY,) * 2)


@pytest.mark.parametrize("pid", [999_999_999, 1, os.getpid()], ids=["free", "first", "own"])
def test_what_a_process_of_another_container_builds_is_left_alone(tmp_path: Path, pid: int) -> None:
    with builder(tmp_path, pid) as process:
        (found,) = building(tmp_path)
        make_old(found, 30)
        assert len(documents_of(build(tmp_path, tmp_path / "a.jsonl"))) == len(TEXTS)
        assert building(tmp_path) == [found]
        said, complaint = process.communicate("\n", timeout=60)
        assert process.returncode == 0, complaint
    (cache,) = (tmp_path / "cache").iterdir()
    assert said.strip() == cache.name
    assert {path.name for path in cache.iterdir()} == {*token_cache.FILES, "meta.json"}


def test_a_killed_build_is_removed_whoever_has_its_pid_now(tmp_path: Path) -> None:
    with builder(tmp_path, os.getppid()):
        assert building(tmp_path)
    remove_leftovers(tmp_path / "cache")
    assert not building(tmp_path)


@pytest.mark.parametrize("locks", ["locks", "no locks"])
def test_a_killed_build_that_may_be_another_machine_s_is_removed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: str
) -> None:
    with builder(tmp_path, locks=locks):
        pass
    if locks == "locks":
        monkeypatch.setattr(socket, "gethostname", lambda: "another")
    (found,) = building(tmp_path)
    days = 1 if locks == "locks" else 7
    for age, is_left in ((0, True), (days - 0.1, True), (days + 0.1, False)):
        make_old(found, age)
        remove_leftovers(tmp_path / "cache")
        assert found.exists() == is_left


@pytest.mark.parametrize("system", ["Windows", "a network disk"])
def test_a_cache_is_built_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    if system == "Windows":
        monkeypatch.setitem(sys.modules, "fcntl", None)
    else:
        monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=OSError(errno.ENOLCK, "no locks")))
    with builder(tmp_path):
        assert len(documents_of(build(tmp_path, tmp_path / "a.jsonl"))) == len(TEXTS)
        assert building(tmp_path)


def test_signals_that_a_system_lacks_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "SIGHUP")
    monkeypatch.delattr(signal, "SIGCHLD")
    with mock.patch.object(signal, "signal") as changed:
        ignore_signals(0)
        batches = mock.MagicMock(num_workers=1)
        batches.__iter__.return_value = iter([])
        assert list(from_loader(batches)) == []
    assert [call.args[0] for call in changed.call_args_list] == [signal.SIGTERM, signal.SIGINT]


def test_odd_names_in_the_cache_folder_do_no_harm(tmp_path: Path) -> None:
    host = socket.gethostname()
    names = [f".building-{host}-{'9' * 20}", f".building-{host}-2-999999999", ".building-"]
    names += [f".building-{host}--5", ".building-²", f".building-{host}-", "building-x"]
    folders = [tmp_path / name for name in names]
    for folder in folders:
        folder.mkdir()
    (tmp_path / ".building-file").touch()
    (tmp_path / ".building-link").symlink_to(tmp_path / "building-x")
    os.mkfifo(folders[0] / token_cache.LOCK)
    before = set(tmp_path.iterdir())
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == before
    for folder in folders:
        make_old(folder, 8)
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "building-x",
        *map(".building-{}".format, ("file", "link")),
    }


def test_a_cache_folder_whose_name_is_not_utf_8_is_refused_before_anything_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    folder = os.fsdecode(bytes(tmp_path / "caf") + b"\xe9")
    assert prepare_data.main(["--data_path", str(corpus), "--cache_dir", folder]) == 3
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: --cache_dir '.*caf\\udce9' is not UTF-8\. Choose .*\n", error)
    assert list(tmp_path.iterdir()) == [corpus]


def test_a_cache_made_ahead_is_the_one_that_training_finds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    words = ["--data_path", str(corpus), "--cache_dir", str(tmp_path / "cache")]
    assert prepare_data.main(words) == 0
    (made,) = (tmp_path / "cache").iterdir()
    assert f"{made}: {len(TEXTS)} documents" in capsys.readouterr().out
    before = files_with_times(tmp_path)
    assert build_token_cache(str(corpus), shipped_tokenizer(), tmp_path / "cache").folder == made
    assert files_with_times(tmp_path) == before
    assert prepare_data.main([*words, "--data_path", str(tmp_path / "absent.jsonl")]) == 3
    assert capsys.readouterr().err.startswith(f"error: --data_path {tmp_path / 'absent.jsonl'}")
    assert prepare_data.main([*words, "--tokenizer_path", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: --tokenizer_path {tmp_path / 'absent'} holds no "
    )


def test_two_processes_may_build_the_same_cache_at_once(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", [f"document {i} " * 20 for i in range(2000)])
    both = [start_python("-c", BUILD, corpus, tmp_path / "cache") for _ in range(2)]
    begin(*both)
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert names == {out.strip() for out, _ in said} and len(names) == 1


def test_memory_does_not_grow_with_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "BATCH_BYTES", 2**14)  # small beside these files
    peaks = []
    for num in (10, 3_000, 30_000):  # the first warms up
        corpus = write_jsonl(tmp_path / f"{num}.jsonl", map(short_text, range(num)))
        tracemalloc.start()
        build(tmp_path, corpus)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.5 * peaks[1]


def many_files(folder: Path, texts: list[str]) -> list[Path]:
    """Five texts in each."""
    parts = [texts[i : i + 5] for i in range(0, len(texts), 5)]
    return [write_jsonl(folder / f"{i}.jsonl", part) for i, part in enumerate(parts)]


def packed_file(folder: Path, texts: list[str]) -> list[Path]:
    """All of them in a file of few bytes."""
    path = write_jsonl(folder / "a.jsonl", texts)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    return [folder / "a.jsonl.gz"]


def parquet_file(folder: Path, texts: list[str]) -> list[Path]:
    """All of them, most of which the format stores once."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": texts}), folder / "a.parquet")
    return [folder / "a.parquet"]


@pytest.mark.parametrize("write", [many_files, packed_file, parquet_file])
@pytest.mark.parametrize("text", ["é" * 500, ""])
def test_a_batch_is_bounded_however_the_texts_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable, text: str
) -> None:
    monkeypatch.setattr(token_cache, "BATCH_BYTES", 10_000)
    texts = [text] * 1000
    files = write(tmp_path, texts)
    with tqdm(disable=True) as bar, mock.patch.object(bar, "update") as update:
        batches = list(text_batches(files, TEXT, BadRecords(skip=False), bar))
    assert list(itertools.chain(*batches)) == texts
    assert max(map(len, batches)) <= (10 if text else 100)
    counted = sum(call.args[0] for call in update.call_args_list)
    assert counted == sum(path.stat().st_size for path in files)  # the bar ends at its end


# ---------------------------------------------------------------------------------- bad input


def test_what_other_programs_write_is_accepted(tmp_path: Path) -> None:
    lines = ['\ufeff{"text": "one"}', "\r", "  ", '{"id": 7, "text": "t\u2028wo"}\r', "", "\t"]
    lines += [r'{"text": "\ud83d\ude42"}']  # and no end of line at the end of the file
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode())
    found = [text for text, _ in read_documents(tmp_path / "a.jsonl")]
    assert found == ["one", "t\u2028wo", "🙂"]


def test_a_missing_file_leads_to_the_download_and_the_demo(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pretrain_t2t\.jsonl.*https://.*--preset demo"):
        build(tmp_path, tmp_path / "pretrain_t2t.jsonl")
    with pytest.raises(DataError, match=r"none\.jsonl: no such file. Expected a file, a folder or"):
        build(tmp_path, tmp_path / "none.jsonl")


def test_a_corpus_without_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: no document"):
        build(tmp_path, write_jsonl(tmp_path / "a.jsonl", ["", " \n"]))


def test_no_word_of_a_message_comes_twice(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "once\n')
    with pytest.raises(DataError) as caught:
        list(read_documents(tmp_path / "a.jsonl"))
    assert " at at " not in str(caught.value)
