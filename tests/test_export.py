"""scripts/export.py, checked with transformers, the gguf package and llama.cpp."""

import itertools
import json
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from model.model_minimind import MiniMindForCausalLM
from scripts import export
from tests.helpers import ROOT, shipped_tokenizer, tiny_model
from tests.running import run_command, train_in_process
from trainer import host
from trainer.samples import encode_prompt
from trainer.weights import read_config, read_weights, save_weights

DENSE_AND_MOE = pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
PROMPTS = [
    *("The capital of France is", "Once upon a time", "def add(a, b):", "In 1984,", "It's 3.5 °C"),
    *("中国的首都是", "水结成冰的温度是", "我有12个苹果", "《西游记》的作者", "今天天气"),
    *("a", "  two spaces", "new\nline", "tab\there", "emoji 🙂", "mixed 中文 text"),
    *("<|im_end|> inside", "ALL CAPITALS", "it's, they're", "naïve café"),
]


def saved(folder: Path, **changes: object) -> tuple[Path, MiniMindForCausalLM]:
    """A weights file, and the model in it."""
    sizes = {"vocab_size": 6400, "hidden_size": 64, "intermediate_size": 96}
    model = tiny_model(**sizes | {"max_position_embeddings": 256} | changes)
    path = folder / f"pretrain_64{'_moe' * model.config.use_moe}.pth"
    save_weights(path, model, {})
    model.load_state_dict(read_weights(path))  # rounded to float16, as in the file
    return path, model


def exported(folder: Path, to: str = "hf", *more: object, **changes: object) -> tuple[Path, object]:
    path, model = saved(folder, **changes)
    output = folder / "exported" / to
    words = ["--to", to, "--weight", path, "--output", output, *more]
    assert export.main([str(word) for word in words]) == 0
    return output, model


def greedy_continuation(model: MiniMindForCausalLM, prompt: str) -> list[int]:
    return export.greedy(model, encode_prompt(shipped_tokenizer(), prompt), 12)


# --------------------------------------------------------------------------------- transformers


@DENSE_AND_MOE
def test_plain_transformers_continues_twenty_prompts_as_the_model_does(
    tmp_path: Path, use_moe: bool
) -> None:
    folder, model = exported(tmp_path, use_moe=use_moe)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(theirs) is (Qwen3MoeForCausalLM if use_moe else Qwen3ForCausalLM)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    continuations = set()
    for prompt in PROMPTS:
        out = theirs.generate(
            **tokenizer(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False
        )
        ours = greedy_continuation(model, prompt)
        num_prompt = len(tokenizer(prompt)["input_ids"])
        assert out[0, num_prompt:].tolist() == ours, prompt
        continuations.add(tuple(ours))
    assert len(continuations) > 15, "a model with few distinct continuations would prove nothing"


@DENSE_AND_MOE
def test_the_folder_holds_settings_and_no_code(tmp_path: Path, use_moe: bool) -> None:
    folder, _ = exported(tmp_path, use_moe=use_moe)
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"),
    }
    config = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config and config["dtype"] == "float16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    assert not use_moe or config["num_experts"] == config["num_local_experts"] == 4
    generation = json.loads((folder / "generation_config.json").read_text())
    ids = [generation[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")]
    assert ids == [1, 2, 0]
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors, "the tied head is stored twice"
    assert not use_moe or "model.layers.1.mlp.experts.3.up_proj.weight" in tensors


def test_the_card_tells_how_the_weights_were_trained(tmp_path: Path) -> None:
    train_in_process(tmp_path, epochs=1, hidden_size=64)
    path = tmp_path / "out" / "pretrain_64.pth"
    run = json.loads(path.with_suffix(".json").read_text())["run"]
    words = ["--to", "hf", "--weight", str(path), "--output", str(tmp_path / "hf")]
    assert export.main(words) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    metadata = dict(line.split(": ") for line in card.split("---\n")[1].splitlines())
    assert metadata == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
    total = sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "hf").parameters()
    )
    assert f"# pretrain_64\n\nA Qwen3ForCausalLM with {total:,} parameters" in card
    for row in (
        f"| tokens with a loss | {run['tokens']:,} |",
        f"| updates | {run['step']} |",
        "| tokens per row | 32 |",
        f"| held-out loss | {run['heldout_loss']:.4g} |",
        f"| held-out bits per byte | {run['heldout_bits_per_byte']:.4g} |",
    ):
        assert f"\n{row}\n" in card
    assert "saw at most 32 tokens at once. `config.json` allows 32,768;" in card


