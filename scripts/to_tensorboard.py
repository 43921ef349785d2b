"""Write the metrics of runs as TensorBoard's event files, a curve for each number.

pip install tensorboard
python -m scripts.to_tensorboard out/*_metrics.jsonl    # -> out/tensorboard/<name>/
tensorboard --logdir out/tensorboard
"""

import sys
from pathlib import Path

from scripts.plot import PlotError, read
from trainer.command_line import Parser


def main(argv: list[str] | None = None) -> int:
    """Returns: the exit status, 0 on success, else 1."""
    parser = Parser(__doc__)
    parser.add_argument("metrics", nargs="+", type=Path, help="<save_dir>/*_metrics.jsonl")
    args = parser.parse_args(argv)
    try:
        from torch.utils.tensorboard import SummaryWriter

        for path in args.metrics:
            folder = path.with_name("tensorboard") / path.stem.removesuffix("_metrics")
            records = read(path)
            with SummaryWriter(folder, purge_step=0) as writer:  # what an earlier call wrote
                for record in records:
                    for name in [k for k, v in record.items() if isinstance(v, int | float)]:
                        writer.add_scalar(name, record[name], record["step"])
            print(f"{path}: {len(records):,} records written to {folder}")
        return 0
    except ImportError:
        print("event files need tensorboard: pip install tensorboard", file=sys.stderr)
    except (PlotError, OSError) as error:
        print(error, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
