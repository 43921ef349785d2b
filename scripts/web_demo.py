"""Continue prompts in the browser, as eval_llm.py does in the terminal.

    pip install gradio
    python -m scripts.web_demo    # the weights in out/, at http://localhost:7860
    python -m scripts.web_demo --weight pretrain --hidden_size 768 --port 8080

It accepts local connections only. For a remote machine: ssh -L 7860:localhost:7860 user@machine
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

TIMEOUT_SECONDS = 300  # a model that takes longer for one token has failed


class Continuer:
    """Continues prompts with one model, which all open pages share."""

    def __init__(self, model: QwenModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def text(
        self, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int
    ) -> Iterator[str]:
        """The prompt and its continuation so far, after each new piece of text."""
        stopped, failed = threading.Event(), []
        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=TIMEOUT_SECONDS
        )
        ids = encode_prompt(self.tokenizer, prompt).to(self.model.device)

        def generate() -> None:
            setup_seed(seed)
            try:
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    streamer=streamer,
                    stopping_criteria=[lambda *_: stopped.is_set()],
                    **eval_llm.sampling(temperature, top_p),
                )
            except Exception as error:  # raised again below: the page does not see this thread
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=generate)
        thread.start()
        text = prompt
        try:
            for piece in streamer:
                text += piece
                yield text
        finally:  # also if the page is closed or its stop button is pressed
            stopped.set()
            thread.join()
        if failed:
            raise failed[0]


def build_page(continuer: Continuer) -> Any:
    """The page, as ``gradio.Blocks``. Raises: SettingsError if gradio is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio would report its use
    try:
        import gradio
    except ImportError:
        raise SettingsError("the page needs gradio: pip install gradio") from None
    config = continuer.model.config
    with gradio.Blocks(title="MiniMind") as page:
        gradio.Markdown(
            f"## MiniMind\nA pretrained model of width {config.hidden_size} and "
            f"{config.num_hidden_layers} layers. It continues text; it was not trained to chat."
        )
        prompt = gradio.Textbox(label="Prompt", value=next(iter(eval_llm.PROMPTS)), lines=2)
        with gradio.Row():
            settings = [
                gradio.Slider(1, 512, value=100, step=1, label="Maximum tokens"),
                gradio.Slider(0, 2, value=eval_llm.TEMPERATURE, label="Temperature (0: greedy)"),
                gradio.Slider(0.05, 1, value=0.9, label="Top p"),
                gradio.Number(42, precision=0, label="Seed"),
            ]
        with gradio.Row():
            start = gradio.Button("Continue", variant="primary")
            stop = gradio.Button("Stop")
        text = gradio.Textbox(label="Text", lines=10, interactive=False)
        inputs = [prompt, *settings]
        running: list[dict] = [
            event(continuer.text, inputs, text) for event in (start.click, prompt.submit)
        ]
        stop.click(None, cancels=running)
    return page


def build_parser() -> Parser:
    """The parser of all flags; those that select a model are eval_llm.py's."""
    parser = Parser(__doc__)
    add = eval_llm.add_weight_flags(parser).add_argument
    add("--device", default=eval_llm.default_device(), help="cuda, mps or cpu")
    add("--port", type=int, default=7860, help="port of the page")
    return parser


def serve(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = generating_model(eval_llm.load_model(args, tokenizer))
    page = build_page(Continuer(model, tokenizer))
    page.queue(default_concurrency_limit=1)  # pages take turns with the model
    page.launch(server_name="127.0.0.1", server_port=args.port)


def main(argv: list[str] | None = None) -> int:
    """Returns: the exit status, 0 on success, 6 if the port is taken, or see trainer/errors.py."""
    return run_program(lambda: serve(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