@pytest.mark.parametrize("is_chat", [False, True])
def test_the_program_in_the_card_of_weights_of_unknown_origin_runs(
    tmp_path: Path, is_chat: bool
) -> None:
    path, _ = saved(tmp_path)
    path.with_suffix(".json").write_text('{"config": {}}' if is_chat else "[")
    card = export.model_card(path, saved(tmp_path / "again")[1], is_chat)
    assert "## Training" not in card
    folder, _ = exported(tmp_path)
    program = card.split("```")[1].removeprefix("python\n").replace("FOLDER", str(folder))
    done = run_command([sys.executable, "-c", program])  # as a reader runs it
    assert done.returncode == 0, done.stderr
    assert ("'role': 'assistant'" if is_chat else "The capital of France") in done.stdout


@DENSE_AND_MOE
def test_a_batch_of_prompts_continues_as_each_does_alone(tmp_path: Path, use_moe: bool) -> None:
    folder, model = exported(tmp_path, use_moe=use_moe)
    theirs, tokenizer = (
        auto.from_pretrained(folder) for auto in (AutoModelForCausalLM, AutoTokenizer)
    )
    prompts = [prompt for prompt in PROMPTS if "<|" not in prompt]
    out = theirs.float().generate(
        **tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=12, do_sample=False
    )
    for prompt, row in zip(prompts, out, strict=True):
        alone = greedy_continuation(model, prompt)
        assert row[-12:].tolist()[: len(alone)] == alone, prompt


def test_all_exported_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    """safetensors alone would make them readable by their owner only."""
    before = os.umask(0o022)
    try:
        folder, _ = exported(tmp_path)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o644}


@DENSE_AND_MOE
def test_export_and_import_change_no_bit(tmp_path: Path, use_moe: bool) -> None:
    folder, model = exported(tmp_path, use_moe=use_moe)
    words = ["--from", "hf", "--input", folder, "--save_dir", tmp_path / "back"]
    assert export.main([str(word) for word in words]) == 0
    path = tmp_path / "back" / f"imported_64{'_moe' * use_moe}.pth"
    state = read_weights(path)
    for name, weight in model.state_dict().items():
        assert state[name].equal(weight.half()), name
    config = read_config(path, state)
    for name in ("rope_theta", "num_experts_per_tok", "max_position_embeddings", "eos_token_id"):
        assert getattr(config, name) == getattr(model.config, name)


@DENSE_AND_MOE
def test_weights_tuned_in_transformers_can_be_imported(tmp_path: Path, use_moe: bool) -> None:
    folder, model = exported(tmp_path, use_moe=use_moe)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(6400, (2, 16), generator=torch.Generator().manual_seed(1))
    theirs(ids, labels=ids).loss.backward()
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "tuned")
    words = [
        "--from",
        "hf",
        "--input",
        tmp_path / "tuned",
        "--save_weight",
        "tuned",
        "--save_dir",
        tmp_path,
    ]
    assert export.main([str(word) for word in words]) == 0
    back, _ = saved(tmp_path / "other", use_moe=use_moe)
    path = tmp_path / f"tuned_64{'_moe' * use_moe}.pth"
    back = MiniMindForCausalLM(read_config(path, read_weights(path))).eval()
    back.load_state_dict(read_weights(path))
    with torch.no_grad():
        tuned, before = theirs.float()(ids).logits, model(ids).logits
        assert (back(ids).logits - tuned).abs().max() < 2e-2 < (before - tuned).abs().max()


