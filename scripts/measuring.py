"""What the programs that measure have in common."""

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from model import model_minimind

ROOT = Path(__file__).resolve().parents[1]


def surroundings(args: argparse.Namespace, script: str) -> str:
    """What a reader needs to measure the same again."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    if args.device.startswith("cuda"):
        name = torch.cuda.get_device_name(torch.device(args.device))
    words = " ".join(["python", script, *sys.argv[1:]])
    return (
        f"`{words}`, {time.strftime('%Y-%m-%d')}, {name}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, commit `{commit}`"
    )


def initialised(change: Callable[[str, nn.Parameter, int], None]) -> None:
    """From now on models begin with weights changed so, by name and number of layers."""
    first = model_minimind.MiniMindForCausalLM.__init__

    @torch.no_grad()
    def init(self: model_minimind.MiniMindForCausalLM, *args: object) -> None:
        first(self, *args)
        for name, parameter in self.named_parameters():
            change(name, parameter, self.config.num_hidden_layers)

    model_minimind.MiniMindForCausalLM.__init__ = init


def is_output(name: str) -> bool:
    """Whether a matrix writes into the residual stream."""
    return "o_proj" in name or "down_proj" in name


def drawn_outputs(name: str, parameter: nn.Parameter, num_layers: int) -> None:
    """As any other matrix."""
    if is_output(name):
        nn.init.normal_(parameter, std=0.02)
