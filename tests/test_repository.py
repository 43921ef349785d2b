"""What the repository promises of itself: flags, layers, commands, sample."""

import ast
import contextlib
import hashlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval_llm
import train_pretrain
from dataset import make_sample
from dataset.records import read_documents
from model.model_minimind import MiniMindConfig
from scripts import import_map
from tests.helpers import ROOT
from tests.running import MEMORIZE_FLAGS, fact_documents, run_command, short_documents, write_corpus
from trainer.command_line import parse_flags
from trainer.device import default_dtype, default_residual_dtype, supports_dtype
from trainer.flags import PRETRAIN

README = (ROOT / "README.md").read_text(encoding="utf-8")
DEFAULTS = {  # MiniMind's names, and ours
    "preset": "64m",
    "hidden_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": None,
    "dropout": 0.0,
    "use_moe": 0,
    "tokenizer_path": "model",
    "from_weight": "none",
    "data_path": ["dataset/pretrain_t2t_mini.jsonl"],
    "text_column": "text",
    "max_seq_len": 512,
    "packing": 1,
    "heldout_fraction": 0.005,
    "num_workers": 0,
    "cache_dir": "dataset/cache",
    "epochs": 1,
    "batch_size": 32,
    "accumulation_steps": 8,
    "learning_rate": 5e-4,
    "micro_batch_size": None,
    "strict_fast_path": 0,
    "recipe": "minimind",
    "optimizer": "adamw",
    "lr_schedule": "cosine",
    "warmup_ratio": 0.0,
    "decay_ratio": 0.4,
    "max_minutes": None,
    "price_per_hour": None,
    "dry_run": 0,
    "anneal_from": None,
    "grad_clip": 1.0,
    "tie_word_embeddings": 1,
    "embedding_init": "random",
    "look_back_heads": 0,
    "embedding_lr_scale": 1.0,
    "head_lr_scale": 1.0,
    "vector_lr_scale": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "muon_momentum": 0.95,
    "muon_beta2": 0.0,
    "muon_period": 1,
    "weight_decay": 0.1,
    "seed": 42,
    "max_bad_updates": 20,
    "bad_records": "stop",
    "timeout": 600,
    "checkpoint_mirror": None,
    "keep_states": 2,
    "resume_step": None,
    "skip_steps": None,
    "save_dir": "out",
    "save_weight": "pretrain",
    "checkpoint_dir": "checkpoints",
    "save_interval": 1000,
    "from_resume": 0,
    "overwrite": 0,
    "log_interval": 10,
    "eval_interval": 250,
    "eval_tokens": 2**18,
    "use_wandb": False,
    "wandb_project": "MiniMind-Pretrain",
}


def test_flags_and_defaults_are_the_promised_ones() -> None:
    args = vars(parse_flags([]))
    assert args.pop("program") == PRETRAIN
    device = args.pop("device")
    assert args.pop("use_compile") == int(device == "cuda")
    dtype = args.pop("dtype")
    assert dtype == default_dtype(device)
    assert args.pop("residual_dtype") == default_residual_dtype(device, dtype)
    assert args == DEFAULTS


def test_products_are_in_bfloat16_except_on_a_cpu_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for found, dtype in (({}, "float32"), ({"avx512_bf16": True}, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found, raising=False)
        assert parse_flags(["--device", "cpu"]).dtype == dtype
    assert parse_flags(["--device", "cpu", "--dtype", "float16"]).dtype == "float16"


def test_a_card_without_bfloat16_computes_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock of torch's answers: there is no such card here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for supported, dtype in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s
        )
        assert default_dtype("cuda") == default_dtype("cuda:1") == dtype


def test_the_stream_is_narrow_where_products_are_and_it_is_faster() -> None:
    assert default_residual_dtype("cuda:1", "bfloat16") == "bfloat16"
    for others in (("cuda", "float16"), ("cuda", "float32"), ("cpu", "bfloat16")):
        assert default_residual_dtype(*others) == "float32"