def refused(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The error message, one line, of an export that is refused."""
    assert export.main([str(word) for word in words]) in (2, 4)
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1
    return line


def test_other_models_are_refused_with_the_setting_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    cases = {
        "model_type is 'qwen2'": Qwen2ForCausalLM(Qwen2Config(**sizes)),
        "attention_bias is True": Qwen3ForCausalLM(
            Qwen3Config(**sizes, attention_bias=True, tie_word_embeddings=True)
        ),
    }
    for number, (reason, model) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        line = refused(capsys, "--from", "hf", "--input", folder, "--save_dir", tmp_path / "out")
        assert reason in line
    assert not (tmp_path / "out").exists()


CONFIGS: dict[str, object] = {
    "num_labels": 10**8,  # is no part of a model like ours
    "_attn_implementation": "some/kernel",
    "hidden_size": 10**9,
    "num_hidden_layers": 10**7,
    "vocab_size": "many",
    "num_attention_heads": 0,
    "head_dim": None,
    "rms_norm_eps": [],
    "rope_parameters": 7,
    "model_type": ["qwen3"],
    "intermediate_size": -1,
    "eos_token_id": {},
    "max_position_embeddings": 0,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_crafted_configuration_is_refused_or_its_odd_entry_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    path, _ = saved(tmp_path)
    folder, out = tmp_path / "hf", tmp_path / "out"
    assert export.main(["--to", "hf", "--weight", str(path), "--output", str(folder)]) == 0
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: CONFIGS[name]}))
    capsys.readouterr()
    before = host.peak_memory()
    if name in ("num_labels", "_attn_implementation", "head_dim"):
        export.main(["--from", "hf", "--input", str(folder), "--save_dir", str(out)])
        assert capsys.readouterr().err.count("\n") <= 1
    else:
        refused(capsys, "--from", "hf", "--input", folder, "--save_dir", out)
    assert host.peak_memory() - before < 2**28


def test_weights_that_are_no_numbers_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, _ = exported(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        theirs.model.norm.weight[0] = torch.nan
    theirs.save_pretrained(folder)
    capsys.readouterr()
    line = refused(capsys, "--from", "hf", "--input", folder, "--save_dir", tmp_path / "out")
    assert "differ by nan" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[]", "7", "[" * 10**5, '{"model_type": "qwen3"}'])
def test_what_is_no_configuration_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, text: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    line = refused(capsys, "--from", "hf", "--input", tmp_path, "--save_dir", tmp_path / "out")
    assert f"--input {tmp_path}: " in line


def test_an_adapter_is_to_be_merged_first(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    line = refused(capsys, "--from", "hf", "--input", tmp_path, "--save_dir", tmp_path / "out")
    assert "holds an adapter of PEFT" in line and "merge_and_unload()" in line


def test_missing_and_existing_paths_are_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, _ = saved(tmp_path)
    assert "--output is missing" in refused(capsys, "--to", "hf", "--weight", path)
    assert "--input is missing" in refused(capsys, "--from", "hf")
    line = refused(capsys, "--to", "hf", "--weight", path, "--output", tmp_path)
    assert f"--output {tmp_path} exists" in line
    nowhere = tmp_path / "nowhere"
    assert str(nowhere) in refused(capsys, "--from", "hf", "--input", nowhere)
    folder = tmp_path / "hf"
    assert export.main(["--to", "hf", "--weight", str(path), "--output", str(folder)]) == 0
    line = refused(
        capsys,
        "--from",
        "hf",
        "--input",
        folder,
        "--save_dir",
        tmp_path,
        "--save_weight",
        "pretrain",
    )
    assert "pretrain_64.pth exists" in line


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_an_export_that_differs_is_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    path, _ = saved(tmp_path)
    write = export.write_hf

    def damaged(folder: Path, model: MiniMindForCausalLM, tokenizer: object) -> None:
        write(folder, model, tokenizer)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.down_proj.weight"] *= 1.5
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    if to == "hf":
        monkeypatch.setattr(export, "write_hf", damaged)
    else:
        gguf = pytest.importorskip("gguf")
        quantize = gguf.quantize
        monkeypatch.setattr(
            gguf, "quantize", lambda x, kind: quantize(x * 1.5 if x.shape == (64, 96) else x, kind)
        )
    line = refused(capsys, "--to", to, "--weight", path, "--output", tmp_path / "new" / "export")
    assert to == "gguf" or "error: the logits of the exported weights for" in line
    assert list((tmp_path / "new").iterdir()) == []


# ----------------------------------------------------------------------------------------- GGUF


@DENSE_AND_MOE
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_the_gguf_package_reads_every_tensor_and_token(
    tmp_path: Path, use_moe: bool, kind: str
) -> None:
    gguf = pytest.importorskip("gguf")
    path, model = exported(tmp_path, "gguf", "--gguf_type", kind, use_moe=use_moe)
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    arch = "qwen3moe" if use_moe else "qwen3"
    expected = {
        "general.architecture": arch,
        f"{arch}.block_count": 2,
        f"{arch}.context_length": 256,
        f"{arch}.embedding_length": 64,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.key_length": 16,
        f"{arch}.rope.freq_base": 1e6,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    expected |= {f"{arch}.expert_count": 4, f"{arch}.expert_used_count": 1} if use_moe else {}
    assert {name: fields[name] for name in expected} == expected
    described = json.loads(shipped_tokenizer().backend_tokenizer.to_str())
    vocabulary = dict(described["model"]["vocab"])
    vocabulary |= {token["content"]: token["id"] for token in described["added_tokens"]}
    assert {t: i for i, t in enumerate(fields["tokenizer.ggml.tokens"])} == vocabulary
    assert fields["tokenizer.ggml.merges"] == [" ".join(m) for m in described["model"]["merges"]]
    special = {token["id"] for token in described["added_tokens"] if token["special"]}
    kinds = fields["tokenizer.ggml.token_type"]
    assert {i for i, k in enumerate(kinds) if k == gguf.TokenType.CONTROL} == special
    weights = {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    ours, close = model.state_dict(), {"f16": 0.0, "q8_0": 0.01}[kind]
    stems = {
        "attn_q": "self_attn.q_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    stems |= {"ffn_gate_inp": "mlp.gate"} if use_moe else {"ffn_down": "mlp.down_proj"}
    for theirs, stem in stems.items():
        weight = weights[f"blk.1.{theirs}.weight"]
        torch.testing.assert_close(
            weight, ours[f"model.layers.1.{stem}.weight"], atol=close, rtol=0
        )
    if use_moe:
        up = weights["blk.1.ffn_up_exps.weight"]
        assert up.shape == (4, 96, 64)
        expert = ours["model.layers.1.mlp.experts.2.up_proj.weight"]
        torch.testing.assert_close(up[2], expert, atol=close, rtol=0)
    assert len(weights) == 2 + 2 * (12 if use_moe else 11)


@DENSE_AND_MOE
def test_transformers_computes_the_same_from_the_gguf_file(tmp_path: Path, use_moe: bool) -> None:
    for package in ("gguf", "accelerate"):
        pytest.importorskip(package)
    path, model = exported(tmp_path, "gguf", use_moe=use_moe)
    path = path.rename(path.with_name("model.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for prompt in PROMPTS:
        ours = encode_prompt(shipped_tokenizer(), prompt)[0].tolist()
        if "<|" not in prompt:  # added tokens are not read from GGUF, nor BOS by transformers 5.17
            assert tokenizer(prompt)["input_ids"] in (ours, ours[1:])
    sizes = {"head_dim": 16} | ({"moe_intermediate_size": 96} if use_moe else {})
    theirs = AutoModelForCausalLM.from_pretrained(  # not read from GGUF either: Qwen's defaults
        path.parent, gguf_file=path.name, dtype=torch.float32, **sizes
    ).eval()
    ids = torch.randint(6400, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-4, rtol=0)


@DENSE_AND_MOE
def test_llama_cpp_continues_as_the_model_does(tmp_path: Path, use_moe: bool) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    path, model = exported(tmp_path, "gguf", use_moe=use_moe)
    theirs = llama_cpp.Llama(str(path), n_ctx=128, verbose=False, logits_all=True)
    near = 0.05  # it computes in float16, so it may choose another of two almost equal tokens
    alike = 0
    for prompt in PROMPTS:
        ids = encode_prompt(shipped_tokenizer(), prompt)[0].tolist()
        assert theirs.tokenize(prompt.encode(), add_bos=True, special=True) == ids, prompt
        theirs.reset()
        theirs.eval(ids)
        with torch.no_grad():
            ours = model(torch.tensor([ids])).logits[0]
        logits = torch.from_numpy(theirs.scores[: len(ids)])
        torch.testing.assert_close(logits, ours, atol=near, rtol=0)
        generated = theirs.generate(ids, temp=0.0, repeat_penalty=1.0)
        continued = list(itertools.islice(generated, 12))
        with torch.no_grad():
            scores = model(torch.tensor([ids + continued])).logits[0, len(ids) - 1 : -1]
        of_theirs = scores.gather(1, torch.tensor(continued)[:, None])[:, 0]
        assert (scores.max(1).values - of_theirs < 2 * near).all(), prompt
        alike += continued == greedy_continuation(model, prompt)
    assert alike >= len(PROMPTS) - 4


def test_a_tokenizer_that_llama_cpp_cannot_represent_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("gguf")
    from scripts.export_gguf import pre_tokenizer_name
    from trainer.errors import SettingsError

    described = json.loads(shipped_tokenizer().backend_tokenizer.to_str())
    assert pre_tokenizer_name(described) == "smollm"
    _, byte_level = described["pre_tokenizer"]["pretokenizers"]
    assert pre_tokenizer_name(described | {"pre_tokenizer": byte_level}) == "gpt-2"
    for other in (None, {"type": "Whitespace"}, byte_level | {"use_regex": False}):
        with pytest.raises(SettingsError, match="no equivalent of this tokenizer"):
            pre_tokenizer_name(described | {"pre_tokenizer": other})
