"""Continue prompts in the browser, as eval_llm.py does in the terminal.

    pip install gradio
    python -m scripts.web_demo                       # the only weights in out/, at localhost:7860
    python -m scripts.web_demo --weight pretrain --hidden_size 768 --port 8080

It listens on this machine alone. From a rented one: ssh -L 7860:localhost:7860 user@machine
"""

import argparse
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

import eval_llm
from model.generation import QwenModel, generating_model
from trainer.device import setup_seed
from trainer.errors import SettingsError
from trainer.evaluation import encode_prompt
from trainer.flags import Parser
from trainer.program import run_program
from trainer.weights import load_tokenizer

WAIT_S = 300  # for the next token: a model that gives none for so long has failed


class Continuer:
    """One model, as ``generating_model`` gives it, which several pages ask in turn."""

    def __init__(self, model: QwenModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def text(
        self, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int
    ) -> Iterator[str]:
        """The prompt and what comes after it, longer with each piece."""
        stopped, failed = threading.Event(), []
        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=WAIT_S
        )
        ids = encode_prompt(self.tokenizer, prompt).to(self.model.device)

        def generate() -> None:
            setup_seed(seed)
            try:
                self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
                    streamer=streamer, stopping_criteria=[lambda *_: stopped.is_set()],
                    **eval_llm.sampling(temperature, top_p)
                )
            except Exception as error:  # for the page; nobody waits for this thread's own
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=generate)
        thread.start()
        text = prompt
        try:
            for piece in streamer:
                text += piece
                yield text
        finally:  # also when the page was closed, or its stop button pressed
            stopped.set()
            thread.join()
        if failed:
            raise failed[0]


def build_page(continuer: Continuer) -> Any:
    """The page. Raises: SettingsError without gradio."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it would tell its makers
    try:
        import gradio
    except ImportError:
        raise SettingsError("the page needs gradio: pip install gradio") from None
    config = continuer.model.config
    with gradio.Blocks(title="MiniMind") as page:
        gradio.Markdown(
            f"## MiniMind\nA pretrained model of width {config.hidden_size} and "
            f"{config.num_hidden_layers} layers. It continues texts; it was not taught to chat."
        )
        prompt = gradio.Textbox(label="Prompt", value=next(iter(eval_llm.PROMPTS)), lines=2)
        with gradio.Row():
            settings = [
                gradio.Slider(1, 512, value=100, step=1, label="Tokens at most"),
                gradio.Slider(0, 2, value=eval_llm.TEMPERATURE,
                              label="Temperature (0: the likeliest token)"),
                gradio.Slider(0.05, 1, value=0.9, label="Top p"),
                gradio.Number(42, precision=0, label="Seed"),
            ]
        with gradio.Row():
            begin = gradio.Button("Continue", variant="primary")
            stop = gradio.Button("Stop")
        text = gradio.Textbox(label="Text", lines=10, interactive=False)
        asked = [prompt, *settings]
        begun: list[dict] = [
            event(continuer.text, asked, text) for event in (begin.click, prompt.submit)
        ]
        stop.click(None, cancels=begun)
    return page


def build_parser() -> Parser:
    """Flags; those of the weights as in eval_llm.py."""
    parser = Parser(__doc__)
    add = eval_llm.add_weight_flags(parser).add_argument
    add("--device", default=eval_llm.default_device(), help="cuda, mps or cpu")
    add("--port", type=int, default=7860, help="of the page")
    return parser


def serve(args: argparse.Namespace) -> None:
    """Until Ctrl-C."""
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = generating_model(eval_llm.load_model(args, tokenizer))
    page = build_page(Continuer(model, tokenizer))
    page.queue(default_concurrency_limit=1)  # one model: pages take turns
    page.launch(server_name="127.0.0.1", server_port=args.port)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 flags, 4 weights, 6 the port is in use."""
    return run_program(lambda: serve(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