def test_a_device_is_asked_whether_it_computes_in_a_type() -> None:
    assert supports_dtype("cpu", torch.bfloat16) and supports_dtype("cpu", torch.float32)
    assert not supports_dtype("cpu", torch.bool)
    assert default_dtype("mps") in ("bfloat16", "float32")


def test_flags_have_minimind_s_other_names() -> None:
    args = parse_flags(["--lr", "0.1", "--max_length", "77"])
    assert (args.learning_rate, args.max_seq_len) == (0.1, 77)


def test_a_flag_overrides_its_preset_wherever_it_stands() -> None:
    for words in (["--epochs", "9", "--preset", "demo"], ["--preset", "demo", "--epochs", "9"]):
        args = parse_flags(words)
        assert (args.epochs, args.hidden_size) == (9, 256)


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("demo", (256, 4, 8, 4, 832, False)),
        ("26m", (512, 8, 8, 2, 1408, False)),
        ("64m", (768, 8, 8, 4, 2432, False)),
        ("104m", (768, 16, 8, 2, 2048, False)),
        ("moe", (768, 8, 8, 4, 2432, True)),
    ],
)
def test_presets_have_the_promised_sizes(preset: str, sizes: tuple) -> None:
    tokenizer = train_pretrain.load_tokenizer("model")
    args = parse_flags(["--preset", preset])
    config = train_pretrain.build_config(args, tokenizer)
    assert isinstance(config, MiniMindConfig) and config.vocab_size == 6400
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "intermediate_size", "use_moe")
    assert tuple(getattr(config, name) for name in names) == sizes


def test_the_demo_s_recipe_is_the_one_whose_losses_the_bands_hold() -> None:
    """Each setting decides what is learnt; docs/bands/demo.json was made with these."""
    demo = {
        "data_path": ["dataset/pretrain_sample.jsonl"],
        "heldout_fraction": 0.02,
        "max_seq_len": 128,
        "batch_size": 8,
        "accumulation_steps": 1,
        "optimizer": "muon",
        "learning_rate": 5e-3,
        "lr_schedule": "wsd",
        "warmup_ratio": 0.05,
        "decay_ratio": 0.9,
        "epochs": 4,
        "log_interval": 50,
        "eval_interval": 500,
        "save_interval": 500,
    }
    args = vars(parse_flags(["--preset", "demo", "--device", "cpu"]))
    machine = {"preset", "device", "dtype", "residual_dtype", "use_compile"}
    machine |= {"hidden_size", "num_hidden_layers", "program"}
    assert {k: v for k, v in args.items() if k not in machine} == {
        k: v for k, v in (DEFAULTS | demo).items() if k not in machine
    }


