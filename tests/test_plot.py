"""scripts/plot.py: curves show the metrics, and bands show whether a loss is right."""

import contextlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from scripts import to_tensorboard
from scripts.plot import PANELS, PlotError, band_of, compare, curve, draw, read

ROOT = Path(__file__).resolve().parents[1]


def records(offset: float = 0.0) -> list[dict]:
    """The metrics of a run of 30 updates, in the form that trainer/metrics.py writes."""
    found: list[dict] = []
    for step in (10, 20, 30):
        found.append(
            {
                "step": step,
                "epoch": 1,
                "rows": 8 * step,
                "tokens": 900 * step,
                "loss": 60 / step + offset,
                "lr": 1e-3 / step,
                "grad_norm": 0.5,
                "tokens_per_second": 1000 + step,
                "eta_minutes": 0.1,
            }
        )
        if step != 20:
            found.append(
                {
                    "step": step,
                    "heldout_loss": 70 / step + offset,
                    "heldout_bits_per_byte": 30 / step + offset,
                    "repeated_4grams": 0.25,
                    "continuations": {"a": "b"},
                }
            )
    return found


def write(path: Path, found: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in found))
    return path


def plot(*args: object, code: str = "") -> subprocess.CompletedProcess:
    words = [sys.executable, *(["-c", code] if code else ["-m", "scripts.plot"]), *map(str, args)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_run_on_pairs_is_drawn_by_pairs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pairs = {"tokens": "pairs", "tokens_per_second": "pairs_per_second"}
    found = [{pairs.get(key, key): value for key, value in r.items()} for r in records()]
    for record in found:
        if "heldout_loss" in record:
            del record["heldout_bits_per_byte"]
            record |= {"heldout_accuracy": 0.75, "heldout_margin": 1.5}
    figure = draw({"a": read(write(tmp_path / "a.jsonl", found))}, {})
    titles = [panel.get_title() for panel in figure.axes]
    assert titles[0] == "training loss (nats per pair)"
    assert titles[-2:] == [PANELS["heldout_accuracy"], PANELS["heldout_margin"]]
    assert "pairs per second, without padding" in titles
    assert figure.axes[-1].lines[0].get_xydata().tolist() == [[9000, 1.5], [27000, 1.5]]
    assert {panel.get_xlabel() for panel in figure.axes} == {"pairs seen"}


def test_a_figure_holds_what_the_metrics_say(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = {"a": read(write(tmp_path / "a.jsonl", records())), "b": records(0.5)}
    figure = draw(runs, band_of([records(), records(0.2)]))
    assert [panel.get_title() for panel in figure.axes] == list(PANELS.values())[:6]
    loss, held_out, rate = figure.axes[:3]
    assert loss.lines[0].get_xydata().tolist() == [[9000, 6.0], [18000, 3.0], [27000, 2.0]]
    assert loss.lines[1].get_xydata()[:, 1].tolist() == [6.5, 3.5, 2.5]
    assert held_out.lines[0].get_xydata().tolist() == [[9000, 3.0], [27000, 1.0]]
    assert rate.lines[0].get_xydata()[:, 1].tolist() == [1e-4, 5e-5, 1e-3 / 30]
    corners = loss.collections[0].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == pytest.approx((1.8, 6.4))


def test_a_forecast_is_drawn_with_its_range(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = records()
    for record in found:
        if record["step"] == 10 and "heldout_loss" in record:
            record |= {f"forecast_{k}": v for k, v in (("low", 1), ("expected", 2), ("high", 4))}
    held_out = draw({"a": read(write(tmp_path / "a.jsonl", found))}, {}).axes[1]
    assert [line.get_linestyle() for line in held_out.lines] == ["-", ":"]
    assert held_out.lines[1].get_xydata().tolist() == [[9000, 2.0]]
    corners = held_out.collections[0].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (1, 4)
    assert "forecast of the end" in [text.get_text() for text in held_out.get_legend().get_texts()]


def test_the_program_writes_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = plot(write(tmp_path / "pretrain_256_metrics.jsonl", records()))
    assert done.returncode == 0, done.stderr
    png = (tmp_path / "pretrain_256.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


def test_a_band_spans_its_runs_and_their_range_again(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{i}_metrics.jsonl", records(offset))
        for i, offset in enumerate((0.0, 0.1, 0.3))
    ]
    band = tmp_path / "band.json"
    assert plot(*paths, "--write_band", band).returncode == 0
    assert json.loads(band.read_text()) == {
        "loss": [[10, 5.7, 6.6], [20, 2.7, 3.6], [30, 1.7, 2.6]],
        "heldout_bits_per_byte": [[10, 2.7, 3.6], [30, 0.7, 1.6]],
    }


def test_points_outside_the_band_are_counted_and_the_first_is_named() -> None:
    band = band_of([records(), records(0.1)])
    assert compare(records(0.15), band) == [
        f"{PANELS['loss']}: 3 of 3 points lie in the band",
        f"{PANELS['heldout_bits_per_byte']}: 2 of 2 points lie in the band",
    ]
    assert compare(records(0.25), band)[0] == (
        f"{PANELS['loss']}: 0 of 3 points lie in the band; "
        f"the first outside: 6.2500 at update 10, band 5.9 to 6.2"
    )
    other = [r | {"step": r["step"] + 1} for r in records()]
    assert "reported no update of the band" in compare(other, band)[0]


def test_the_band_of_the_demo_has_all_its_evaluations() -> None:
    band = json.loads((ROOT / "docs/bands/demo.json").read_text())
    steps = [step for step, *_ in band["heldout_bits_per_byte"]]
    assert steps == [500, 1000, 1500, 1784] and len(band["loss"]) == 36
    assert all(low < high for key in band for _, low, high in band[key])


def test_an_evaluation_before_any_log_line_counts_no_tokens() -> None:
    early = [{"step": 5, "heldout_bits_per_byte": 3.0}, *records()]
    assert curve(early, "heldout_bits_per_byte") == ([0, 9000, 27000], [3.0, 3.0, 1.0])


@pytest.mark.parametrize("text", ["", "no json\n", "[1]\n", '{"loss": 1}\n', '{"step": 1}\n'])
def test_a_file_without_metrics_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a_metrics.jsonl"
    path.write_text(text)
    with pytest.raises(PlotError, match=r"a_metrics\.jsonl: "):
        read(path)


def test_without_matplotlib_one_line_says_what_to_install(tmp_path: Path) -> None:
    path = write(tmp_path / "a_metrics.jsonl", records())
    code = (
        "import sys; sys.modules['matplotlib'] = None; "
        "from scripts.plot import main; sys.exit(main())"
    )
    done = plot(path, code=code)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "plots need matplotlib: pip install matplotlib\n"


def test_a_missing_file_is_an_error_of_one_line(tmp_path: Path) -> None:
    done = plot(tmp_path / "none_metrics.jsonl")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "none_metrics.jsonl" in done.stderr


# ---------------------------------------------------------------------------------- tensorboard


def test_tensorboard_shows_each_number_once_however_often_it_is_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = write(tmp_path / "a_metrics.jsonl", records())
    for _ in range(2):
        assert to_tensorboard.main([str(path)]) == 0
    found = EventAccumulator(str(tmp_path / "tensorboard" / "a")).Reload()
    numbers = {key for r in records() for key, v in r.items() if isinstance(v, int | float)}
    assert set(found.Tags()["scalars"]) == numbers
    for key in ("loss", "heldout_bits_per_byte"):
        expected = [(r["step"], pytest.approx(r[key])) for r in records() if key in r]
        assert [(event.step, event.value) for event in found.Scalars(key)] == expected


def test_numbers_are_handed_to_tensorboard_s_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With a stand-in for the package."""
    written: list[tuple] = []

    class Writer(contextlib.nullcontext):
        def __init__(self, folder: Path, purge_step: int) -> None:
            super().__init__(self)
            assert (folder, purge_step) == (tmp_path / "tensorboard" / "a", 0)

        def add_scalar(self, *given: object) -> None:
            written.append(given)

    stand_in = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    path = write(tmp_path / "a_metrics.jsonl", records())
    assert to_tensorboard.main([str(path)]) == 0
    assert ("loss", 6.0, 10) in written and ("heldout_loss", 70 / 30, 30) in written
    assert all(isinstance(value, int | float) for _, value, _ in written)
    assert f"5 records written to {tmp_path / 'tensorboard' / 'a'}" in capsys.readouterr().out


def test_what_tensorboard_cannot_be_written_from_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert to_tensorboard.main([str(write(tmp_path / "a_metrics.jsonl", records()))]) == 1
    said = capsys.readouterr().err
    assert said == "event files need tensorboard: pip install tensorboard\n"
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=0)
    )
    assert to_tensorboard.main([str(write(tmp_path / "b.jsonl", []))]) == 1
    assert capsys.readouterr().err.count("\n") == 1
