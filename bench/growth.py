"""How cost grows: an update's time with rows and width, memory and waiting with the corpus.

    python -m bench.growth --device cpu        # five minutes on a laptop's CPU

Synthetic data; every measurement is a process of its own, so that none inherits another's memory.
"""

import json
import multiprocessing
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from bench.measuring import ROOT, parser, reports, surroundings, words
from dataset.lm_dataset import PretrainDataset
from dataset.token_cache import TokenCache
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from trainer.device import default_dtype
from trainer.host import keep_freed_memory
from trainer.optimizer import build_optimizer
from trainer.weights import load_tokenizer

LENGTH = 20  # tokens of a synthetic document


def write_corpus(folder: Path, num_documents: int) -> None:
    """A token cache of equal documents, as dataset/token_cache.py would have made it."""

    def write(name: str, values: torch.Tensor) -> None:
        with (folder / name).open("ab") as file:
            values.numpy().tofile(file)

    for begin in range(0, num_documents, 10**6):
        num = min(10**6, num_documents - begin)
        write("tokens.bin", torch.randint(3, 6400, (num * LENGTH,), dtype=torch.int16))
        first = 0 if begin == 0 else begin + 1
        write("offsets.bin", torch.arange(first, begin + num + 1) * LENGTH)
        write("bytes.bin", torch.full((num,), 3 * LENGTH))
        write("hashes.bin", torch.randint(-(2**31), 2**31, (num,), dtype=torch.int32))
    meta = {"num_documents": num_documents, "num_tokens": num_documents * LENGTH, "bytes_per_id": 2}
    (folder / "meta.json").write_text(json.dumps(meta))


def peak_mib() -> float:
    """The most main memory that this process had, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def current_mib() -> float:
    """The main memory that it has now: a peak of before would hide what comes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def corpus_cost(num_documents: int) -> dict[str, float]:
    """Seconds until the first rows, microseconds a row, memory above an empty program's."""
    tokenizer = load_tokenizer("model")
    with tempfile.TemporaryDirectory() as folder:
        writer = multiprocessing.get_context("spawn").Process(
            target=write_corpus, args=(Path(folder), num_documents)
        )
        writer.start()
        writer.join()
        empty, since = current_mib(), time.perf_counter()
        data = PretrainDataset(TokenCache.open(folder), tokenizer, 512)
        ready = time.perf_counter() - since
        at_start = peak_mib() - empty
        rows = torch.randint(len(data), (40, 32)).tolist()
        since = time.perf_counter()
        for batch in rows:
            data.__getitems__(batch)
        per_row = (time.perf_counter() - since) / 40 / 32
    return {"seconds to open": ready, "MiB to open": at_start, "microseconds a row": per_row * 1e6}


def update_cost(batch_size: int, hidden_size: int, length: int, device: str) -> dict[str, float]:
    """Milliseconds of one update's forward, backward and optimizer, and memory."""
    keep_freed_memory()
    torch.manual_seed(0)
    empty = current_mib()
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size, 4)).to(device)
    optimizer = build_optimizer(model, 1e-3)
    ids = torch.randint(3, 6400, (batch_size, length), device=device)
    starts = (torch.arange(length, device=device) // 50 * 50).expand(batch_size, -1)
    dtype, milliseconds = getattr(torch, default_dtype(device)), []
    for _ in range(9):
        since = time.perf_counter()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(ids, labels=ids, document_starts=starts).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
        milliseconds.append((time.perf_counter() - since) * 1000)
    memory = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_mib() - empty
    median = statistics.median(milliseconds[2:])
    per_token = median / batch_size / length * 1000
    return {"milliseconds": median, "microseconds a token": per_token, "MiB": memory}


def sent_over_loopback() -> int:
    """Bytes that this machine has sent to itself."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    fields = next(line.split(":")[1].split() for line in lines if line.strip().startswith("lo:"))
    return int(fields[8])


def exchange_cost(num_ranks: int) -> dict[str, float]:
    """MiB that all ranks together send in an update, on gloo, against the model's size."""
    sent = []
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        with corpus.open("w", encoding="utf-8") as file:
            for i in range(400):
                file.write(json.dumps({"text": f"a document of some words {i} " * 20}) + "\n")
        for epochs in (1, 2):
            flags = {
                "preset": "demo",
                "device": "cpu",
                "data_path": corpus,
                "epochs": epochs,
                "optimizer": "adamw",
                "overwrite": 1,
                "heldout_fraction": 0,
                "save_interval": 10**9,
                "eval_interval": 10**9,
                "log_interval": 10**9,
                "cache_dir": f"{folder}/cache",
                "save_dir": f"{folder}/out",
                "checkpoint_dir": f"{folder}/checkpoints",
            }
            run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            run += [f"--nproc_per_node={num_ranks}", "train_pretrain.py", *words(flags)]
            before = sent_over_loopback()
            said = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout
            sent.append((sent_over_loopback() - before, said))
    (once, said), (twice, _) = sent
    updates = int(re.findall(r"in ([\d,]+) updates", said)[0].replace(",", ""))
    parameters = float(re.findall(r"model: ([\d.]+)M parameters", said)[0]) * 1e6
    num_bytes = (twice - once) / updates
    return {"MiB an update": num_bytes / 2**20, "gradients in float32": num_bytes / 4 / parameters}


COSTS = {"corpus": corpus_cost, "update": update_cost, "exchange": exchange_cost}


def child(pipe: Connection, what: str, arguments: dict) -> None:
    """Send one measurement."""
    pipe.send(COSTS[what](**arguments))


def measured(what: str, **arguments: object) -> dict[str, float]:
    """One measurement, in a process of its own."""
    (found,) = reports(what, child, what, arguments)
    return found


def table(what: str, name: str, cases: list[dict]) -> None:
    """Print one line a case, with how often the smallest case's cost it is."""
    print(f"\n| {name} | ", end="")
    first: dict[str, float] = {}
    for case in cases:
        found = measured(what, **case)
        if not first:
            first = found
            print(" | ".join(f"{key} | times" for key in found) + " |")
            print("|---" * (1 + 2 * len(found)) + "|")
        shown = " | ".join(
            f"{v:,.2f} | " + (f"{v / first[k]:,.1f}" if first[k] >= 0.01 else "")
            for k, v in found.items()
        )
        print(f"| {case[name]:,} | {shown} |", flush=True)


def main() -> None:
    """Measure, and print the tables."""
    cli = parser(__doc__)
    cli.set_defaults(device="cpu")
    cli.add_argument("--largest_corpus", type=int, default=10**7, help="documents")
    args = cli.parse_args()
    print(surroundings(args, "bench.growth"))
    default = {"batch_size": 8, "hidden_size": 256, "length": 128}
    values = {"batch_size": (4, 8, 16, 32), "hidden_size": (128, 256, 512)}
    for name, several in (values | {"length": (64, 128, 256, 512)}).items():
        cases = [default | {name: value, "device": args.device} for value in several]
        table("update", name, cases)
    table("exchange", "num_ranks", [{"num_ranks": num} for num in (1, 2, 3, 4)])
    sizes = [size for size in (10**4, 10**5, 10**6, 10**7) if size <= args.largest_corpus]
    table("corpus", "num_documents", [{"num_documents": size} for size in sizes])


if __name__ == "__main__":
    main()