def imported_packages(source: str) -> set[str]:
    """Top-level names of every absolute import."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    froms = [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.level == 0]
    return {name.split(".")[0] for name in plain + froms}


ALLOWED = {"model": {"model"}, "dataset": {"dataset"}, "trainer": {"trainer", "model"}}
PROGRAMS = ("scripts", "bench")  # they may import all of these


def source_files() -> list[Path]:
    folders = [ROOT / name for name in (*ALLOWED, *PROGRAMS)]
    inside = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    return [*sorted(ROOT.glob("*.py")), *inside]


def test_arrows_between_packages_point_one_way() -> None:
    packages = {*ALLOWED, *PROGRAMS, "train_pretrain", "eval_llm", "tests"}
    for package, allowed in ALLOWED.items():
        for file in (ROOT / package).rglob("*.py"):
            used = imported_packages(file.read_text(encoding="utf-8")) & packages
            faces_outward = {"dataset"} if file.name == "trainer_utils.py" else set()
            assert used <= allowed | faces_outward, file


def test_nothing_inside_imports_the_door_with_minimind_s_names() -> None:
    for file in source_files():
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        modules = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
        assert "trainer.trainer_utils" not in modules, file


def test_only_declared_packages_are_imported() -> None:
    declared = {"torch", "transformers", "tqdm", "swanlab", "fsspec"}
    brought = {"tokenizers", "safetensors", "packaging"}  # by transformers, built on them
    ours = {*ALLOWED, *PROGRAMS, "train_pretrain", "train_full_sft", "eval_llm"}
    # Imported where they are used; nanochat by the program that measures it.
    optional = {"matplotlib", "gguf", "pyarrow", "backports", "gradio", "starlette", "nanochat"}
    future = {"compression"}  # of Python 3.14
    for file in source_files():
        source = file.read_text(encoding="utf-8")
        foreign = imported_packages(source) - set(sys.stdlib_module_names) - ours
        assert foreign <= declared | brought | optional | future, file
        plain = [n for n in ast.parse(source).body if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not imported_packages("\n".join(map(ast.unparse, plain))) & optional, file


def test_one_file_speaks_to_torch_distributed() -> None:
    pattern = re.compile(r"^\s*(import|from) torch\.distributed", flags=re.MULTILINE)
    found = [f for f in source_files() if pattern.search(f.read_text(encoding="utf-8"))]
    assert [file.name for file in found] == ["distributed.py"]


def root_of(node: ast.expr) -> str | None:
    """The name that an expression such as ``a.b[c].d`` starts from."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def changes_from_outside(source: str) -> list[str]:
    """Code that mentions sys.path or assigns to an attribute of something imported."""
    nodes = [*ast.walk(ast.parse(source))]
    imports = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name.split(".")[0] for n in imports for alias in n.names}

    def is_change(node: ast.AST) -> bool:
        if isinstance(node, ast.ImportFrom):
            return node.module == "sys" and "path" in {alias.name for alias in node.names}
        if isinstance(node, ast.Call):
            by_name = isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr")
            return by_name and root_of(node.args[0]) in imported
        if not isinstance(node, ast.Attribute):
            return False
        name = ast.unparse(node)
        assigned = isinstance(node.ctx, ast.Store | ast.Del) and root_of(node) in imported
        return name == "sys.path" or (assigned and name != "sys.excepthook")  # Python's own seam

    return [ast.unparse(node) for node in nodes if is_change(node)]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import sys\nsys.path.insert(0, 'here')", ["sys.path"]),
        ("from sys import path\npath.append('here')", ["from sys import path"]),
        ("import train_pretrain\ntrain_pretrain.train_step = print", ["train_pretrain.train_step"]),
        ("def f():\n    from trainer import muon as m\n    m.Muon.step = print", ["m.Muon.step"]),
        ("from trainer.run import Run\nRun.save, x = print, 1", ["Run.save"]),
        (
            "from trainer.run import Run\nsetattr(Run, 'save', print)",
            ["setattr(Run, 'save', print)"],
        ),
        ("import os, trainer.run\ndel trainer.run.Run\nos.environ['A'] = 'b'", ["trainer.run.Run"]),
        ("import sys\nfrom trainer.run import Run\nrun = Run()\nrun.model = sys.argv", []),
    ],
)
def test_a_change_from_outside_is_found(source: str, found: list[str]) -> None:
    assert changes_from_outside(source) == found


def test_no_program_changes_another_from_outside() -> None:
    assert ROOT / "bench" / "benchmark.py" in source_files()
    for file in source_files():
        assert changes_from_outside(file.read_text(encoding="utf-8")) == [], file


