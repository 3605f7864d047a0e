"""A second vision-language model, compressed to 3.5 bits and served with pictures: which answers it keeps.

The model is a LLaVA with SigLIP's tower, trained here for some minutes in front of the embedded LLaVA's
language model; it is kept in a directory, since it need not be trained again. Its decoder is compressed to
3.5 stored bits a weight, of which each matrix gets what a budget gives it, and for comparison to 3 bits
everywhere. Questions about pictures of held-out scenes are then answered word by word: by the original and
the compressed models in transformers, and by the export behind vLLM's server.

    python benchmarks/second_vlm.py --model out/tiny-llava-siglip
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from results_file import environment, markdown_table, write_results

if TYPE_CHECKING:
    from ercsvd_deploy.pipelines.judging.uncertainty import Estimate
    from ercsvd_deploy.pipelines.reporting.report.document import Report

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPE = Path("recipes/demo-llava.yaml")
BITS = 3.5
PLAIN_BITS = 3  # for comparison, everywhere
OFFERED = [2, 3, 4, 5, 6, 8]
GROUP = 64
SEED = 21
MOST_TOKENS = 48  # as many as serve_and_ask asks for
REQUESTS_AT_A_TIME = 4


@dataclass(frozen=True)
class Question:
    """A question about a picture, and the right answer."""

    picture: Path
    text: str
    answer: str


def train(directory: Path, minutes: float) -> None:
    """Train the model for so long on this machine, and write it."""
    command = [sys.executable, "-u", str(EXAMPLES / "train_tiny_llava.py"), "--tower", "siglip"]
    command += ["--start", str(EXAMPLES / "tiny-llava"), "--minutes", str(minutes), "--device", "cpu"]
    subprocess.run([*command, "--output", str(directory)], check=True)


def draw_questions(folder: Path, count: int) -> tuple[Path, list[Question]]:
    """Draw pictures of held-out scenes with a question each; return their file as well."""
    from make_pictures import write_conversations  # type: ignore[import-not-found]

    file: Path = write_conversations(
        folder, "drawn", random.Random(SEED), count=count, turns=1, held_out=True
    )
    questions = []
    for record in map(json.loads, file.read_text().splitlines()):
        asked, answered = (turn["value"] for turn in record["conversations"])
        questions.append(Question(folder / record["image"], asked.removeprefix("<image>\n"), answered))
    return file, questions


def compress(model: Path, questions: Path, export: Path, *, plain_bits: int | None = None) -> Report:
    """Run the demo's recipe for this model with integers alone.

    Args:
        model: The original model.
        questions: File of the questions.
        export: The directory to write.
        plain_bits: Bits of all matrices; None: those that a budget chooses.
    """
    from ercsvd_deploy.pipelines.flow import run_recipe
    from ercsvd_deploy.recipe.load import load_recipe

    changed = [
        f"model.path={model}",
        f"stages=[{{quantize: {{method: gptq, bits: {plain_bits or 4}, group_size: {GROUP}}}}}]",
        f"evaluation.visual_questions={{drawn: {{dataset: {{conversations: {questions}}}}}}}",
    ]
    if plain_bits is None:
        changed.append(f"target={{overall_bits: {BITS}, bits: {OFFERED}}}")
    report, _ = run_recipe(load_recipe(RECIPE, changed, export))
    return report


def answers_of(directory: Path, questions: Sequence[Question]) -> list[str]:
    """Return what a model answers in transformers, greedily, in bfloat16."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import ercsvd_deploy.hf  # noqa: F401 - registers the loader of compressed checkpoints

    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.bfloat16).eval()
    processor = AutoProcessor.from_pretrained(directory)
    answers = []
    for question in questions:
        parts = [
            {"type": "image", "image": Image.open(question.picture)},
            {"type": "text", "text": question.text},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
        ).to(torch.bfloat16)
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)
        said = tokens[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(said, skip_special_tokens=True).strip())
    return answers


def served_answers(directory: Path, questions: Sequence[Question], log: Path) -> list[str]:
    """Return what the model answers behind vLLM's server, whose log stays if it fails."""
    from serve_and_ask import (  # type: ignore[import-not-found]
        ask,
        free_port,
        start_server,
        stop_server,
        tell_failure,
        wait_until_ready,
    )

    port = free_port()
    server = start_server(directory, port, log)
    try:
        if not wait_until_ready(server, port):
            tell_failure(log, "the server did not start")
            raise SystemExit(1)
        with ThreadPoolExecutor(REQUESTS_AT_A_TIME) as pool:
            return list(pool.map(lambda each: ask(port, directory.name, each.text, each.picture), questions))
    finally:
        stop_server(server)


