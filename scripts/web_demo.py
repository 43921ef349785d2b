"""Continue prompts in the browser, as eval_llm.py does in the terminal, or talk with a model.

    pip install gradio
    python -m scripts.web_demo    # the weights in out/, at http://localhost:7860
    python -m scripts.web_demo --weight pretrain --hidden_size 768 --port 8080
    python -m scripts.web_demo --weight full_sft    # a conversation

It accepts local connections only. For a remote machine: ssh -L 7860:localhost:7860 user@machine
"""

import argparse
import inspect
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
from trainer.flags import Parser
from trainer.program import run_program
from trainer.samples import encode_prompt, encode_question
from trainer.weights import load_tokenizer

HISTORY = 8  # turns of both that the model sees again
TIMEOUT_SECONDS = 300  # a model that takes longer for one token has failed


class Continuer:
    """Continues prompts with one model, which all open pages share."""

    def __init__(self, model: QwenModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def text(
        self,
        prompt: str,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        before: list[dict] | None = None,
    ) -> Iterator[str]:
        """The prompt and its continuation so far, after each new piece of text; or if the turns
        ``before`` it are given, the answer so far."""
        stopped, failed = threading.Event(), []
        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=TIMEOUT_SECONDS
        )
        if before is None:
            ids = encode_prompt(self.tokenizer, prompt)
        else:
            ids = encode_question(self.tokenizer, prompt, before)
        ids = ids.to(self.model.device)

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
        text = prompt if before is None else ""
        try:
            for piece in streamer:
                text += piece
                yield text
        finally:  # also if the page is closed or its stop button is pressed
            stopped.set()
            thread.join()
        if failed:
            raise failed[0]


def import_gradio() -> Any:
    """gradio, told not to report its use. Raises: SettingsError if it is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise SettingsError("the page needs gradio: pip install gradio") from None
    return gradio


def sampling_inputs(gradio: Any) -> list[Any]:
    """What a visitor can set, in the order of ``Continuer.text``."""
    return [
        gradio.Slider(1, 512, value=100, step=1, label="Maximum tokens"),
        gradio.Slider(0, 2, value=eval_llm.TEMPERATURE, label="Temperature (0: greedy)"),
        gradio.Slider(0.05, 1, value=0.9, label="Top p"),
        gradio.Number(42, precision=0, label="Seed"),
    ]


def build_chat(continuer: Continuer) -> Any:
    """The page for models that answer. Raises: SettingsError if gradio is not installed."""
    gradio = import_gradio()

    def answer(question: str, history: list[dict], *settings: Any) -> Iterator[str]:
        before = [{"role": turn["role"], "content": written(turn["content"])} for turn in history]
        yield from continuer.text(question, *settings, before=before[-HISTORY:])

    # Before version 6, gradio had to be told the form of the history.
    told = "type" in inspect.signature(gradio.ChatInterface).parameters
    config = continuer.model.config
    return gradio.ChatInterface(
        answer,
        title="MiniMind",
        description=f"A fine-tuned model of width {config.hidden_size} and "
        f"{config.num_hidden_layers} layers.",
        examples=[[question] for question in list(eval_llm.QUESTIONS)[:4]],
        additional_inputs=sampling_inputs(gradio),
        cache_examples=False,
        **({"type": "messages"} if told else {}),
    )


def written(content: Any) -> str:
    """The text of a turn, which gradio may have cut into parts."""
    parts = content if isinstance(content, list) else [content]
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in parts)


def build_page(continuer: Continuer) -> Any:
    """The page, as ``gradio.Blocks``. Raises: SettingsError if gradio is not installed."""
    gradio = import_gradio()
    config = continuer.model.config
    with gradio.Blocks(title="MiniMind") as page:
        gradio.Markdown(
            f"## MiniMind\nA pretrained model of width {config.hidden_size} and "
            f"{config.num_hidden_layers} layers. It continues text; it was not trained to chat."
        )
        prompt = gradio.Textbox(label="Prompt", value=next(iter(eval_llm.PROMPTS)), lines=2)
        with gradio.Row():
            settings = sampling_inputs(gradio)
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
    chat = eval_llm.is_chat(args)
    page = (build_chat if chat else build_page)(Continuer(model, tokenizer))
    page.queue(default_concurrency_limit=1)  # pages take turns with the model
    page.launch(server_name="127.0.0.1", server_port=args.port)


def main(argv: list[str] | None = None) -> int:
    """Returns: the exit status, 0 on success, 6 if the port is taken, or see trainer/errors.py."""
    return run_program(lambda: serve(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