def commands(text: str) -> list[str]:
    """Lines of the README's shell blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_ci_runs_the_readme_s_test_command() -> None:
    command = "pip install -r requirements.txt -r requirements-dev.txt && pytest -n auto"
    assert command in commands("\n".join(README.splitlines()[:40]))
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_readme_s_first_command_trains_and_its_next_continues(tmp_path: Path) -> None:
    """As they stand there, on a model and facts so few that it learns them by heart in seconds."""
    lines = commands("\n".join(README.splitlines()[:40]))
    install, _, program = lines[0].partition(" && ")
    assert install == "pip install -r requirements.txt"
    places = {"save_dir": tmp_path / "out", "checkpoint_dir": tmp_path / "c", "cache_dir": tmp_path}
    part = write_corpus(tmp_path / "part.jsonl", [*fact_documents() * 20, *short_documents(60)])
    words = [f"--{k}={v}" for k, v in (places | {"data_path": part}).items()]
    done = run_command([sys.executable, *shlex.split(program)[1:], *MEMORIZE_FLAGS.split(), *words])
    assert done.returncode == 0, done.stderr
    assert "held out: loss" in done.stdout
    following = next(line for line in lines[1:] if "eval_llm.py" in line)
    words = shlex.split(following.split("#")[0])[1:]
    extra = [f"--save_dir={tmp_path / 'out'}", "--max_new_tokens=12", "--device=cpu"]
    done = run_command([sys.executable, *words, *extra])
    assert (done.returncode, done.stderr) == (0, "")
    for prompt, answer in eval_llm.PROMPTS.items():
        assert f"{prompt} {answer}." in done.stdout


def test_the_sample_is_what_its_script_writes(tmp_path: Path) -> None:
    written = tmp_path / "sample.jsonl"
    words = [sys.executable, "-m", "dataset.make_sample", "--output", str(written)]
    subprocess.run(words, check=True, cwd=ROOT, capture_output=True)
    shipped = ROOT / "dataset" / "pretrain_sample.jsonl"
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (written, shipped)}
    assert len(digests) == 1
    assert shipped == make_sample.DEFAULT_OUTPUT


def test_the_sample_is_varied_and_in_two_languages() -> None:
    path = ROOT / "dataset" / "pretrain_sample.jsonl"
    assert 1e6 <= path.stat().st_size <= 1.5e6
    documents = [text for text, _ in read_documents(path)]
    assert len(set(documents)) == len(documents)
    chinese = sum(len(re.findall(r"[\u4e00-\u9fff]", d)) * 3 for d in documents)
    assert 0.3 < chinese / sum(len(d.encode()) for d in documents) < 0.7


# ------------------------------------------------------------------------------- one evening


EVENING = [
    "train_pretrain.py",
    "model/config.py",
    "model/model_minimind.py",
    "dataset/lm_dataset.py",
    "trainer/run.py",
    "trainer/progress.py",
    "trainer/schedule.py",
    "trainer/optimizer.py",
    "trainer/evaluation.py",
]


def num_lines(*files: Path) -> int:
    """The lines of these files together."""
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def test_what_decides_what_is_learnt_is_read_in_one_evening() -> None:
    """Nine files, in the order of docs/CODE.md, each a section of it."""
    page = (ROOT / "docs/CODE.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \d\. .*\]\(\.\./(.*)\)$", page, flags=re.MULTILINE)
    assert headings == EVENING
    assert num_lines(*(ROOT / name for name in EVENING)) < 2000
    assert num_lines(ROOT / "tests" / "test_own_loss_mask.py") <= 80  # another kind of training
    assert "in fewer than 80 lines" in page
    assert page.count("- Change it for: ") == page.count("- Try: ") == len(EVENING)


def test_the_guard_has_at_most_a_thousand_lines() -> None:
    files = [*(ROOT / "trainer" / "guard").rglob("*.py")]
    assert len(files) > 1 and num_lines(*files) <= 1000


def test_only_the_programs_import_the_guard() -> None:
    """What an update reads or changes would work the same without it."""
    found = import_map.imports()
    users = {name for name, used in found.items() if any(".guard." in other for other in used)}
    users = {name for name in users if not name.startswith("trainer.guard.")}
    assert users == {"train_pretrain", "train_full_sft", "train_dpo", "bench.measuring"}


def test_imports_form_no_circle_and_the_figure_shows_them() -> None:
    page = (ROOT / "docs/CODE.md").read_text(encoding="utf-8")
    assert page == import_map.page_with(import_map.figure())


def test_a_circle_of_imports_is_named() -> None:
    with pytest.raises(SystemExit, match="circular imports among: a, b"):
        import_map.levels_of({"a": {"b"}, "b": {"a"}, "c": set()})
