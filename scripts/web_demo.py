"""Continue prompts in the browser, as eval_llm.py does in the terminal, or talk with a model.

    pip install gradio
    python -m scripts.web_demo    # the weights in out/, at http://localhost:7860
    python -m scripts.web_demo --weight pretrain --hidden_size 768 --port 8080
    python -m scripts.web_demo --weight full_sft    # a conversation

It accepts local connections only. For a remote machine: ssh -L 7860:localhost:7860 user@machine
"""

import argparse
import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

import eval_llm
from model.generation import QwenModel, generating_model
from trainer.command_line import Parser
from trainer.device import setup_seed
from trainer.errors import SettingsError
from trainer.program import run_program
from trainer.samples import encode_prompt, encode_question
from trainer.weights import load_tokenizer

HISTORY = 8  # turns of both that the model sees again
TIMEOUT_SECONDS = 300  # a model that takes longer for one token has failed
MAX_CHARACTERS = 2**18  # of a prompt; more would take seconds to be tokenized, and then not fit
HOSTS = ["localhost", "127.0.0.1", "[::1]"]  # names by which a browser may ask for the page


class Continuer:
    """Continues prompts with one model, which all open pages share."""

    def __init__(self, model: QwenModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def encoded(
        self, prompt: str, max_new_tokens: int, before: list[dict] | None = None
    ) -> torch.Tensor:
        """(1, T) int64: what ``text`` continues. Raises: SettingsError if it is too long."""
        num_characters = len(prompt) + sum(len(turn["content"]) for turn in before or ())
        if num_characters > MAX_CHARACTERS:
            raise SettingsError(
                f"The prompt has {num_characters:,} characters, expected at most "
                f"{MAX_CHARACTERS:,}. Shorten it."
            )
        if before is None:
            ids = encode_prompt(self.tokenizer, prompt)
        else:
            ids = encode_question(self.tokenizer, prompt, before)
        num_tokens, most = ids.shape[1], self.model.config.max_position_embeddings
        if num_tokens + max_new_tokens > most:
            raise SettingsError(
                f"The prompt has {num_tokens:,} tokens, which with {max_new_tokens:,} new ones is "
                f"more than the {most:,} that the model can hold. Shorten it, or ask for fewer."
            )
        return ids

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
        ``before`` it are given, the answer so far.

        Raises: SettingsError if they are too long for the model, or the seed is no number."""
        prompt, seed = prompt or "", checked_seed(seed)
        ids = self.encoded(prompt, max_new_tokens, before).to(self.model.device)
        stopped, failed = threading.Event(), []
        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=TIMEOUT_SECONDS
        )

        def generate() -> None:
            try:
                setup_seed(seed)
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


def checked_seed(seed: Any) -> int:
    """The seed that a visitor gave, in the range of every generator; 0 if the field is empty.

    Raises: SettingsError if it is no number."""
    try:
        return int(seed or 0) % 2**63
    except (ValueError, TypeError, OverflowError):
        raise SettingsError(f"The seed is {seed!r:.40}, expected a whole number.") from None


def import_gradio() -> Any:
    """gradio, told not to report its use. Raises: SettingsError if it is not installed.

    Its environment variables are removed, since some of them open the page to other machines, or
    files of this one to the page, whatever ``launch`` is told."""
    for name in list(os.environ):
        if name.startswith("GRADIO_") and name != "GRADIO_TEMP_DIR":
            del os.environ[name]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError:
        raise SettingsError("the page needs gradio: pip install gradio") from None
    return gradio


def refusing(gradio: Any, work: Callable[..., Iterator[str]]) -> Callable[..., Iterator[str]]:
    """``work``, whose refusals are the visitor's alone: no traceback in the terminal."""

    @functools.wraps(work)
    def run(*inputs: Any) -> Iterator[str]:
        try:
            yield from work(*inputs)
        except SettingsError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    return run


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
        refusing(gradio, answer),
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
            event(refusing(gradio, continuer.text), inputs, text)
            for event in (start.click, prompt.submit)
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
    if not 0 < args.port < 2**16:
        raise SettingsError(f"--port is {args.port}, expected 1 to 65,535.")
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = generating_model(eval_llm.load_model(args, tokenizer))
    chat = eval_llm.is_chat(args)
    page = (build_chat if chat else build_page)(Continuer(model, tokenizer))
    page.queue(default_concurrency_limit=1)  # pages take turns with the model
    from starlette.middleware import Middleware  # which gradio is built on
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # Another name means that a site elsewhere made its own name point here (DNS rebinding).
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)
    page.launch(
        server_name="127.0.0.1",
        server_port=args.port,
        share=False,
        show_error=True,
        app_kwargs={"middleware": [trusted]},
    )


def main(argv: list[str] | None = None) -> int:
    """Returns: the exit status, 0 on success, 6 if the port is taken, or see trainer/errors.py."""
    return run_program(lambda: serve(build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
