"""The README: its commands run, its Chinese twin says the same, its links lead somewhere."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

import eval_llm
import train_dpo
import train_full_sft
import train_pretrain
from scripts import export, plot, prepare_data, train_tokenizer
from tests.helpers import ROOT, write_jsonl
from tests.running import MEMORIZE_FLAGS, fact_documents, short_documents
from tests.test_conversations import some_conversations, write
from tests.test_preferences import many_pairs
from trainer.command_line import build_parser

README, CHINESE = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md")
)
PAGES = ["README.md", "README_zh.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


def commands(text: str) -> list[str]:
    """Lines of the shell blocks, without what they say behind #."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def numbers(text: str) -> Counter:
    """All outside of code blocks and links' addresses."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    return Counter(re.findall(r"\d(?:[\d,.:]*\d)?", prose))


def sections(text: str) -> list[str]:
    return re.split(r"^## .*$", text, flags=re.MULTILINE)


def test_the_readme_is_as_long_as_promised() -> None:
    assert 150 <= len(README.splitlines()) <= 250


def test_the_chinese_readme_has_the_same_commands_and_numbers() -> None:
    assert commands(CHINESE) == commands(README)
    assert len(sections(CHINESE)) == len(sections(README)) > 8
    for chinese, english in zip(sections(CHINESE), sections(README), strict=True):
        assert numbers(chinese) == numbers(english), english[:80]
    in_code = [
        Counter(re.findall(r"`[^`\n]+`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))
        for text in (CHINESE, README)
    ]
    assert in_code[0].keys() - {"`batch_size x accumulation_steps x 进程数`"} <= in_code[1].keys()


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith("http"):
            assert (folder / link.partition("#")[0]).exists(), link


def test_every_flag_in_the_readme_exists() -> None:
    parsers = (build_parser(), eval_llm.build_parser(), export.build_parser())
    known = {option for parser in parsers for a in parser._actions for option in a.option_strings}
    known |= {"--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}
    known |= {"--max-restarts"}  # all of torchrun's
    known |= {"--vocab_size", "--max_megabytes", "--local-dir", "--repo-type", "--band", "--report"}
    assert set(re.findall(r"--\w[\w-]*", README)) <= known


# What a test cannot run as it stands, and which test runs the like.
ELSEWHERE = {
    "pip install -r requirements.txt": "test_repository, .ci/run",
    "python -m scripts.web_demo": "test_browser: it serves until it is stopped",
    "hf download": "nothing is fetched in a test",
    "torchrun": "test_ranks",
    "nohup": "test_signals",
    "sftp://": "test_mirror_run",
    "--interactive 1": "test_eval: it waits for input",
    "--preset moe": "198 M parameters; test_model",
}
SMALL = MEMORIZE_FLAGS + "--overwrite 1 --save_interval 50 --eval_interval 100 --eval_tokens 500"
MAINS = {
    "train_pretrain.py": (train_pretrain.main, SMALL),
    "train_full_sft.py": (
        train_full_sft.main,
        "--hidden_size 64 --device cpu --dtype float32 --overwrite 1 --epochs 1 "
        "--data_path chats.jsonl",
    ),
    "train_dpo.py": (
        train_dpo.main,
        "--hidden_size 64 --device cpu --dtype float32 --overwrite 1 --epochs 1 "
        "--data_path pairs.jsonl",
    ),
    "eval_llm.py": (eval_llm.main, "--max_new_tokens 12 --device cpu --temperature 0"),
    "scripts.export": (export.main, ""),
    "scripts.plot": (plot.main, ""),
    "scripts.prepare_data": (prepare_data.main, ""),
    "scripts.train_tokenizer": (train_tokenizer.main, "--vocab_size 400"),
}


def test_each_command_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As they stand there, one after another in one folder, on a model that takes seconds."""
    for package in ("gguf", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    for name in ("model", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    folders = ("dataset", "out", "checkpoints", "texts")
    for name in folders:
        (tmp_path / name).mkdir()
    (tmp_path / "dataset/pretrain_sample.jsonl").symlink_to(ROOT / "dataset/pretrain_sample.jsonl")
    for name in ("dataset/pretrain_t2t_mini", "my_texts", "corpus", "texts/a"):
        write_jsonl(tmp_path / f"{name}.jsonl", [*fact_documents() * 20, *short_documents(60)])
    write(tmp_path / "chats.jsonl", some_conversations(30))
    write(tmp_path / "pairs.jsonl", many_pairs(30))
    inline = re.findall(r"`(python -m [^`]+)`", README)
    lines = [*commands(README), *(line for line in inline if "python -m bench" not in line)]
    ran, continued = Counter(), ""
    for line in lines:
        if "train_pretrain.py --preset demo" in line:
            line = line.partition(" && ")[2] + " --data_path my_texts.jsonl"
        elif any(part in line for part in ELSEWHERE):
            continue
        words = shlex.split(line)[1:]
        name, *words = words[1:] if words[0] == "-m" else words
        main, more = MAINS[name]
        if "--band" in words:  # of the demo's own size
            words[0] = "out/pretrain_64_metrics.jsonl"
        if "--max_minutes" in words:
            words[words.index("--max_minutes") + 1] = "0.05"
            more += " --save_weight timed"
        if "--from" in words:
            (tmp_path / "exported").rename(tmp_path / "tuned")
        status = main([*words, *more.split()])
        printed = capsys.readouterr()
        assert not status, (line, printed.err)
        continued += printed.out if name == "eval_llm.py" else ""
        ran[name] += 1
    for prompt in ("The capital of France is", "中国的首都是", "水结成冰的温度是"):
        assert f"{prompt} {eval_llm.PROMPTS[prompt]}." in continued
    assert ran.keys() == MAINS.keys() and ran.total() >= 14, ran
    assert json.loads((tmp_path / "tuned/config.json").read_text())["model_type"] == "qwen3"
    made = {"out/pretrain_64.png", "out/tuned_64.pth", "pretrain.gguf", "out/timed_64.pth"}
    made |= {"my_tokenizer/tokenizer.json", "out/full_sft_64.pth"}
    assert all((tmp_path / name).exists() for name in made)