def same(one: Sequence[str], other: Sequence[str]) -> Estimate:
    """Return the share of questions with the same answer, with its interval."""
    from ercsvd_deploy.pipelines.judging.uncertainty import share_of

    return share_of([left == right for left, right in zip(one, other, strict=True)], "questions")


def percent(estimate: Estimate) -> tuple[str, str]:
    """Return a share and its interval for a table."""
    return f"{estimate.value:.1%}", f"{estimate.low:.1%} to {estimate.high:.1%}"


def main() -> None:
    """Train the model if it is not there, compress, ask, serve, ask again, and write the results."""
    import torch

    from ercsvd_deploy.pipelines.judging.uncertainty import share_of

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=12.0, help="of training, if there is no model")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sys.path.insert(0, str(EXAMPLES))
    if not (arguments.model / "config.json").is_file():
        train(arguments.model, arguments.minutes)
    with tempfile.TemporaryDirectory() as scratch:
        file, questions = draw_questions(Path(scratch), arguments.questions)
        export = Path(scratch, "export")
        started = time.monotonic()
        report = compress(arguments.model, file, export)
        seconds = time.monotonic() - started
        plain = Path(scratch, "plain")
        plain_report = compress(arguments.model, file, plain, plain_bits=PLAIN_BITS)
        right = [question.answer for question in questions]
        original = answers_of(arguments.model, questions)
        compressed = answers_of(export, questions)
        by_plain = answers_of(plain, questions)
        served = served_answers(export, questions, arguments.model.with_suffix(".vllm.log"))
    still_right = [
        new == wanted for old, new, wanted in zip(original, compressed, right, strict=True) if old == wanted
    ]
    plain_name = f"plain GPTQ-{PLAIN_BITS} ({plain_report.compressed.linear_bits_per_weight:.2f} bits)"
    shares = {
        "the original answers right": same(original, right),
        "the compressed model answers right": same(compressed, right),
        "answers of the original that the compressed model keeps": same(compressed, original),
        "right answers of the original that it keeps": share_of(still_right, "questions"),
        f"{plain_name} answers right": same(by_plain, right),
        f"answers of the original that {plain_name} keeps": same(by_plain, original),
        "served by vLLM: right": same(served, right),
        "served by vLLM: answers of the original kept": same(served, original),
        "served by vLLM: the answers of transformers": same(served, compressed),
    }
    bits = report.compressed.linear_bits_per_weight
    table = markdown_table(
        ["questions about pictures", "share", "95 % interval", "of"],
        [[name, *percent(share), str(share.count)] for name, share in shares.items()],
    )
    sizes = [f"{figures.num_bytes / 1e6:.1f} MB" for figures in (report.original, report.compressed)]
    text = f"""# A second vision-language model

A LLaVA with SigLIP's tower in front of the embedded LLaVA's language model, trained by
`examples/train_tiny_llava.py --tower siglip --start examples/tiny-llava` in {arguments.minutes:g} minutes.
Its decoder is compressed to {bits:.2f} stored bits a weight by GPTQ, each matrix in as many of
{", ".join(map(str, OFFERED))} bits as the budget gives it; that takes {seconds:.0f} s, judging included.
All tensors weigh {sizes[0]}, then {sizes[1]}. An answer counts if it is the same word for word, greedy and
in bfloat16; all scenes are held out from training.

{table}
"""
    write_results(
        "second_vlm",
        made_by=environment(
            f"python benchmarks/second_vlm.py --model out/tiny-llava-siglip --minutes {arguments.minutes:g} "
            f"--questions {arguments.questions}",
            threads=arguments.threads,
        ),
        figures={
            "bits_per_weight": bits,
            "num_bytes": {"original": report.original.num_bytes, "compressed": report.compressed.num_bytes},
            "seconds": seconds,
            "training": json.loads((arguments.model / "training_log.json").read_text()),
            "shares": {name: asdict(share) for name, share in shares.items()},
        },
        text=text,
    )


if __name__ == "__main__":
    main()
